"""What students are compared with on all training windows, in a file that is made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foldgpt.artifacts import alone, hash_of, is_whole, remove_leftovers, staged_file
from foldgpt.errors import ArtifactError
from foldgpt.fingerprints import weights_fingerprint
from foldgpt.objectives import Head, ReducedPredictions
from foldgpt.objectives.reduced_predictions import LIKELIEST
from foldgpt.progress import bar
from foldgpt.recovery.settings import RecoverySettings
from foldgpt.recovery.teacher import Teacher, TeacherStates
from foldgpt.recovery.windows import TrainingWindows, places_in_documents

#: Bytes of a number → integers of as many, as which the same bits are kept: numpy has no bf16.
_BITS = {2: (np.int16, torch.int16), 4: (np.int32, torch.int32), 8: (np.int64, torch.int64)}
#: What of a window is in that format, and what there is of its predictions, in their order.
_IN_TEACHERS_FORMAT = ("states", "mean")
_PREDICTIONS = ("tokens", "p", "mean", "own")
#: Of what the numbers in a file mean; part of its name.
_FORMAT = 1


@dataclass(frozen=True)
class Kept:
    """What is kept of a teacher's passes, beside the streams that it is asked for.

    Attributes:
        last: the last hidden states.
        temperature: that at which its predictions are reduced; None if they are not.
    """

    last: bool = True
    temperature: float | None = None

    @classmethod
    def for_losses(cls, settings: RecoverySettings, student_head: Head, teacher_head: Head) -> Kept:
        """As little as the losses need.

        Predictions can be reduced for the forward divergence alone, of a student whose head is the teacher's. They
        save each step the teacher's logits.

        Args:
            settings: the losses.
            student_head: the student's head, which is not trained.
            teacher_head: the teacher's.
        """
        reduces = cls.reduces(settings) and student_head.is_linear_as(teacher_head)
        compares = bool(settings.last_error or settings.last_cosine or (settings.kl and not reduces))
        return cls(compares, float(settings.temperature) if reduces else None)

    @staticmethod
    def reduces(settings: RecoverySettings) -> bool:
        """Whether the losses can be told from reduced predictions, if the heads allow it."""
        return settings.kl > 0 and settings.divergence == "forward"


class CachedStates:
    """What students are compared with on all training windows, in one memory-mapped file.

    States and vectors are in the teacher's number format. Several recoveries from one teacher on the same windows then
    share one pass.

    Args:
        path: the file, as `cache_states` made it.
        record: a window's entry in it.
        num_windows: how many there are.
        dtype: the teacher's.
        kept: what is in it.
        has_entry: whether the first stream of a window, behind its last hidden states if they are kept, is the one
            behind the common blocks.
    """

    def __init__(
        self, path: Path, record: np.dtype, num_windows: int, dtype: torch.dtype, kept: Kept, *, has_entry: bool
    ) -> None:
        self._dtype, self._kept, self._has_entry = dtype, kept, has_entry
        self._table = np.memmap(path, dtype=record, mode="r", shape=(num_windows,))

    def states(self, windows: Tensor, device: torch.device) -> TeacherStates:
        """What is kept of some windows, by number, in the teacher's format."""
        rows = self._table[windows.cpu().numpy()]

        def part(name: str) -> Tensor:
            # The parts of a record lie at any place in it, and torch wants whole steps.
            values = torch.from_numpy(np.ascontiguousarray(rows[name]))
            return (values.view(self._dtype) if name in _IN_TEACHERS_FORMAT else values).to(device)

        streams = list(part("states").unbind(1)) if "states" in (rows.dtype.names or ()) else []
        last = streams.pop(0) if self._kept.last else None
        entry = streams.pop(0) if self._has_entry else None
        predictions = None
        if self._kept.temperature is not None:
            tokens, p, mean, own = map(part, _PREDICTIONS)
            predictions = ReducedPredictions(tokens, p, mean, own, self._kept.temperature)
        return TeacherStates(last, tuple(streams), entry, predictions)


def cache_states(
    teacher: Teacher, train: TrainingWindows, folder: Path, *, batch_size: int, kept: Kept
) -> CachedStates:
    """Open the file of a teacher's states on these windows; make it first if it is not there.

    Args:
        teacher: the teacher.
        train: all training windows.
        folder: where such files are kept; the name says for which teacher, windows and states it is.
        batch_size: windows in one forward pass.
        kept: what is kept beside the streams that it is asked for.

    Raises:
        ArtifactError: the file cannot be written.
    """
    dtype, has_entry = next(teacher.model.parameters()).dtype, teacher.common > 0
    record = _record(teacher, train.ids_WT.shape[1], kept, dtype)
    # Which tokens are scored is nothing to the teacher.
    seen = {name: value for name, value in train.identity().items() if name != "scored"}
    layout = [_FORMAT, str(dtype), has_entry, kept.last, kept.temperature, str(record)]
    path = folder / f"{hash_of([weights_fingerprint(teacher.model), seen, list(teacher.behind), *layout])[:32]}.states"
    num_bytes = len(train) * record.itemsize
    if not is_whole(path, num_bytes):
        try:
            with alone(path):
                if not is_whole(path, num_bytes):
                    remove_leftovers(path)
                    _write(teacher, train, path, record, kept, batch_size)
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error.strerror or error}. Nothing was left behind.") from error
    return CachedStates(path, record, len(train), dtype, kept, has_entry=has_entry)


def _record(teacher: Teacher, num_tokens: int, kept: Kept, dtype: torch.dtype) -> np.dtype:
    """A window's entry in the file."""
    bits = _BITS[dtype.itemsize][0]
    num_streams = kept.last + len(teacher.behind)
    hidden, likeliest = teacher.head.hidden_size, min(LIKELIEST, teacher.head.vocab_size)
    fields: list[tuple] = [("states", bits, (num_streams, num_tokens, hidden))] if num_streams else []
    if kept.temperature is not None:
        fields += [
            ("mean", bits, (num_tokens, hidden)),
            ("tokens", np.int32, (num_tokens, likeliest)),
            ("p", np.float32, (num_tokens, likeliest)),
            ("own", np.float32, (num_tokens,)),
        ]
    return np.dtype(fields)


def _write(teacher: Teacher, train: TrainingWindows, path: Path, record: np.dtype, kept: Kept, batch_size: int) -> None:
    parameter = next(teacher.model.parameters())
    bits = _BITS[parameter.element_size()][1]

    def as_kept(states: Tensor) -> np.ndarray:
        return states.to("cpu", parameter.dtype).contiguous().view(bits).numpy()

    with staged_file(path) as file, bar("the teacher's states", len(train)) as progress:
        for start in range(0, len(train), batch_size):
            rows = slice(start, start + batch_size)
            ids_BT = train.ids_WT[rows].to(parameter.device).long()
            begins_BT = None if train.begins_WT is None else train.begins_WT[rows].to(parameter.device)
            found = teacher.states(ids_BT, None if begins_BT is None else places_in_documents(begins_BT))
            assert found.last_BTH is not None
            table = np.empty(len(ids_BT), record)
            streams = [found.last_BTH] if kept.last else []
            streams += [] if found.entry_BTH is None else [found.entry_BTH]
            streams += found.between
            if streams:
                table["states"] = as_kept(torch.stack(streams, dim=1))
            if kept.temperature is not None:
                last_RH = found.last_BTH.flatten(0, 1)
                predictions = ReducedPredictions.of(teacher.head, last_RH, kept.temperature, parameter.dtype)
                for name, rows_of in zip(_PREDICTIONS, predictions.tensors, strict=True):
                    values = rows_of.unflatten(0, ids_BT.shape)
                    table[name] = as_kept(values) if name in _IN_TEACHERS_FORMAT else values.cpu().numpy()
            file.write(table.tobytes())
            progress.advance(len(table))

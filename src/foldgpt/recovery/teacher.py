"""The teacher's hidden states for a batch: computed beside the student's, or read from a file made once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from foldgpt.artifacts import alone, hash_of, is_whole, remove_leftovers, staged_file
from foldgpt.errors import ArtifactError
from foldgpt.fingerprints import weights_fingerprint
from foldgpt.objectives import Head
from foldgpt.progress import bar
from foldgpt.recovery.states import Body, States
from foldgpt.recovery.windows import TrainingWindows, places_in_documents

#: Bytes of a number → integers of as many, as which the same bits are kept: numpy has no bf16.
_BITS = {2: (np.int16, torch.int16), 4: (np.int32, torch.int32), 8: (np.int64, torch.int64)}


class Teacher:
    """The source model, run without gradients.

    Args:
        model: the source; its parameters are not changed.
        behind: source indices of the blocks behind which states are wanted.
        common: how many blocks, from the first on, are the student's as well; the stream behind them is wanted too.

    Attributes:
        head: its head.
    """

    def __init__(self, model: nn.Module, behind: Sequence[int] = (), common: int = 0) -> None:
        self.model = model.eval()
        self.head = Head(model)
        self.common = common
        self.behind = ((common - 1,) if common else ()) + tuple(behind)
        self._body = Body(model, self.behind)

    @torch.no_grad()
    def states(self, ids_BT: Tensor, positions_BT: Tensor | None = None) -> States:
        """Its states on token ids [B, T]."""
        found = self._body(ids_BT, positions_BT)
        return _with_entry(found.last_BTH, found.between) if self.common else found


class CachedStates:
    """The teacher's states on all training windows, in its own format in one memory-mapped file.

    Several recoveries from one teacher on the same windows then share one pass, and come out as without. The file
    takes as many bytes for each token, channel and kind of state as a weight of the teacher.

    Args:
        path: the file, as `cache_states` made it.
        shape: W, S, T, H: windows, states of a window (the last hidden ones first), tokens, channels.
        dtype: the teacher's.
        has_entry: whether the second state of a window is the one behind the common blocks.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int, int, int], dtype: torch.dtype, *, has_entry: bool = False
    ) -> None:
        self._dtype, self._has_entry = dtype, has_entry
        self._table = np.memmap(path, dtype=_BITS[dtype.itemsize][0], mode="r", shape=shape)

    def states(self, windows: Tensor, device: torch.device, dtype: torch.dtype) -> States:
        """States of some windows, by number, in the teacher's format."""
        rows = torch.from_numpy(self._table[windows.cpu().numpy()]).view(self._dtype).to(device, dtype)
        last, *between = rows.unbind(1)
        return _with_entry(last, between) if self._has_entry else States(last, tuple(between))


def cache_states(teacher: Teacher, train: TrainingWindows, folder: Path, *, batch_size: int) -> CachedStates:
    """Open the file of a teacher's states on these windows; make it first if it is not there.

    Args:
        teacher: the teacher.
        train: all training windows.
        folder: where such files are kept; the name says for which teacher, windows and states it is.
        batch_size: windows in one forward pass.

    Raises:
        ArtifactError: the file cannot be written.
    """
    hidden, dtype = teacher.head.hidden_size, next(teacher.model.parameters()).dtype
    shape = (len(train), 1 + len(teacher.behind), train.ids_WT.shape[1], hidden)
    # Which tokens are scored is nothing to the teacher.
    seen = {name: value for name, value in train.identity().items() if name != "scored"}
    parts = [weights_fingerprint(teacher.model), seen, list(teacher.behind), list(shape)]
    has_entry = teacher.common > 0
    path = folder / f"{hash_of([*parts, has_entry, str(dtype)])[:32]}.states"
    num_bytes = math.prod(shape) * dtype.itemsize
    if not is_whole(path, num_bytes):
        try:
            with alone(path):
                if not is_whole(path, num_bytes):
                    remove_leftovers(path)
                    _write(teacher, train, path, batch_size)
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error.strerror or error}. Nothing was left behind.") from error
    return CachedStates(path, shape, dtype, has_entry=has_entry)


def _write(
    teacher: Teacher,
    train: TrainingWindows,
    path: Path,
    batch_size: int,
) -> None:
    parameter = next(teacher.model.parameters())
    device, (_, bits) = parameter.device, _BITS[parameter.element_size()]
    with staged_file(path) as file, bar("the teacher's states", len(train)) as progress:
        for start in range(0, len(train), batch_size):
            rows = slice(start, start + batch_size)
            ids_BT = train.ids_WT[rows].to(device).long()
            places_BT = None if train.begins_WT is None else places_in_documents(train.begins_WT[rows].to(device))
            found = teacher.states(ids_BT, places_BT)
            entry = [] if found.entry_BTH is None else [found.entry_BTH]
            table = torch.stack([found.last_BTH, *entry, *found.between], dim=1).to("cpu", parameter.dtype)
            file.write(table.contiguous().view(bits).numpy().tobytes())
            progress.advance(len(table))


def _with_entry(last_BTH: Tensor, between: Sequence[Tensor]) -> States:
    entry_BTH, *rest = between
    return States(last_BTH, tuple(rest), entry_BTH)

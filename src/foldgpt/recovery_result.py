"""What a recovery did, in figures, and the record of it that lies in the recovered model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from foldgpt.artifacts import read_json
from foldgpt.errors import ArtifactError, first_problem

#: In the folder of a recovered model.
RECOVERY = "recovery.json"

Count = Annotated[int, Field(ge=0)]
Ended = Literal["tokens", "time", "patience"]
Figures = dict[str, int | float]


@dataclass(frozen=True)
class RecoveryResult:
    """A recovery that stands.

    Attributes:
        before: mean losses on the held-out windows before training; "loss" is their weighted sum.
        after: the same of the merged model that was saved (under FSDP: before it was merged).
        best_step: the step whose state was saved; 0 if training made nothing better, and the student is as it was.
        num_steps: steps that were made.
        num_tokens: tokens in them.
        ended: what ended the training: all tokens used, the time, or no better state for `patience` measurements.
        num_trained: parameters that were trained; merged, they add none.
        seconds: time of training, with its measurements and checkpoints, over all parts if it was interrupted. What a
            part did after its last checkpoint was done again, and is in neither `num_tokens` nor this.
        history: what was logged, each with its "step".
        settings: how it was done.
        text: what it was trained and judged on: "texts", files by their whole paths, "context", "num_held_out"
            (tokens), "separate_documents" and "seed". Empty where that is not known, as in records of earlier versions.
        teacher: what it was compared with: "model", "revision" and "fingerprint". Empty where no loss compares, and
            where that is not known.
    """

    before: Figures
    after: Figures
    best_step: Count
    num_steps: Count
    num_tokens: Count
    ended: Ended
    num_trained: Count
    seconds: float
    history: list[Figures]
    settings: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens_kept(self) -> int:
        """Tokens behind the state that was saved; those after it made nothing better."""
        return round(self.num_tokens * self.best_step / self.num_steps) if self.num_steps else 0

    @property
    def divergence(self) -> str:
        """What the losses call "kl", in words: the KL from the source, unless another divergence was trained by."""
        kind, temperature = self.settings.get("divergence", "forward"), self.settings.get("temperature", 1)
        told = [f"skew {self.settings['skew']:g}"] if kind == "skewed" and "skew" in self.settings else []
        told += [] if temperature == 1 else [f"temperature {temperature:g}"]
        name = "KL" if kind == "forward" else f"{kind} KL"
        return f"{name} ({', '.join(told)})" if told else name

    def to_json_dict(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return asdict(self)

    @classmethod
    def load(cls, folder: Path) -> RecoveryResult:
        """Read the record in a recovered model.

        Raises:
            ArtifactError: it is missing, cannot be read, or is not what a recovery writes.
        """
        path = folder / RECOVERY
        try:
            result = _ADAPTER.validate_python(read_json(path, "record of the recovery"))
        except ValidationError as error:
            raise ArtifactError(f"{path} is not the record of a recovery: {first_problem(error)}") from error
        wrong = result._contradiction()
        if wrong is not None:
            raise ArtifactError(f"{path} is not the record of a recovery: {wrong}")
        return result

    def _contradiction(self) -> str | None:
        """What no recovery writes, if there is such; None otherwise."""
        for name, losses in (("before", self.before), ("after", self.after)):
            if "loss" not in losses:
                return f"{name}: there is no loss"
        if self.text and not {"texts", "context", "num_held_out"} <= self.text.keys():
            return "text: it does not say what it was trained and judged on"
        if any("step" not in entry for entry in self.history):
            return "history: an entry has no step"
        return "best_step: beyond the last step" if self.best_step > self.num_steps else None


_ADAPTER = TypeAdapter(RecoveryResult)


def read_recovery(folder: Path) -> RecoveryResult | None:
    """What the recovery of a checkpoint did; None if it was not recovered.

    Raises:
        ArtifactError: the record cannot be read, or is not what a recovery writes.
    """
    return RecoveryResult.load(folder) if (folder / RECOVERY).is_file() else None

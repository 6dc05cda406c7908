"""What a recovery did, in figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Ended = Literal["tokens", "time", "patience"]


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
        seconds: time of training in this process; of the last part alone if it was interrupted.
        history: what was logged, step by step.
        settings: how it was done.
    """

    before: dict[str, float]
    after: dict[str, float]
    best_step: int
    num_steps: int
    num_tokens: int
    ended: Ended
    num_trained: int
    seconds: float
    history: list[dict[str, float]]
    settings: dict[str, Any]

    def to_json_dict(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return asdict(self)

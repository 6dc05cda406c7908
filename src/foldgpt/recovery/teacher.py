"""The teacher: the source model, run beside the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foldgpt.objectives import Head, ReducedPredictions
from foldgpt.recovery.states import Body


@dataclass(frozen=True)
class TeacherStates:
    """What the student of a batch is compared with, and goes on from.

    Attributes:
        last_BTH: the last hidden states, after the final norm; None where they were not kept.
        between: the residual stream behind the blocks that were asked for, [B, T, H] each.
        entry_BTH: the stream in front of the first block that teacher and student do not have in common.
        predictions: of the next token at each position, [B, T], in place of the last hidden states.
    """

    last_BTH: Tensor | None = None
    between: tuple[Tensor, ...] = ()
    entry_BTH: Tensor | None = None
    predictions: ReducedPredictions | None = None

    def to(self, device: torch.device | str) -> TeacherStates:
        """The same on a device."""
        last, entry = (None if state is None else state.to(device) for state in (self.last_BTH, self.entry_BTH))
        predictions = None if self.predictions is None else self.predictions.to(device)
        return TeacherStates(last, tuple(state.to(device) for state in self.between), entry, predictions)

    def arguments(self) -> dict[str, Any]:
        """What there is of it, as `Distillation` is called with it."""
        there = {"last": self.last_BTH, "entry": self.entry_BTH, "predictions": self.predictions}
        named = {f"teacher_{name}": value for name, value in there.items() if value is not None}
        return {**named, "teacher_between": self.between}


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
    def states(self, ids_BT: Tensor, positions_BT: Tensor | None = None) -> TeacherStates:
        """Its states on token ids [B, T]."""
        found = self._body(ids_BT, positions_BT)
        entry_BTH, between = (found.between[0], found.between[1:]) if self.common else (None, found.between)
        return TeacherStates(found.last_BTH, between, entry_BTH)

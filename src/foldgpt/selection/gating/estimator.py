"""What every way of learning gates has in common."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Estimator(Protocol):
    """Learns a gate for each unit, the backbone frozen.

    Shape suffix: U units.
    """

    def step(self) -> float:
        """One update of the gates; returns the objective that was seen, for the trace.

        Raises:
            FoldGPTError: a gate or the objective is not a number.
        """

    def keep_probabilities(self) -> Tensor:
        """How likely, or how far, each unit is kept: fp64 [U] in [0, 1]; 1 is kept."""

    def has_settled(self) -> bool:
        """Whether more steps would change nothing."""

    def state(self) -> dict[str, Any]:
        """All that a later `restore` needs, as JSON values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""


def restore_moments_(optimizer: torch.optim.Optimizer, parameter: Tensor, moments: dict[str, Any]) -> None:
    """Give Adam its moments back from JSON values."""
    if moments:
        optimizer.state[parameter] = {
            name: torch.tensor(value, dtype=torch.float32 if name == "step" else torch.float64)
            for name, value in moments.items()
        }

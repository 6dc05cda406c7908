"""The smoothed-L0 gate g = a² / (a² + ε), polarised.

ε shrinks over the steps, so that a gate is either far above √ε, where it is open and has no gradient, or falls to 0.
Left alone every gate stays open, or all of them settle half-open, where the KL is small and no block is gone. Two
terms force a decision: an augmented Lagrangian for the number of open gates, and a concave penalty g (1 − g) whose
weight grows from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foldgpt.errors import FoldGPTError
from foldgpt.selection.cost import RemovalCost, Sample
from foldgpt.selection.gated_pass import check_blocks, gradient_of_gates
from foldgpt.selection.gating.estimator import restore_moments_


class SmoothedL0:
    """See the module.

    Shape suffix: N blocks.

    Args:
        cost: the measure.
        samples: what each step measures on, in turn.
        scores: the cost of removing each block alone; cheap ones start a little less open.
        num_steps: over which ε shrinks and the penalty grows.
        learning_rate: Adam's.
    """

    def __init__(
        self,
        cost: RemovalCost,
        samples: Sequence[Sample],
        scores: Sequence[float],
        *,
        num_steps: int,
        learning_rate: float = 0.05,
    ) -> None:
        check_blocks(cost, "the estimator 'smoothed'")
        self._cost = cost
        self._samples = samples
        self._num_steps = num_steps
        rank_N = torch.tensor(scores, dtype=torch.float64).argsort().argsort().double() / max(1, len(scores) - 1)
        self._a_N = (0.6 + 0.4 * rank_N).requires_grad_()
        self._optimizer = torch.optim.Adam([self._a_N], lr=learning_rate)
        self._multiplier = 0.0
        self._steps = 0

    @property
    def _epsilon(self) -> float:
        """From 0.1 to 0.001, geometrically."""
        return float(0.1 * 0.01 ** min(1.0, self._steps / self._num_steps))

    def _gates(self) -> Tensor:
        square_N = self._a_N.square()
        return square_N / (square_N + self._epsilon)

    def step(self) -> float:
        """One step on KL, budget and polarisation."""
        gates_N = self._gates()
        kl, gradient_N = gradient_of_gates(self._cost, self._samples[self._steps % len(self._samples)], gates_N)
        excess = gates_N.sum() - (len(gates_N) - self._cost.units.target)
        polarisation = min(1.0, self._steps / self._num_steps) * (gates_N * (1 - gates_N)).sum()
        loss = (gates_N * gradient_N).sum() + self._multiplier * excess + 0.1 * excess.square() + polarisation
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._multiplier += 0.05 * float(excess.detach())
        self._steps += 1
        if not bool(self._a_N.isfinite().all()):
            raise FoldGPTError(f"the gates are not finite after step {self._steps}")
        return kl

    def keep_probabilities(self) -> Tensor:
        """The gates themselves."""
        return self._gates().detach()

    def has_settled(self) -> bool:
        """After the planned steps."""
        return self._steps >= self._num_steps

    def state(self) -> dict[str, Any]:
        """Gates, multiplier and moments."""
        moments = self._optimizer.state.get(self._a_N, {})
        return {
            "steps": self._steps,
            "a": self._a_N.tolist(),
            "multiplier": self._multiplier,
            "moments": {name: value.tolist() for name, value in moments.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._steps, self._multiplier = state["steps"], state["multiplier"]
        with torch.no_grad():
            self._a_N.copy_(torch.tensor(state["a"], dtype=torch.float64))
        restore_moments_(self._optimizer, self._a_N, state["moments"])

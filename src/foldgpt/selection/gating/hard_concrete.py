"""Hard concrete gates: a stochastic relaxation with mass at exactly 0 and 1 (Louizos et al. 2018, arXiv 1712.01312).

The budget is met in expectation at every step: all logits are shifted by the one number that makes the expected
number of open gates what it should be. There is no penalty to tune.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foldgpt.errors import FoldGPTError
from foldgpt.selection.cost import RemovalCost, Sample
from foldgpt.selection.gated_pass import check_blocks, gradient_of_gates
from foldgpt.selection.gating.estimator import restore_moments_
from foldgpt.selection.measured import capped

_TEMPERATURE = 2 / 3
_LOW, _HIGH = -0.1, 1.1


class HardConcrete:
    """See the module.

    Shape suffix: N blocks.

    Args:
        cost: the measure.
        samples: what each step measures on, in turn.
        scores: the cost of removing each block alone; what the gates start from.
        num_steps: steps that are planned.
        seed: of the draws.
        learning_rate: Adam's.
    """

    def __init__(
        self,
        cost: RemovalCost,
        samples: Sequence[Sample],
        scores: Sequence[float],
        *,
        num_steps: int,
        seed: int = 0,
        learning_rate: float = 0.1,
    ) -> None:
        check_blocks(cost, "the estimator 'concrete'")
        self._cost = cost
        self._samples = samples
        self._num_steps = num_steps
        self._generator = torch.Generator().manual_seed(seed)
        log_N = torch.tensor(capped(scores), dtype=torch.float64).clamp_min(1e-12).log()
        self._logits_N = ((log_N - log_N.mean()) / log_N.std().clamp_min(1e-6)).requires_grad_()
        self._optimizer = torch.optim.Adam([self._logits_N], lr=learning_rate)
        self._steps = 0

    def step(self) -> float:
        """One step on the KL of one draw of the gates."""
        logits_N = self._logits_N + self._shift()
        uniform_N = torch.rand(len(logits_N), generator=self._generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        noisy_N = torch.sigmoid((uniform_N.log() - (1 - uniform_N).log() + logits_N) / _TEMPERATURE)
        gates_N = (noisy_N * (_HIGH - _LOW) + _LOW).clamp(0, 1)
        kl, gradient_N = gradient_of_gates(self._cost, self._samples[self._steps % len(self._samples)], gates_N)
        self._optimizer.zero_grad()
        (gates_N * gradient_N).sum().backward()
        self._optimizer.step()
        self._steps += 1
        if not bool(self._logits_N.isfinite().all()):
            raise FoldGPTError(f"the gates are not finite after step {self._steps}")
        return kl

    def _open(self, logits_N: Tensor) -> Tensor:
        """The probability that each gate is not exactly 0."""
        return torch.sigmoid(logits_N - _TEMPERATURE * math.log(-_LOW / _HIGH))

    @torch.no_grad()
    def _shift(self) -> float:
        """What to add to all logits, so that the expected number of open gates is the number of kept blocks."""
        wanted = len(self._logits_N) - self._cost.units.target
        low, high = -60.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            if float(self._open(self._logits_N + middle).sum()) < wanted:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def keep_probabilities(self) -> Tensor:
        """The probability that each gate is open."""
        return self._open(self._logits_N + self._shift()).detach()

    def has_settled(self) -> bool:
        """After the planned steps."""
        return self._steps >= self._num_steps

    def state(self) -> dict[str, Any]:
        """Logits, moments and the state of the generator."""
        moments = self._optimizer.state.get(self._logits_N, {})
        return {
            "steps": self._steps,
            "logits": self._logits_N.tolist(),
            "moments": {name: value.tolist() for name, value in moments.items()},
            "generator": self._generator.get_state().tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._steps = state["steps"]
        with torch.no_grad():
            self._logits_N.copy_(torch.tensor(state["logits"], dtype=torch.float64))
        restore_moments_(self._optimizer, self._logits_N, state["moments"])
        self._generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))

"""Gates by the score function: forward passes of sampled models, no gradient through the network.

The removed set is drawn without replacement (Plackett–Luce by Gumbel top-k; Kool et al. 2019, arXiv 1903.06059), so
that every sample is a real model that meets the budget exactly: there is no relaxation that has to be polarised, and
no first-order gradient that massive activations mislead. The reward is the log cost; each sample's baseline is the
mean of the others (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!").

Few passes make a noisy gradient. What the samples teach is therefore also kept in a regression of log cost on sets
with pair interactions, `Surrogate`, and used as a control variate: the gradient of its expectation is taken over
thousands of sets at no cost in passes, and the measured samples only correct what it gets wrong. The sum stays
unbiased, whatever the regression says, because it is fitted before the samples are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldgpt.errors import FoldGPTError
from foldgpt.selection.cost import RemovalCost, Sample
from foldgpt.selection.gating.estimator import restore_moments_
from foldgpt.selection.gating.surrogate import Measurement, Surrogate
from foldgpt.selection.measured import capped
from foldgpt.selection.units import Removed, Units

#: Standard deviation of the log cost on one micro-batch, beside what it differs by for all sets alike.
NOISE = 0.1
#: Sets measured in one step.
SAMPLES = 8
#: Sets drawn for the surrogate's part of the gradient and for the probabilities.
_FREE_SAMPLES = 512


class ScoreFunction:
    """See the module.

    Shape suffixes: S sampled sets, U units.

    Args:
        cost: the measure.
        samples: what each step measures on, in turn.
        scores: the cost of removing each unit alone; what the gates start from.
        noise: standard deviation of the log cost on one of the samples.
        seed: of the draws.
        learning_rate: Adam's.

    Attributes:
        measurements: every measured set, of all steps.
        surrogate: fitted to them.
    """

    def __init__(
        self,
        cost: RemovalCost,
        samples: Sequence[Sample],
        scores: Sequence[float],
        *,
        noise: float = NOISE,
        seed: int = 0,
        learning_rate: float = 0.25,
    ) -> None:
        self._cost = cost
        self._samples = samples
        self._noise = noise
        self._generator = torch.Generator().manual_seed(seed)
        self.measurements: list[Measurement] = []
        self.surrogate = Surrogate(scores, cost.units.per_block)
        self._logits_U = _starting_logits(scores)
        self._optimizer = torch.optim.Adam([self._logits_U], lr=learning_rate, betas=(0.9, 0.95))
        self._steps = 0
        self._keep_U: Tensor | None = None  # as the logits say, once they were asked

    def step(self) -> float:
        """Measure a few sampled sets and move the gates along the gradient of the expected log cost."""
        sample_index = self._steps % len(self._samples)
        free = draw(self._logits_U, self._cost.units, _FREE_SAMPLES, self._generator)
        drawn = draw(self._logits_U, self._cost.units, SAMPLES, self._generator)
        sets = [found.removed for found in drawn]
        # Sets that begin alike, one after another: they share states.
        costs = {s: self._cost.cost(s, self._samples[sample_index]) for s in sorted(set(sets), key=sorted)}
        rewards_S = torch.tensor([costs[s] for s in sets], dtype=torch.float64).clamp_min(1e-12).log()
        predicted_S = self.surrogate.predict(sets)
        predicted_free_S = self.surrogate.predict([found.removed for found in free])
        # E[(r − f) ∇ log p] from what was measured, and E[f ∇ log p] from what was only predicted.
        loss = _surprise(self._logits_U, drawn, rewards_S - predicted_S) + _surprise(
            self._logits_U, free, predicted_free_S
        )
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._keep_U = None
        if not bool(self._logits_U.isfinite().all()):
            raise FoldGPTError(f"the gates are not finite after step {self._steps + 1}")
        self.measurements += [
            Measurement(s, sample_index, float(torch.tensor(cost).clamp_min(1e-12).log()), self._noise)
            for s, cost in costs.items()
        ]
        self.surrogate.fit(self.measurements)
        self._steps += 1
        return float(rewards_S.exp().mean())

    def keep_probabilities(self) -> Tensor:
        """The share of drawn sets that keep each unit."""
        if self._keep_U is None:
            generator = torch.Generator().manual_seed(0)
            gone_U = torch.zeros(len(self._cost.units), dtype=torch.float64)
            for found in draw(self._logits_U, self._cost.units, _FREE_SAMPLES, generator):
                gone_U[list(found.removed)] += 1 / _FREE_SAMPLES
            self._keep_U = 1 - gone_U
        return self._keep_U

    def has_settled(self) -> bool:
        """Whether nearly every draw gives the same set."""
        probabilities = self.keep_probabilities()
        return bool((torch.minimum(probabilities, 1 - probabilities) < 0.05).all())

    def state(self) -> dict[str, Any]:
        """Logits, moments of the optimiser, measurements and the state of the generator."""
        moments = self._optimizer.state.get(self._logits_U, {})
        return {
            "steps": self._steps,
            "logits": self._logits_U.tolist(),
            "moments": {name: moments[name].tolist() for name in ("step", "exp_avg", "exp_avg_sq") if name in moments},
            "generator": self._generator.get_state().tolist(),
            "measurements": [[sorted(m.removed), m.sample, m.log_cost, m.noise] for m in self.measurements],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._steps, self._keep_U = state["steps"], None
        with torch.no_grad():
            self._logits_U.copy_(torch.tensor(state["logits"], dtype=torch.float64))
        restore_moments_(self._optimizer, self._logits_U, state["moments"])
        self._generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self.measurements = [Measurement(frozenset(s), k, c, n) for s, k, c, n in state["measurements"]]
        if self.measurements:
            self.surrogate.fit(self.measurements)


class Drawn(NamedTuple):
    """A set that was drawn.

    Attributes:
        removed: the set.
        order: the units in the order of the draw, as far as they decided it. Not all of them need be in the set: some
            may not go, and some are put back.
    """

    removed: Removed
    order: list[int]


def draw(logits_U: Tensor, units: Units, number: int, generator: torch.Generator) -> list[Drawn]:
    """Sets drawn without replacement until the budget is met."""
    uniform = torch.rand(number, len(units), generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    perturbed = logits_U.detach() - (-uniform.log()).log()
    drawn = []
    for order in perturbed.argsort(-1, descending=True).tolist():
        removed, seen = units.filled(order)
        drawn.append(Drawn(removed, order[:seen]))
    return drawn


def _surprise(logits_U: Tensor, drawn: list[Drawn], values_S: Tensor) -> Tensor:
    """A scalar whose gradient is that of E[value] by the score function, each value less the mean of the others."""
    number = len(drawn)
    advantage_S = (values_S - values_S.mean()) * number / max(1, number - 1)
    return (advantage_S * log_probability(logits_U, [found.order for found in drawn])).mean()


def log_probability(logits_U: Tensor, drawn: list[list[int]]) -> Tensor:
    """Plackett–Luce log probability [S] of drawing these units in this order."""
    longest = max(map(len, drawn))
    order_SK = torch.tensor([order + [-1] * (longest - len(order)) for order in drawn])
    valid_SK = order_SK >= 0
    left_SU = logits_U.expand(len(drawn), -1)
    total_S = logits_U.new_zeros(len(drawn))
    for place in range(longest):
        unit_S = order_SK[:, place].clamp_min(0)
        log_p_S = left_SU.gather(1, unit_S[:, None])[:, 0] - left_SU.logsumexp(-1)
        total_S = total_S + torch.where(valid_SK[:, place], log_p_S, torch.zeros_like(log_p_S))
        taken_SU = torch.nn.functional.one_hot(unit_S, logits_U.numel()).bool()
        left_SU = left_SU.masked_fill(taken_SU, -1e9)
    return total_S


def _starting_logits(scores: Sequence[float]) -> Tensor:
    """Logits of removal: units that cost little alone are likely to go, but none is ruled out."""
    log_U = torch.tensor(capped(scores), dtype=torch.float64).clamp_min(1e-12).log()
    spread = log_U.std().clamp_min(1e-6)
    return (-(log_U - log_U.mean()) / spread * _STARTING_SPREAD).requires_grad_()


#: Standard deviation of the logits at the start.
_STARTING_SPREAD = 1.5

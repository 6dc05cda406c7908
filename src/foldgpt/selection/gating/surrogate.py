"""A regression of log cost on removed sets, with every pair of units interacting.

Perturbation theory says what to fit: for small changes the KL of a set is a sum over its units and over its pairs.
The pairs are what leave-one-out scores and BI leave out. With a few hundred measured sets there are fewer equations
than pairs, so this is a Gaussian process: units nearby in depth are alike, and so are their interactions. How much of
a set lies next to each other is a feature of its own, for what that is worth (a cut more or less) is much the same at
all depths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foldgpt.selection.measured import capped
from foldgpt.selection.units import Removed


@dataclass(frozen=True)
class Measurement:
    """One measured set.

    Attributes:
        removed: the set.
        sample: which sample of windows it was measured on; sets on one sample share its offset.
        log_cost: the logarithm of its cost.
        noise: standard deviation of log_cost, the sample's offset aside.
    """

    removed: Removed
    sample: int
    log_cost: float
    noise: float


def log_of(cost: float) -> float:
    """The logarithm of a cost, which may be 0."""
    return math.log(max(cost, 1e-12))


def nearness(num_units: int, per_block: int, reach: float) -> Tensor:
    """How much alike units are by their depth, fp64 [U, U]: 1 for the same, half of that for the two kinds of a block.

    Args:
        num_units: how many there are.
        per_block: units in a block.
        reach: blocks this far apart are alike to 1/e.
    """
    units = torch.arange(num_units)
    depth, kind = (units // per_block).double(), units % per_block
    near = torch.exp(-(depth[:, None] - depth[None]).abs() / reach)
    return torch.where(kind[:, None] == kind[None], near, 0.5 * near)


def features_of(sets: Sequence[Removed], num_units: int) -> Tensor:
    """Which units each set has, fp64 [S, U]."""
    features = torch.zeros(len(sets), num_units, dtype=torch.float64)
    entries = [(row, unit) for row, removed in enumerate(sets) for unit in removed]
    if entries:
        features[tuple(torch.tensor(entries).T)] = 1
    return features


class Surrogate:
    """Predicts the log cost of sets that were not measured.

    Shape suffixes: M measured sets, S other sets, U units.

    Args:
        scores_U: the cost of removing each unit alone; log of their sum is what is expected of a set at first.
        per_block: units in a block (neighbours in depth are alike, attention and MLP are not).
    """

    def __init__(self, scores_U: Sequence[float], per_block: int) -> None:
        self._scores_U = torch.tensor(capped(scores_U), dtype=torch.float64)
        self._per_block = per_block
        self._near_UU = nearness(len(scores_U), per_block, _REACH)
        self._known = torch.zeros(0, len(scores_U), dtype=torch.float64)
        self._weights = torch.zeros(0, dtype=torch.float64)
        self._samples_M = torch.zeros(0, dtype=torch.int64)
        self._factor = torch.zeros(0, 0, dtype=torch.float64)
        self._level = 0.0

    def fit(self, measurements: Sequence[Measurement]) -> None:
        """Fit to all measurements so far."""
        self._known = self._features([m.removed for m in measurements])
        self._samples_M = torch.tensor([m.sample for m in measurements])
        target_M = torch.tensor([m.log_cost for m in measurements], dtype=torch.float64) - self._expected(self._known)
        noise_M = torch.tensor([m.noise for m in measurements], dtype=torch.float64)
        self._level = float(target_M.mean())
        covariance = self._kernel(self._known, self._known)
        covariance += _OFFSET**2 * (self._samples_M[:, None] == self._samples_M[None])
        covariance += torch.diag(noise_M.square() + 1e-6)
        self._factor = torch.linalg.cholesky(covariance)
        self._weights = torch.cholesky_solve((target_M - self._level)[:, None], self._factor)[:, 0]

    def predict(self, sets: Sequence[Removed], sample: int | None = None) -> Tensor:
        """Expected log cost of each set, fp64 [S].

        Args:
            sets: any sets.
            sample: as it would be measured on this sample; by default as it is on average over samples.
        """
        features = self._features(sets)
        expected = self._expected(features) + self._level
        return expected + self._related(features, sample) @ self._weights if len(self._known) else expected

    def uncertainty(self, sets: Sequence[Removed], sample: int) -> Tensor:
        """Standard deviation of what `predict` says, fp64 [S].

        Args:
            sets: any sets.
            sample: as in `predict`.
        """
        features = self._features(sets)
        size = self._size if len(self._known) else max(1.0, float(features.sum(-1).mean()))
        alike_S = ((features @ self._near_UU) * features).sum(-1) / size
        variance_S = _UNITS**2 * alike_S + _PAIRS**2 * alike_S.square() + _OFFSET**2
        variance_S += (_NEIGHBOURS * self._neighbours(features) / size).square()
        if len(self._known):
            known_MS = self._related(features, sample).T
            variance_S -= torch.linalg.solve_triangular(self._factor, known_MS, upper=False).square().sum(0)
        return variance_S.clamp_min(0).sqrt()

    def _features(self, sets: Sequence[Removed]) -> Tensor:
        return features_of(sets, len(self._scores_U))

    def _expected(self, features: Tensor) -> Tensor:
        return (features @ self._scores_U).clamp_min(1e-12).log()

    def _kernel(self, one: Tensor, other: Tensor) -> Tensor:
        """Covariance of two lists of sets: units and neighbours (linear) and pairs (quadratic), of order 1."""
        alike = one @ self._near_UU @ other.T / self._size
        neighbours = torch.outer(self._neighbours(one), self._neighbours(other)) / self._size**2
        return _UNITS**2 * alike + _PAIRS**2 * alike.square() + _NEIGHBOURS**2 * neighbours

    def _neighbours(self, features: Tensor) -> Tensor:
        """How many units of each set have the next one of their kind in it as well."""
        return (features[:, : -self._per_block] * features[:, self._per_block :]).sum(-1)

    def _related(self, features: Tensor, sample: int | None) -> Tensor:
        """Covariance [S, M] of sets, on a sample, with what was measured."""
        return self._kernel(features, self._known) + _OFFSET**2 * (self._samples_M == sample)

    @property
    def _size(self) -> float:
        return max(1.0, float(self._known.sum(-1).mean()))


#: Blocks this far apart are alike to 1/e.
_REACH = 1.0
#: Standard deviations, in nats of log cost: of what units add, of what their pairs add, of what it adds that all of a
#: set are neighbours, and of a sample's offset.
_UNITS, _PAIRS, _NEIGHBOURS, _OFFSET = 0.5, 0.5, 1.0, 0.3

"""What folding leaves of a set beside what a search says of it: a regression of the difference.

A search fits on few tokens, less than folding fits, and looks at few windows. What it gets wrong by that is much the
same for all sets that have the same blocks, so that a few sets, measured both ways, say how to read all others. Two
measures, a cheap one that is off and a dear one that is not, joined by a regression of what is between them: the
autoregressive model of Kennedy and O'Hagan (2000), https://doi.org/10.1093/biomet/87.1.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foldgpt.selection.gating.surrogate import features_of, nearness
from foldgpt.selection.units import Removed

#: Blocks this far apart are alike to 1/e. What a correction may reach depends on the depth of its cut more smoothly
#: than what a block is worth.
_REACH = 3.0
#: Standard deviations of a difference in log cost: of what the units of a set add, of what all sets share, and of what
#: is left. By hand; by 41 sets of SmolLM2-135M a smoother, smaller and noisier difference is likelier, about which
#: less would be looked for (docs/lab-notebook.md).
_UNITS, _OFFSET, _NOISE = 0.15, 0.1, 0.02


class Discrepancy:
    """Predicts the difference between two measures of sets, from sets of which both are known.

    Shape suffixes: M sets of which it is known, S other sets, U units.

    Args:
        num_units: units that there are.
        per_block: units in a block.
        size: units in a set, about.
        scale: what the standard deviations are multiplied with: 1 for a cost that is 0 where nothing is removed.
    """

    def __init__(self, num_units: int, per_block: int, size: float, scale: float = 1.0) -> None:
        self._num_units = num_units
        self._near_UU = nearness(num_units, per_block, _REACH)
        self._size = size
        self._scale = scale
        self._known = torch.zeros(0, num_units, dtype=torch.float64)
        self._factor = torch.zeros(0, 0, dtype=torch.float64)
        self._weights = torch.zeros(0, dtype=torch.float64)

    def fit(self, differences: Mapping[Removed, float]) -> None:
        """Fit to all that is known.

        Args:
            differences: set → the dear measure's log cost less the cheap one's.
        """
        self._known = features_of(list(differences), self._num_units)
        covariance = self._kernel(self._known, self._known)
        covariance += (self._scale * _NOISE) ** 2 * torch.eye(len(differences), dtype=torch.float64)
        self._factor = torch.linalg.cholesky(covariance)
        target_M = torch.tensor(list(differences.values()), dtype=torch.float64)
        self._weights = torch.cholesky_solve(target_M[:, None], self._factor)[:, 0]

    def predict(self, sets: Sequence[Removed]) -> tuple[Tensor, Tensor]:
        """Expected difference of each set, and its standard deviation, both fp64 [S].

        Args:
            sets: any sets.
        """
        features = features_of(sets, self._num_units)
        related_SM = self._kernel(features, self._known)
        variance_S = (self._scale * _UNITS) ** 2 / self._size * ((features @ self._near_UU) * features).sum(-1)
        variance_S += (self._scale * _OFFSET) ** 2
        variance_S -= torch.linalg.solve_triangular(self._factor, related_SM.T, upper=False).square().sum(0)
        return related_SM @ self._weights, variance_S.clamp_min(0).sqrt()

    def _kernel(self, one: Tensor, other: Tensor) -> Tensor:
        units = _UNITS**2 / self._size * (one @ self._near_UU @ other.T)
        return self._scale**2 * (units + _OFFSET**2)

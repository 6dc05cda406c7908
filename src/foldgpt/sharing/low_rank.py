"""Low-rank terms: the best approximation of what a shared layer misses, and how ranks are spread over a budget."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from foldgpt.folding.fitted import LowRank

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spectrum:
    """What a matrix D [O, I] does to inputs with second moments C, taken apart by importance.

    Truncated at rank r, U_r U_rᵀ D is the matrix of rank r that makes the smallest mean squared error of the outputs,
    tr((D − U D') C (D − U D')ᵀ), where U holds the leading eigenvectors of D C Dᵀ (the activation-aware SVD of
    ASVD and SVD-LLM, without the inverse of a root of C).

    Attributes:
        energies_K: mean squared output that each further rank accounts for, falling, fp64 [min(O, I)].
        directions_OK: U, fp64.
        matrix_OI: D, fp64.
    """

    energies_K: Tensor
    directions_OK: Tensor
    matrix_OI: Tensor

    def truncated(self, rank: int) -> LowRank:
        """The best term of a rank, fp32."""
        up_OR = self.directions_OK[:, :rank]
        return LowRank(up_OR.float().contiguous(), (up_OR.T @ self.matrix_OI).float())


@torch.no_grad()
def spectrum(matrix_OI: Tensor, second_II: Tensor) -> Spectrum:
    """Take a matrix apart in the metric of its inputs, in fp64.

    Args:
        matrix_OI: D.
        second_II: C, symmetric and positive semi-definite.
    """
    matrix, second = matrix_OI.double(), second_II.double()
    outputs, inputs = matrix.shape
    if outputs <= inputs:
        energies, directions = torch.linalg.eigh(matrix @ second @ matrix.T)
    else:
        # The same through the smaller side: with C = R Rᵀ, D R has the singular vectors that are wanted.
        root = _root(second)
        half = matrix @ root
        energies, inner = torch.linalg.eigh(half.T @ half)
        # Below the rounding of the largest one energies are noise, and no direction is scaled up from it.
        least = (torch.finfo(torch.float64).eps * energies[-1]).clamp_min(torch.finfo(torch.float64).tiny)
        directions = half @ inner / energies.clamp_min(float(least)).sqrt()
    return Spectrum(energies.flip(0).clamp_min(0), directions.flip(1), matrix)


def _root(second_II: Tensor) -> Tensor:
    """R with R Rᵀ = C, also for a C that is singular."""
    values, vectors = torch.linalg.eigh(second_II)
    return vectors * values.clamp_min(0).sqrt()


def spread(energies: Mapping[Key, Tensor], prices: Mapping[Key, float], budget: float) -> dict[Key, int]:
    """Spread ranks over matrices so that the energy that a budget buys is as large as it can be.

    Energies fall with the rank, so buying, each time, the rank with the most energy for its price is best, up to the
    last one that still fits.

    Args:
        energies: matrix → what each further rank accounts for, falling [K].
        prices: matrix → price of one rank, in any unit.
        budget: what may be spent, in the same unit.

    Returns:
        Matrix → rank; 0 for those that get none.
    """
    ranks = dict.fromkeys(energies, 0)
    order = list(energies)
    queue = [(-float(energies[key][0]) / prices[key], place) for place, key in enumerate(order) if len(energies[key])]
    heapq.heapify(queue)
    left = budget
    while queue:
        gain, place = heapq.heappop(queue)
        key = order[place]
        if gain >= 0:
            break
        if prices[key] > left:
            continue  # its next ranks cost as much, so this matrix is done
        left -= prices[key]
        ranks[key] += 1
        if ranks[key] < len(energies[key]):
            heapq.heappush(queue, (-float(energies[key][ranks[key]]) / prices[key], place))
    return ranks

"""Ridge regression from sums that are collected chunk by chunk: R ≈ M D with ‖D‖ kept small."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

#: Rows multiplied at a time: enough to keep the matrix product busy, few enough that rounding averages out.
_CHUNK_ROWS = 1024

#: Gram matrices wider than this (half a gigabyte, and several of them are held) are kept off accelerators.
WIDEST_ON_DEVICE = 8192

Solution = TypeVar("Solution")


@dataclass(frozen=True)
class Sums:
    """All that least squares needs to know of some rows, in fp64; where the rows are, unless it is wide.

    Attributes:
        gram_KK: MᵀWM.
        cross_KH: MᵀWR.
        square: Σ w ‖r‖².
        mean_K: Σ w m.
        mean_H: Σ w r.
        weight: Σ w.
        count: rows of weight above 0.
    """

    gram_KK: Tensor
    cross_KH: Tensor
    square: float
    mean_K: Tensor
    mean_H: Tensor
    weight: float
    count: int

    @classmethod
    def of(cls, inputs_RK: Tensor, wanted_RH: Tensor, weight_R: Tensor) -> Self:
        """Sum over rows. Products are fp32 (or bf16 for states in bf16), their sums over chunks fp64.

        Args:
            inputs_RK: M.
            wanted_RH: R, fp32.
            weight_R: w ≥ 0; rows of weight 0 are skipped altogether.
        """
        used = weight_R.nonzero()[:, 0]
        width, height = inputs_RK.shape[1], wanted_RH.shape[1]
        device = inputs_RK.device if width <= WIDEST_ON_DEVICE else torch.device("cpu")
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        gram, cross, mean_K, mean_H = zeros(width, width), zeros(width, height), zeros(width), zeros(height)
        square = zeros(())
        # States in bf16 are multiplied in bf16, 2.5 times as fast; the products of each chunk are rounded.
        dtype = torch.bfloat16 if inputs_RK.dtype == torch.bfloat16 else torch.float32
        for rows in used.split(_CHUNK_ROWS):
            root_R1 = weight_R[rows].float().sqrt()[:, None]
            inputs, wanted = inputs_RK[rows].float() * root_R1, wanted_RH[rows].float() * root_R1
            square += wanted.square().sum().to(device)
            mean_K += (inputs.T @ root_R1)[:, 0].to(device)
            mean_H += (wanted.T @ root_R1)[:, 0].to(device)
            factor = inputs.to(dtype)
            gram += (factor.T @ factor).to(device)
            cross += (factor.T @ wanted.to(dtype)).to(device)
        return cls(gram, cross, float(square), mean_K, mean_H, float(weight_R.sum()), len(used))

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram_KK + other.gram_KK,
            self.cross_KH + other.cross_KH,
            self.square + other.square,
            self.mean_K + other.mean_K,
            self.mean_H + other.mean_H,
            self.weight + other.weight,
            self.count + other.count,
        )

    def error(self, map_KH: Tensor, bias_H: Tensor | None = None) -> float:
        """‖R − M D − b‖² / ‖R‖² for these rows."""
        if self.square == 0:
            return 0.0
        total = self.square + float((map_KH * (self.gram_KK @ map_KH - 2 * self.cross_KH)).sum())
        if bias_H is not None:
            total += self.weight * float(bias_H.square().sum())
            total -= 2 * float(bias_H @ (self.mean_H - self.mean_K @ map_KH))
        return max(total, 0.0) / self.square


def added(parts: Sequence[Sums]) -> Sums:
    """The sums of all rows together; at least one part."""
    return functools.reduce(Sums.__add__, parts)


def solve(sums: Sums, ridge: float, *, bias: bool) -> tuple[Tensor, Tensor | None]:
    """The D (and b) that minimise Σ w ‖r − m D − b‖² + ridge · mean diagonal of the Gram matrix · ‖D‖².

    Args:
        sums: the rows.
        ridge: ≥ 0. With 0, or too little of it, for a singular Gram matrix it is raised until a solution exists.
        bias: whether there is a b; it is not penalised.

    Returns:
        D [K, H] and b [H] (or None), fp64. D is 0 where the rows are, or are not finite.
    """
    gram, cross = sums.gram_KK, sums.cross_KH
    if bias and sums.weight > 0:
        gram = gram - torch.outer(sums.mean_K, sums.mean_K) / sums.weight
        cross = cross - torch.outer(sums.mean_K, sums.mean_H) / sums.weight
    size = float(gram.diagonal().mean())
    # No ridge would make what is not finite positive definite.
    solvable = size > 0 and bool(gram.isfinite().all()) and bool(cross.isfinite().all())
    found = _solve_ridged(gram, cross, ridge * size, 1e-10 * size) if solvable else torch.zeros_like(cross)
    if not bias or sums.weight == 0:
        return found, None
    b_H = (sums.mean_H - sums.mean_K @ found) / sums.weight
    return found, b_H if bool(b_H.isfinite().all()) else torch.zeros_like(b_H)


def _solve_ridged(gram_KK: Tensor, cross_KH: Tensor, ridge: float, least: float) -> Tensor:
    while True:
        ridged = gram_KK.clone()
        ridged.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if not failed:
            return torch.cholesky_solve(cross_KH, factor)
        # Not positive definite to working precision. This ends: a ridge of the matrix's own size always is.
        ridge = max(10 * ridge, least)


def best_ridge(
    fitted: Sums, held_out: Sums, ridges: Sequence[float], *, bias: bool
) -> tuple[float, tuple[Tensor, Tensor | None]]:
    """The ridge whose solution on `fitted` is nearest on `held_out`, and that solution.

    Args:
        fitted: the rows that are fitted on.
        held_out: the rows that are judged on.
        ridges: in ascending order.
        bias: as in `solve`.
    """

    def tried(ridge: float) -> tuple[float, tuple[Tensor, Tensor | None]]:
        solution = solve(fitted, ridge, bias=bias)
        return held_out.error(*solution), solution

    ridge, _, solution = downhill(ridges, tried)
    return ridge, solution


def downhill(
    ridges: Sequence[float], tried: Callable[[float], tuple[float, Solution]]
) -> tuple[float, float, Solution]:
    """The best of some ridges, its error and its solution.

    The held-out error falls and then rises with the ridge, so it is followed downhill from the middle instead of
    trying all.

    Args:
        ridges: in ascending order.
        tried: error and solution of one.
    """
    found: dict[int, tuple[float, Solution]] = {}

    def error(index: int) -> float:
        if not 0 <= index < len(ridges):
            return math.inf
        if index not in found:
            found[index] = tried(ridges[index])
        return found[index][0]

    best = len(ridges) // 2
    for step in (-1, 1):
        while error(best + step) < error(best):
            best += step
    return ridges[best], *found[best]

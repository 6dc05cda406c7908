"""The private terms of the layer that makes a sublayer's output: a scale and a low-rank map, by least squares.

At a member's position the shared layer makes u₀ = W d + b of its inputs d, and what reaches the stream should be c.
The position may scale the channels and add a low-rank map of d: u = s ∘ u₀ + U D d. Where a norm stands between the
layer and the stream, its private weight takes the place of the scale: the contribution is t ∘ u / rms(u) with
u = u₀ + U D d. Scales are fitted first, then the map to what they leave, then the scales once more, each in closed
form. The map of rank r is reduced-rank regression: of the full ridge solution B, that part whose outputs carry most of
the fit (Izenman 1975; the leading eigenvectors of Bᵀ(G + ρ)B, G the Gram matrix of the inputs).

Scales are drawn to what they begin with, 1 in a group that shares from the start and 0 in one that starts at zero, and
the map to nothing; how strongly, the last quarter of the windows decides, and whether each is of use at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldgpt.compensation.least_squares import Sums, solve
from foldgpt.compensation.scales import away_from_zero, best_scales
from foldgpt.families.norms import rms_normed
from foldgpt.folding.fitted import LowRank

#: Ridges that are tried, as multiples of the mean diagonal of the Gram matrix.
RIDGES = (1e-2, 1e-1, 1.0, 10.0)

#: Share of the micro-batches that the ridge is chosen on.
_CHOOSING = 0.25


def first_that_chooses(num_batches: int) -> int:
    """Number of the first micro-batch that is not fitted on but chooses the ridge; of two or more one at least does."""
    return max(1, min(num_batches - 1, round(num_batches * (1 - _CHOOSING))))


@dataclass(frozen=True)
class Wanted:
    """What a fit is asked for: rows of inputs, of the shared layer's outputs, and of the contributions wanted.

    Attributes:
        inputs_RK: d, in the model's dtype.
        shared_RH: u₀, fp32.
        contribution_RH: c, fp32.
        weight_R: weight of each row, fp32.
        multiplier: what the output is multiplied by on its way to the stream.
        epsilon: that of the norm on the way, or None if there is none.
        start_H: scales to begin with and to be drawn to, fp32; those of the norm if there is one.
    """

    inputs_RK: Tensor
    shared_RH: Tensor
    contribution_RH: Tensor
    weight_R: Tensor
    multiplier: float
    epsilon: float | None
    start_H: Tensor

    def rows(self, rows: slice) -> Wanted:
        """The same of some rows."""
        return Wanted(
            self.inputs_RK[rows],
            self.shared_RH[rows],
            self.contribution_RH[rows],
            self.weight_R[rows],
            self.multiplier,
            self.epsilon,
            self.start_H,
        )


@dataclass(frozen=True)
class OutputFit:
    """The private terms of one output layer at one position.

    Attributes:
        scale_H: s, or t where a norm stands behind, fp32.
        low_rank: U D, or None for rank 0.
        before: Σ w ‖c − contribution‖² / Σ w ‖c‖² with the scales to begin with, on held-out rows.
        after: with the fit.
    """

    scale_H: Tensor
    low_rank: LowRank | None
    before: float
    after: float

    def contribution(self, wanted: Wanted) -> Tensor:
        """What the position adds to the stream with this fit, fp32 [R, H]."""
        term = 0.0 if self.low_rank is None else _product(wanted.inputs_RK, self.low_rank)
        if wanted.epsilon is None:
            return wanted.multiplier * (self.scale_H * wanted.shared_RH + term)
        return self.scale_H * rms_normed(wanted.shared_RH + term, wanted.epsilon)


@torch.no_grad()
def fit_output(wanted: Wanted, *, rank: int, scales: bool, first_held: int) -> OutputFit:
    """Fit scale and low-rank map; the ridges are the best on the rows from `first_held` on, then all rows are used.

    Args:
        wanted: the rows.
        rank: of the low-rank map; 0 for none.
        scales: whether scales may change.
        first_held: rows before it are fitted on to choose the ridges.
    """
    fitted, held = wanted.rows(slice(0, first_held)), wanted.rows(slice(first_held, None))
    start = OutputFit(wanted.start_H, None, 1.0, 1.0)
    before = best_error = _relative_error(start, held)
    scale_ridge = map_ridge = None
    scale_H, final_H = wanted.start_H, wanted.start_H
    if scales:
        tried = []
        for ridge in RIDGES:
            found_H = _best_scale(fitted, None, ridge)
            tried.append((_relative_error(OutputFit(found_H, None, 1.0, 1.0), held), ridge, found_H))
        error, ridge, found_H = min(tried, key=lambda entry: entry[0])
        if error < best_error:
            best_error, scale_ridge, scale_H = error, ridge, found_H
            final_H = _best_scale(wanted, None, ridge)
    low_rank = None
    if rank:
        regression = _Regression(fitted, scale_H)
        errors = []
        for ridge in RIDGES:
            term = regression.map(rank, ridge)
            refined_H = scale_H if scale_ridge is None else _best_scale(fitted, term, scale_ridge)
            errors.append((_relative_error(OutputFit(refined_H, term, 1.0, 1.0), held), ridge))
        error, ridge = min(errors)
        if error < best_error:
            best_error, map_ridge = error, ridge
    if map_ridge is not None:
        low_rank = _Regression(wanted, final_H).map(rank, map_ridge)
        if scale_ridge is not None:
            final_H = _best_scale(wanted, low_rank, scale_ridge)
    return OutputFit(final_H, low_rank, before, best_error)


def _best_scale(wanted: Wanted, low_rank: LowRank | None, ridge: float) -> Tensor:
    """Each channel's scale with the map held fixed, drawn to where it begins."""
    term = 0.0 if low_rank is None else _product(wanted.inputs_RK, low_rank)
    if wanted.epsilon is None:
        unscaled, aim = wanted.shared_RH, wanted.contribution_RH / wanted.multiplier - term
    else:
        unscaled, aim = rms_normed(wanted.shared_RH + term, wanted.epsilon), wanted.contribution_RH
    return best_scales(unscaled, aim, wanted.weight_R, ridge, wanted.start_H)


class _Regression:
    """Reduced-rank regression of what given scales leave; behind a norm, at the present root mean square."""

    def __init__(self, wanted: Wanted, scale_H: Tensor) -> None:
        if wanted.epsilon is None:
            self.outer_H = torch.full_like(scale_H, wanted.multiplier)
            inputs, left = wanted.inputs_RK, wanted.contribution_RH - wanted.multiplier * scale_H * wanted.shared_RH
        else:
            inverse_R1 = torch.rsqrt(wanted.shared_RH.square().mean(-1, keepdim=True) + wanted.epsilon)
            self.outer_H = away_from_zero(scale_H)
            inputs = (wanted.inputs_RK * inverse_R1).to(wanted.inputs_RK.dtype)
            left = wanted.contribution_RH - self.outer_H * wanted.shared_RH * inverse_R1
        self.sums = Sums.of(inputs, left, wanted.weight_R)

    def map(self, rank: int, ridge: float) -> LowRank:
        """The best map of a rank."""
        full_KH, _ = solve(self.sums, ridge, bias=False)
        _, vectors = torch.linalg.eigh(self.sums.cross_KH.T @ full_KH)
        leading_HR = vectors[:, -rank:]
        down_RK = (full_KH @ leading_HR).T.float().contiguous()
        up_HR = (leading_HR / self.outer_H[:, None].to(leading_HR)).float()
        return LowRank(up_HR.to(self.outer_H.device), down_RK.to(self.outer_H.device))


def _relative_error(fit: OutputFit, wanted: Wanted) -> float:
    missing = (wanted.contribution_RH - fit.contribution(wanted)).square().sum(-1) * wanted.weight_R
    whole = wanted.contribution_RH.square().sum(-1) * wanted.weight_R
    return float(missing.double().sum() / whole.double().sum().clamp_min(1e-30))


def _product(inputs_RK: Tensor, low_rank: LowRank) -> Tensor:
    """U D d in the dtype of the inputs, as the folded model computes it; fp32 [R, H]."""
    down, up = low_rank.down_RI.to(inputs_RK.dtype), low_rank.up_OR.to(inputs_RK.dtype)
    return (inputs_RK @ down.T @ up.T).to(torch.promote_types(inputs_RK.dtype, torch.float32))

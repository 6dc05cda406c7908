"""The fit where an RMSNorm stands between the output matrix and the stream: alternating least squares.

The block adds c = s ∘ u / rms(u) to the stream, with u what the output matrix gives and s the norm's scales. A map on
c cannot be merged, but u may become u + u D and s may change: c' = s' ∘ u' / rms(u'). With rms(u') held fixed that is
linear in D, with D held fixed it is linear in s', and each is one least-squares problem; the two are solved in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldgpt.compensation.least_squares import Sums, solve

#: Scales smaller than this, relative to their root mean square, are not divided by.
_LEAST_SCALE = 0.05


@dataclass(frozen=True)
class NormedFit:
    """What a fit through a norm gives.

    Attributes:
        map_HH: D, fp32.
        scale_H: s', fp32.
    """

    map_HH: Tensor
    scale_H: Tensor

    def contribution(self, inputs_RH: Tensor, epsilon: float) -> Tensor:
        """c' for rows u, fp32 [R, H]."""
        rows = inputs_RH.float()
        return self.scale_H * normed(rows + rows @ self.map_HH, epsilon)


def normed(rows_RH: Tensor, epsilon: float) -> Tensor:
    """Rows divided by their root mean square."""
    return rows_RH * torch.rsqrt(rows_RH.square().mean(-1, keepdim=True) + epsilon)


def fit_through_norm(
    inputs_RH: Tensor,
    wanted_RH: Tensor,
    weight_R: Tensor,
    scale_H: Tensor,
    epsilon: float,
    *,
    ridge: float,
    rounds: int,
) -> NormedFit:
    """Fit D and s' so that c' comes near what is wanted; the best of all rounds is returned.

    Args:
        inputs_RH: u, what goes into the norm.
        wanted_RH: the contribution that is wanted, fp32.
        weight_R: each row's weight.
        scale_H: the norm's present scales.
        epsilon: the norm's epsilon.
        ridge: as in `solve`.
        rounds: how often D and s' are refitted; 0 refits s' only.
    """
    used = weight_R.nonzero()[:, 0]
    rows, wanted, weight = inputs_RH[used].float(), wanted_RH[used], weight_R[used]
    fit = NormedFit(torch.zeros(rows.shape[1], rows.shape[1]).to(rows), scale_H)
    best, best_error = fit, error_of(fit, rows, wanted, weight, epsilon)
    fit = _with_best_scales(fit, rows, wanted, weight, epsilon, ridge, scale_H)
    for number in range(rounds + 1):
        error = error_of(fit, rows, wanted, weight, epsilon)
        if error < best_error:
            best, best_error = fit, error
        if number == rounds:
            break
        mapped = rows + rows @ fit.map_HH
        divided = rows * torch.rsqrt(mapped.square().mean(-1, keepdim=True) + epsilon)
        least = _LEAST_SCALE * fit.scale_H.square().mean().sqrt()
        scale = torch.where(fit.scale_H.abs() < least, least.copysign(fit.scale_H), fit.scale_H)
        change, _ = solve(Sums.of(divided, wanted - scale * divided, weight), ridge, bias=False)
        fit = NormedFit(change.to(rows) / scale, fit.scale_H)
        fit = _with_best_scales(fit, rows, wanted, weight, epsilon, ridge, scale_H)
    return best


def error_of(fit: NormedFit, inputs_RH: Tensor, wanted_RH: Tensor, weight_R: Tensor, epsilon: float) -> float:
    """Σ w ‖wanted − c'‖²."""
    missed_R = (wanted_RH - fit.contribution(inputs_RH, epsilon)).square().sum(-1)
    return float((missed_R * weight_R).double().sum())


def _with_best_scales(
    fit: NormedFit, rows: Tensor, wanted: Tensor, weight: Tensor, epsilon: float, ridge: float, own_H: Tensor
) -> NormedFit:
    """Each channel's scale by least squares, drawn to the norm's own one by the ridge."""
    unscaled = normed(rows + rows @ fit.map_HH, epsilon)
    weighted = unscaled * weight[:, None]
    square_H, cross_H = (weighted * unscaled).sum(0), (weighted * wanted).sum(0)
    penalty = ridge * square_H.mean()
    return NormedFit(fit.map_HH, (cross_H + penalty * own_H) / (square_H + penalty))

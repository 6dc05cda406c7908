"""The fit where an RMSNorm stands between the output matrix and the stream: alternating least squares.

The block adds c = s ∘ u / rms(u) to the stream, with u what the output matrix gives and s the norm's scales. A map on
c cannot be merged, but u may become u + X D and s may change: c' = s' ∘ u' / rms(u'). With rms(u') held fixed that is
linear in D, with D held fixed it is linear in s', and each is one least-squares problem; the two are solved in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldgpt.compensation.least_squares import Sums, solve
from foldgpt.compensation.scales import away_from_zero, best_scales
from foldgpt.families.norms import rms_normed

#: Divided at a time, in fp32.
_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class NormedFit:
    """What a fit through a norm gives.

    Attributes:
        map_KH: D, fp32.
        scale_H: s', fp32.
    """

    map_KH: Tensor
    scale_H: Tensor

    def contribution(self, inputs_RH: Tensor, features_RK: Tensor, epsilon: float) -> Tensor:
        """c' for rows u and X, fp32 [R, H]."""
        return self.scale_H * rms_normed(self.mapped(inputs_RH, features_RK), epsilon)

    def mapped(self, inputs_RH: Tensor, features_RK: Tensor) -> Tensor:
        """u + X D, fp32 [R, H]."""
        return inputs_RH.float() + (features_RK @ self.map_KH.to(features_RK.dtype)).float()


def fit_through_norm(
    inputs_RH: Tensor,
    features_RK: Tensor,
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
        features_RK: X, what the map is applied to.
        wanted_RH: the contribution that is wanted, fp32.
        weight_R: each row's weight.
        scale_H: the norm's present scales.
        epsilon: the norm's epsilon.
        ridge: as in `solve`.
        rounds: how often D and s' are refitted; 0 refits s' only.
    """
    used = weight_R.nonzero()[:, 0]
    rows, features, wanted, weight = inputs_RH[used].float(), features_RK[used], wanted_RH[used], weight_R[used]
    fit = NormedFit(torch.zeros(features.shape[1], rows.shape[1]).to(rows), scale_H)
    best, best_error = fit, _error(fit.scale_H * rms_normed(rows, epsilon), wanted, weight)
    mapped = rows
    for number in range(rounds + 1):
        if number:
            inverse_R1 = torch.rsqrt(mapped.square().mean(-1, keepdim=True) + epsilon)
            scale = away_from_zero(fit.scale_H)
            # A nearly silent MLP's activations times the inverse of its norm are more than float16 holds.
            divided = torch.empty_like(features, dtype=torch.float32 if features.dtype == torch.float16 else None)
            for part in torch.arange(len(features), device=features.device).split(_ROWS_AT_A_TIME):
                divided[part] = (features[part] * inverse_R1[part]).to(divided.dtype)
            change, _ = solve(Sums.of(divided, wanted - scale * rows * inverse_R1, weight), ridge, bias=False)
            fit = NormedFit(change.to(rows) / scale, fit.scale_H)
            mapped = fit.mapped(rows, features)
        unscaled = rms_normed(mapped, epsilon)
        fit = NormedFit(fit.map_KH, best_scales(unscaled, wanted, weight, ridge, scale_H))
        error = _error(fit.scale_H * unscaled, wanted, weight)
        if error < best_error:
            best, best_error = fit, error
    return best


def _error(contribution_RH: Tensor, wanted_RH: Tensor, weight_R: Tensor) -> float:
    """Σ w ‖wanted − c'‖²."""
    return float(((wanted_RH - contribution_RH).square().sum(-1) * weight_R).double().sum())


def error_of(
    fit: NormedFit, inputs_RH: Tensor, features_RK: Tensor, wanted_RH: Tensor, weight_R: Tensor, epsilon: float
) -> float:
    """Σ w ‖wanted − c'‖² of a fit on any rows."""
    return _error(fit.contribution(inputs_RH, features_RK, epsilon), wanted_RH, weight_R)

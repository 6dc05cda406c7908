"""Shared weights in the metric of the members' inputs: least squares, and the errors that tell members apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foldgpt.sharing.covariance import Moments

#: Ridge of least squares, as a multiple of the mean diagonal of ΣC.
_RIDGE = 1e-4


@torch.no_grad()
def least_squares(weights: Sequence[Tensor], seconds: Sequence[Tensor]) -> Tensor:
    """The W that minimises Σ_m tr((W − W_m) C_m (W − W_m)ᵀ) + ridge ‖W − mean‖², fp64 [O, I].

    That is W = (Σ W_m C_m + ρ W̄) (Σ C_m + ρ)⁻¹, the mean of the members where each direction of the inputs counts as
    much as it occurs (Jin et al. 2023, RegMean, arXiv 2212.09849). The ridge draws to the plain mean, so directions
    that do not occur get that.

    Args:
        weights: W_m, [O, I] each.
        seconds: C_m, [I, I] each.
    """
    total = torch.stack([second.double() for second in seconds]).sum(0)
    mean = torch.stack([weight.double() for weight in weights]).mean(0)
    # Solved for the difference from the mean, whose rounding errors are smaller.
    wanted = torch.zeros_like(mean)
    for weight, second in zip(weights, seconds, strict=True):
        wanted += (weight.double() - mean) @ second.double()
    ridge = max(_RIDGE * float(total.diagonal().mean()), torch.finfo(torch.float64).tiny)
    total.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(total)
    change = torch.linalg.solve(total, wanted.T) if failed else torch.cholesky_solve(wanted.T, factor)
    return mean + change.T


def relative_error(weight_OI: Tensor, own_OI: Tensor, moments: Moments) -> float:
    """tr((W − W_m) C_m (W − W_m)ᵀ) / tr(W_m C_m W_mᵀ): mean squared error of the outputs over their mean square."""
    own = own_OI.to(moments.second_KK)
    return moments.error(weight_OI.to(own) - own) / max(moments.error(own), 1e-30)

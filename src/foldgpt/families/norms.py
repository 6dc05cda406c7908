"""The norm behind a sublayer, as what it is: a division by the root mean square and one scale per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldgpt.errors import UnsupportedModelError


def epsilon_of(norm: nn.Module) -> float:
    """The norm's epsilon."""
    for name in ("eps", "variance_epsilon"):
        if isinstance(value := getattr(norm, name, None), float):
            return value
    raise UnsupportedModelError(f"foldgpt does not know the epsilon of a {type(norm).__name__}")


@torch.no_grad()
def effective_scale(norm: nn.Module) -> Tensor:
    """What the normalised values are multiplied by, fp32 [H]: the weight, or for Gemma 1 + the weight.

    Raises:
        UnsupportedModelError: the module is not an RMSNorm of either kind.
    """
    weight = norm.weight
    assert isinstance(weight, nn.Parameter)
    generator = torch.Generator().manual_seed(0)
    probe_RH = torch.randn((4, len(weight)), generator=generator).to(weight.device)
    normed_RH = rms_normed(probe_RH, epsilon_of(norm))
    output_RH = norm(probe_RH).float()
    for scale_H in (weight.float(), 1 + weight.float()):
        if torch.allclose(output_RH, normed_RH * scale_H, rtol=1e-3, atol=1e-3):
            return scale_H
    raise UnsupportedModelError(f"a {type(norm).__name__} behind a sublayer is not a kind that foldgpt can correct")


@torch.no_grad()
def weight_for(norm: nn.Module, scale_H: Tensor) -> Tensor:
    """The weight under which the norm has the given scales, in the weight's dtype."""
    weight = norm.weight
    assert isinstance(weight, nn.Parameter)
    offset_H = (effective_scale(norm) - weight.float()).round()
    return (scale_H.to(weight.device) - offset_H).to(weight.dtype)


def rms_normed(rows_RH: Tensor, epsilon: float) -> Tensor:
    """Rows divided by their root mean square."""
    return rows_RH * torch.rsqrt(rows_RH.square().mean(-1, keepdim=True) + epsilon)

"""Scales of channels by least squares, and how they are divided by."""

from __future__ import annotations

import torch
from torch import Tensor

#: Scales smaller than this, relative to their root mean square, are not divided by.
_LEAST = 0.05


def best_scales(unscaled_RH: Tensor, wanted_RH: Tensor, weight_R: Tensor, ridge: float, own_H: Tensor) -> Tensor:
    """Each channel's scale, so that scale ∘ unscaled comes near what is wanted, fp32 [H].

    Args:
        unscaled_RH: what is scaled.
        wanted_RH: what it should become.
        weight_R: each row's weight.
        ridge: multiple of the mean of the channels' squares with which scales are drawn to `own_H`.
        own_H: the scales there are.
    """
    weighted = unscaled_RH * weight_R[:, None]
    square_H, cross_H = (weighted * unscaled_RH).sum(0), (weighted * wanted_RH).sum(0)
    penalty = ridge * square_H.mean()
    return (cross_H + penalty * own_H) / (square_H + penalty).clamp_min(1e-30)


def away_from_zero(scale_H: Tensor) -> Tensor:
    """Scales that can be divided by: small ones grow, with their sign."""
    least = (_LEAST * scale_H.square().mean().sqrt()).clamp_min(1e-6)
    return torch.where(scale_H.abs() < least, least.copysign(scale_H), scale_H)

"""What a correction is: a linear map on what a sublayer's output matrix is given, or puts out, and how well it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foldgpt.plan import Sublayer


@dataclass(frozen=True)
class CutReport:
    """How well one correction fits.

    Errors are means over tokens of ‖L − stream‖² / ‖L‖², with L the source's state, on tokens without those left out.

    Attributes:
        tokens: tokens fitted on, held-out ones included.
        left_out: tokens left out because of their extreme norm.
        ridge: the ridge, as a multiple of the mean diagonal of the Gram matrix.
        before: error of the stream where the fit began, uncorrected unless it had a start, on the held-out tokens.
        after: error on the held-out tokens of a map that was fitted on the others only.
        fitted: error of that map on the tokens it was fitted on; far below `after`, there were too few.
    """

    tokens: int
    left_out: int
    ridge: float
    before: float
    after: float
    fitted: float


@dataclass(frozen=True)
class Correction:
    """A change of one kept block that makes up for what was removed behind it.

    The sublayer's output M becomes M + X D + b, by a change of the matrix that makes M from its inputs d. X is d, or M
    itself where there is more than one such matrix. Where a norm stands between M and the residual stream, it gets new
    scales as well.

    Attributes:
        block: source index of the block that carries the correction.
        sublayer: which of its sublayers carries it.
        features: what X is: "inner" for d, [tokens, I], or "output" for M, [tokens, H].
        map_KH: D, fp32 [I, H] or [H, H].
        bias_H: b, fp32 [H]; None where the matrix has no bias.
        scale_H: the norm's new scales, fp32 [H], as multipliers (for Gemma: 1 + its weight); None without a norm.
        report: how well it fits.
    """

    block: int
    sublayer: Sublayer
    features: Literal["inner", "output"]
    map_KH: Tensor
    bias_H: Tensor | None
    scale_H: Tensor | None
    report: CutReport


@dataclass(frozen=True)
class Start:
    """A correction at which another fit of the same sublayer begins, fitted on other text.

    Attributes:
        correction: the correction; what it is fitted on may differ from what is fitted beyond it.
        features_RK: what its map is applied to, for all tokens in order.
    """

    correction: Correction
    features_RK: Tensor

    def change(self, dtype: torch.dtype) -> Tensor:
        """X D + b, what it adds to the sublayer's output, [tokens, H] in this dtype."""
        return changed_by(self.features_RK, self.correction.map_KH, self.correction.bias_H, dtype)


def changed_by(features_RK: Tensor, map_KH: Tensor, bias_H: Tensor | None, dtype: torch.dtype) -> Tensor:
    """X D + b in this dtype; the product in that of the states, as the merged model will make it."""
    change_RH = (features_RK @ map_KH.to(features_RK)).to(dtype)
    if bias_H is not None:
        change_RH += bias_H.to(change_RH)
    return change_RH

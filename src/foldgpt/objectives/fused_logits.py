"""Losses on logits, fused with the head: logits are made, compared, differentiated and dropped a few rows at a time.

The largest buffer is one chunk of rows × vocabulary. Nothing of that size lives until the backward pass, which
multiplies a gradient of [rows, H].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foldgpt.objectives.divergence import chunk_rows
from foldgpt.objectives.head import Head
from foldgpt.objectives.logit_losses import DivergenceLoss, cross_entropy_with_gradient
from foldgpt.objectives.reduced_predictions import ReducedPredictions

#: A teacher's predictions at some rows: its head and its hidden states after the final norm, [rows, its H]; or what is
#: left of them for a student with the same head.
Teaching = tuple[Head, Tensor] | ReducedPredictions


def fused_logit_losses(
    student_head: Head,
    student_RH: Tensor,
    targets_R: Tensor,
    *,
    teacher: Teaching | None = None,
    divergence: DivergenceLoss | None = None,
    divergence_weight: float = 1.0,
    lm_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of a divergence from the teacher and the language-modelling loss, summed over rows.

    The heads get no gradient.

    Args:
        student_head: the student's head.
        student_RH: the student's hidden states after the final norm, [rows, H].
        targets_R: the token that follows each row, int64 [rows].
        teacher: the teacher's predictions; those that are reduced have to be so at the temperature of the divergence,
            by a head that is the student's too, and are good for the forward divergence alone.
        divergence: how the two are compared; None leaves the teacher out.
        divergence_weight: its weight.
        lm_weight: weight of the language-modelling loss.

    Returns:
        The weighted sum, differentiable with respect to `student_RH`; and for the record, without gradient, the
        summed divergence (0 without one) and the summed language-modelling loss (0 if its weight is 0).
    """
    if divergence is not None and teacher is None:
        raise ValueError("a divergence needs the teacher's predictions")
    if divergence is not None and isinstance(teacher, ReducedPredictions):
        if divergence.kind != "forward":
            raise ValueError(f"the {divergence.kind} divergence cannot be told from reduced predictions")
        if divergence.temperature != teacher.temperature:
            raise ValueError(
                f"the predictions were reduced at temperature {teacher.temperature}, not {divergence.temperature}"
            )
    total, kl, lm = _Fused.apply(student_RH, student_head, targets_R, teacher, divergence, divergence_weight, lm_weight)
    return total, kl, lm


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_RH: Tensor,
        student_head: Head,
        targets_R: Tensor,
        teacher: Teaching | None,
        divergence: DivergenceLoss | None,
        divergence_weight: float,
        lm_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        # Sums over many rows, in fp64 so that the cut into chunks does not show.
        kl, lm = (torch.zeros((), dtype=torch.float64, device=student_RH.device) for _ in range(2))
        gradient_RH = torch.zeros_like(student_RH) if wants_gradient else None
        size = chunk_rows(student_head)
        for start in range(0, len(student_RH), size):
            rows = slice(start, start + size)
            hidden = student_RH[rows].detach().requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                logits = student_head.logits(hidden)
            with torch.no_grad():
                gradient: Tensor | None = None
                beside: Tensor | None = None
                if divergence is not None and teacher is not None:
                    values, gradient, beside = _compared(divergence, teacher, rows, logits.detach(), hidden.detach())
                    kl += values.sum(dtype=torch.float64)
                    gradient = gradient.mul_(divergence_weight) if divergence_weight != 1 else gradient
                if lm_weight:
                    values, lm_gradient = cross_entropy_with_gradient(logits.detach(), targets_R[rows])
                    lm += values.sum(dtype=torch.float64)
                    lm_gradient.mul_(lm_weight)
                    gradient = lm_gradient if gradient is None else gradient.add_(lm_gradient)
            if gradient_RH is not None and gradient is not None:
                (gradient_RH[rows],) = torch.autograd.grad(logits, hidden, gradient)
                if beside is not None:
                    gradient_RH[rows] += divergence_weight * beside
        ctx.save_for_backward(gradient_RH)
        ctx.mark_non_differentiable(kl, lm)
        return divergence_weight * kl + lm_weight * lm, kl, lm

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_RH,) = ctx.saved_tensors
        return (gradient_RH * grad_outputs[0].to(gradient_RH.dtype), *([None] * 6))


def _compared(
    divergence: DivergenceLoss, teacher: Teaching, rows: slice, student_RV: Tensor, student_RH: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values [rows], and their gradients by way of the logits [rows, V] and, if any, beside the head [rows, H]."""
    if isinstance(teacher, ReducedPredictions):
        return teacher[rows].kl_with_gradient(student_RV, student_RH)
    head, teacher_RH = teacher
    return *divergence(head.logits(teacher_RH[rows]), student_RV), None

"""Losses on logits, fused with the head: logits are made, compared, differentiated and dropped a few rows at a time.

The largest buffer is one chunk of rows × vocabulary. Nothing of that size lives until the backward pass, which
multiplies a gradient of [rows, H].
"""

from __future__ import annotations

from collections.abc import Callable
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
#: The same of one chunk of rows, with the head's products, [rows, V], in place of hidden states.
_Taught = tuple[Head, Tensor] | ReducedPredictions
#: `compare_products`, or what does the same.
Comparison = Callable[..., tuple[Tensor | float, Tensor | float, Tensor | None, Tensor | None]]


def compare_products(
    student_head: Head,
    student_RV: Tensor,
    student_RH: Tensor,
    targets_R: Tensor,
    teacher: _Taught | None,
    divergence: DivergenceLoss | None,
    divergence_weight: float,
    lm_weight: float,
) -> tuple[Tensor | float, Tensor | float, Tensor | None, Tensor | None]:
    """What is done with the products of one chunk of rows, all of it element by element or along a row.

    Args:
        student_head: the student's head.
        student_RV: its products, [rows, V].
        student_RH: what they are products of, [rows, H].
        targets_R: as in `fused_logit_losses`, like those below.
        teacher: the teacher's head and products, or its reduced predictions.
        divergence: how the two are compared.
        divergence_weight: its weight.
        lm_weight: weight of the language-modelling loss.

    Returns:
        The summed divergence and language-modelling loss, fp64; the gradient of their weighted sum by way of the
        products, [rows, V] in their format; and what there is of it beside the head, [rows, H].
    """
    logits_RV = student_head.finished(student_RV)
    kl: Tensor | float = 0.0
    lm: Tensor | float = 0.0
    gradient_RV: Tensor | None = None
    beside_RH: Tensor | None = None
    if divergence is not None and teacher is not None:
        if isinstance(teacher, ReducedPredictions):
            values_R, gradient_RV, beside_RH = teacher.kl_with_gradient(logits_RV, student_RH)
            beside_RH = divergence_weight * beside_RH
        else:
            head, teacher_RV = teacher
            values_R, gradient_RV = divergence(head.finished(teacher_RV), logits_RV)
        kl = values_R.sum(dtype=torch.float64)
        gradient_RV = gradient_RV.mul_(divergence_weight) if divergence_weight != 1 else gradient_RV
    if lm_weight:
        values_R, lm_gradient_RV = cross_entropy_with_gradient(logits_RV, targets_R)
        lm = values_R.sum(dtype=torch.float64)
        lm_gradient_RV.mul_(lm_weight)
        gradient_RV = lm_gradient_RV if gradient_RV is None else gradient_RV.add_(lm_gradient_RV)
    if gradient_RV is not None:
        gradient_RV = student_head.back_to_products(gradient_RV, logits_RV).to(student_RV.dtype)
    return kl, lm, gradient_RV, beside_RH


def fused_logit_losses(
    student_head: Head,
    student_RH: Tensor,
    targets_R: Tensor,
    *,
    teacher: Teaching | None = None,
    divergence: DivergenceLoss | None = None,
    divergence_weight: float = 1.0,
    lm_weight: float = 0.0,
    compare: Comparison = compare_products,
    rows: int | None = None,
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
        compare: `compare_products`, or what a compiler made of it.
        rows: how many are compared at once; by default as many as are whose logits fill one chunk in fp32.

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
    total, kl, lm = _Fused.apply(
        student_RH, student_head, targets_R, teacher, divergence, divergence_weight, lm_weight, compare, rows
    )
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
        compare: Comparison,
        num_rows: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        # Sums over many rows, in fp64 so that the cut into chunks does not show.
        kl, lm = (torch.zeros((), dtype=torch.float64, device=student_RH.device) for _ in range(2))
        gradient_RH = torch.zeros_like(student_RH) if wants_gradient else None
        size = num_rows or chunk_rows(student_head)
        for start in range(0, len(student_RH), size):
            rows = slice(start, start + size)
            hidden = student_RH[rows].detach().requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                product_RV = student_head.product(hidden)
            of_teacher: _Taught | None = None
            if divergence is not None and teacher is not None:
                if isinstance(teacher, ReducedPredictions):
                    of_teacher = teacher[rows]
                else:
                    of_teacher = teacher[0], teacher[0].product(teacher[1][rows])
            with torch.no_grad():
                kl_part, lm_part, gradient_RV, beside_RH = compare(
                    student_head,
                    product_RV.detach(),
                    hidden.detach(),
                    targets_R[rows],
                    of_teacher,
                    divergence,
                    divergence_weight,
                    lm_weight,
                )
                kl += kl_part
                lm += lm_part
            if gradient_RH is not None and gradient_RV is not None:
                (gradient_RH[rows],) = torch.autograd.grad(product_RV, hidden, gradient_RV)
                if beside_RH is not None:
                    gradient_RH[rows] += beside_RH
        ctx.save_for_backward(gradient_RH)
        ctx.mark_non_differentiable(kl, lm)
        return divergence_weight * kl + lm_weight * lm, kl, lm

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_RH,) = ctx.saved_tensors
        return (gradient_RH * grad_outputs[0].to(gradient_RH.dtype), *([None] * 8))

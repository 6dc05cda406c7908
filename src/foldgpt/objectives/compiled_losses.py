"""The losses between the products of the heads, written for a compiler.

`compare_products` goes through tables, each once, as is best where every operation reads and writes one. A compiler
makes loops along a row, and what counts there is how many of them there are and how many exponentials they take: here
three, for the largest logits, the sums and the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldgpt.objectives.fused_logits import Taught, compare_products
from foldgpt.objectives.head import Head
from foldgpt.objectives.logit_losses import DivergenceLoss

#: What the products of one chunk may take, in bytes: nothing else is as large. Products of more rows at once are
#: faster, since each reads the whole head.
PRODUCT_BYTES = 256 * 2**20


def compare_for_compiler(
    student_head: Head,
    student_RV: Tensor,
    student_RH: Tensor,
    targets_R: Tensor,
    teacher: Taught | None,
    divergence: DivergenceLoss | None,
    divergence_weight: float,
    lm_weight: float,
) -> tuple[Tensor | float, Tensor | float, Tensor | None, Tensor | None]:
    """As `compare_products`, which is also what does the rarer kinds: other divergences, and reduced predictions.

    With e the exponentials of logits z less their largest, KL(p ‖ q) = Σ p (z_p − z_q) − lse(z_p) + lse(z_q), and its
    gradient is q − p.
    """
    if divergence is not None and (divergence.kind != "forward" or not isinstance(teacher, tuple)):
        return compare_products(
            student_head, student_RV, student_RH, targets_R, teacher, divergence, divergence_weight, lm_weight
        )
    logits_RV = student_head.finished(student_RV)
    kl: Tensor | float = 0.0
    lm: Tensor | float = 0.0
    gradient_RV: Tensor | None = None
    if divergence is not None and isinstance(teacher, tuple):
        head, teacher_RV = teacher
        tau = divergence.temperature
        theirs_RV, ours_RV = head.finished(teacher_RV) / tau, logits_RV / tau
        p_RV, p_total, p_lse = _exponentials(theirs_RV)
        q_RV, q_total, q_lse = _exponentials(ours_RV)
        apart = (p_RV * (theirs_RV - ours_RV)).sum(-1, keepdim=True) / p_total
        kl = tau**2 * (apart - p_lse + q_lse).sum(dtype=torch.float64)
        gradient_RV = divergence_weight * tau * (q_RV / q_total - p_RV / p_total)
    if lm_weight:
        q_RV, q_total, q_lse = _exponentials(logits_RV)
        target_R1 = targets_R[:, None]
        lm = (q_lse - logits_RV.gather(-1, target_R1)).sum(dtype=torch.float64)
        is_target_RV = torch.arange(logits_RV.shape[-1], device=logits_RV.device) == target_R1
        lm_gradient_RV = lm_weight * (q_RV / q_total - is_target_RV.float())
        gradient_RV = lm_gradient_RV if gradient_RV is None else gradient_RV + lm_gradient_RV
    if gradient_RV is not None:
        gradient_RV = student_head.back_to_products(gradient_RV, logits_RV).to(student_RV.dtype)
    return kl, lm, gradient_RV, None


def product_rows(head: Head) -> int:
    """Rows whose products are compared at once: a power of two, which products of matrices like."""
    return 1 << max(0, (PRODUCT_BYTES // (head.itemsize * head.vocab_size)).bit_length() - 1)


def _exponentials(logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z − max z), their sum and logsumexp(z), the latter [rows, 1]."""
    largest_R1 = logits_RV.amax(-1, keepdim=True)
    exponentials_RV = (logits_RV - largest_R1).exp()
    total_R1 = exponentials_RV.sum(-1, keepdim=True)
    return exponentials_RV, total_R1, largest_R1 + total_R1.log()

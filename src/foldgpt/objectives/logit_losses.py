"""Losses on logits with their gradients written out, so that a few tables do where autograd would keep a dozen.

By themselves operations go through tables, each once. A compiler makes loops along a row, and what counts there is how
many of them there are and how many exponentials they take. So what is trained by most is written once more for it:
three loops, for the largest logits, the sums and the gradient.

Each loss takes the logits of a few rows and gives one value a row, in nats, and its gradient with respect to the
student's logits. With a temperature τ both models' logits are divided by τ and the loss is multiplied by τ², so that
the size of the gradient does not depend on τ (Hinton et al. 2015, arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["forward", "reverse", "skewed"]

#: Below this a probability counts as this much, where it is divided by.
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class DivergenceLoss:
    """How far the student's next-token distribution q is from the teacher's p.

    - "forward": KL(p ‖ q), which spreads over all that the teacher finds likely;
    - "reverse": KL(q ‖ p), which keeps to what the teacher finds likeliest (MiniLLM, Gu et al. 2024, arXiv 2306.08543);
    - "skewed": KL(p ‖ λ p + (1 − λ) q), of bounded gradient (DistiLLM, Ko et al. 2024, arXiv 2402.03898).

    Attributes:
        kind: one of the three.
        temperature: τ.
        skew: λ of the skewed form.
    """

    kind: Divergence = "forward"
    temperature: float = 1.0
    skew: float = 0.1

    def __call__(self, teacher_RV: Tensor, student_RV: Tensor) -> tuple[Tensor, Tensor]:
        """Values [rows] and gradients [rows, V], fp32, of logits [rows, V]."""
        tau = self.temperature
        if tau != 1:
            teacher_RV, student_RV = teacher_RV / tau, student_RV / tau
        if self.kind == "forward" and torch.compiler.is_compiling():
            values, gradients = _forward_in_loops(teacher_RV, student_RV)
        else:
            log_p, log_q = teacher_RV.log_softmax(-1), student_RV.log_softmax(-1)
            values, gradients = _KINDS[self.kind](log_p, log_q, self.skew)
        return (values, gradients) if tau == 1 else (values.mul_(tau * tau), gradients.mul_(tau))


def cross_entropy_with_gradient(student_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """−log q(target): values [rows] and gradients [rows, V] of logits [rows, V] and token ids [rows]."""
    if torch.compiler.is_compiling():
        return _cross_entropy_in_loops(student_RV, targets_R)
    log_q = student_RV.log_softmax(-1)
    values = -log_q.gather(-1, targets_R[:, None]).squeeze(-1)
    gradients = log_q.exp_()
    gradients.scatter_add_(-1, targets_R[:, None], torch.full_like(values, -1.0)[:, None])
    return values, gradients


def _cross_entropy_in_loops(student_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    target_R1 = targets_R[:, None]
    q_RV, total_R1, lse_R1 = _exponentials(student_RV)
    is_target_RV = torch.arange(student_RV.shape[-1], device=student_RV.device) == target_R1
    values = (lse_R1 - student_RV.gather(-1, target_R1)).squeeze(-1)
    return values, q_RV / total_R1 - is_target_RV.to(q_RV.dtype)


def _forward_in_loops(teacher_RV: Tensor, student_RV: Tensor) -> tuple[Tensor, Tensor]:
    # KL = Σ p (z_p − z_q) − lse(z_p) + lse(z_q), with sums of exponentials that are not normalised yet.
    p_RV, p_total_R1, p_lse_R1 = _exponentials(teacher_RV)
    q_RV, q_total_R1, q_lse_R1 = _exponentials(student_RV)
    apart_R1 = (p_RV * (teacher_RV - student_RV)).sum(-1, keepdim=True) / p_total_R1
    return (apart_R1 - p_lse_R1 + q_lse_R1).squeeze(-1), q_RV / q_total_R1 - p_RV / p_total_R1


def _exponentials(logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z − max z) of logits z; their sum and logsumexp(z), [rows, 1]."""
    largest_R1 = logits_RV.amax(-1, keepdim=True)
    exponentials_RV = (logits_RV - largest_R1).exp()
    total_R1 = exponentials_RV.sum(-1, keepdim=True)
    return exponentials_RV, total_R1, largest_R1 + total_R1.log()


def _forward(log_p: Tensor, log_q: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    values = log_p.sub_(log_q).mul_(p).sum(-1)
    return values, log_q.exp_().sub_(p)


def _reverse(log_p: Tensor, log_q: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    difference = log_q.sub_(log_p)
    values = (q * difference).sum(-1)
    return values, difference.sub_(values[:, None]).mul_(q)


def _skewed(log_p: Tensor, log_q: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp_()
    mixture = torch.lerp(q, p, skew).clamp_min_(_SMALLEST)
    values = (p * (log_p - mixture.log())).sum(-1)
    # dL/dq = −(1 − λ) p / m, through the softmax: q (g − Σ q g).
    weighted = mixture.reciprocal_().mul_(p).mul_(q).mul_(skew - 1)
    return values, weighted - q * weighted.sum(-1, keepdim=True)


_KINDS: dict[Divergence, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "forward": _forward,
    "reverse": _reverse,
    "skewed": _skewed,
}

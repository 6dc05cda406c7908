"""Distances between the next-token distributions of two models, from their last hidden states.

The logits of a batch in fp32 would fill the memory (tokens × vocabulary), so they are made, compared and dropped
a few rows at a time. Where a gradient is wanted, `fused_logit_losses` takes it in the same visit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldgpt.objectives.head import Head

#: What the logits of one chunk may take, in bytes of fp32: enough rows for an efficient product with a vocabulary
#: of 262k, and little beside the model.
CHUNK_BYTES = 64 * 2**20
#: What its products may take where nothing else is as large. Those of more rows are faster: each reads the whole head.
PRODUCT_BYTES = 256 * 2**20


@torch.no_grad()
def forward_kl(head: Head, teacher_RH: Tensor, student_RH: Tensor, *, student_head: Head | None = None) -> Tensor:
    """KL(teacher ‖ student) of the next-token distributions, one value a row, in nats.

    Args:
        head: the teacher's head.
        teacher_RH: the teacher's hidden states after the final norm, [rows, H].
        student_RH: the student's, [rows, H].
        student_head: the student's head, if it is another.

    Returns:
        fp32 [rows].
    """
    size = chunk_rows(head)
    student_head = student_head or head
    parts = [
        _kl_rows(head.logits(teacher), student_head.logits(student))
        for teacher, student in zip(teacher_RH.split(size), student_RH.split(size), strict=True)
    ]
    return torch.cat(parts)


@torch.no_grad()
def cross_entropy(head: Head, hidden_RH: Tensor, targets_R: Tensor) -> Tensor:
    """−log p(target) of each row, in nats, fp32 [rows].

    Args:
        head: the model's head.
        hidden_RH: hidden states after the final norm, [rows, H].
        targets_R: token ids, int64 [rows].
    """
    size = chunk_rows(head)
    parts = [
        torch.nn.functional.cross_entropy(head.logits(hidden), targets, reduction="none")
        for hidden, targets in zip(hidden_RH.split(size), targets_R.split(size), strict=True)
    ]
    return torch.cat(parts)


def chunk_rows(head: Head) -> int:
    """Rows whose logits are made at once: a power of two, which products of matrices like."""
    return _power_of_two(CHUNK_BYTES // (4 * head.vocab_size))


def product_rows(head: Head) -> int:
    """The same where a compiler leaves nothing as large as the products: no table in fp32."""
    return _power_of_two(PRODUCT_BYTES // (head.itemsize * head.vocab_size))


def chunk_tokens(hidden_size: int) -> int:
    """Tokens whose part of a head's matrix is widened to fp32 at once."""
    return max(1, CHUNK_BYTES // (4 * hidden_size))


def _power_of_two(most: int) -> int:
    return 1 << max(0, most.bit_length() - 1)


def _kl_rows(teacher_RV: Tensor, student_RV: Tensor) -> Tensor:
    # KL = Σ p (z_t − z_s) − lse(z_t) + lse(z_s): one exponential table for each model and no log-softmax tables.
    teacher_lse = teacher_RV.logsumexp(-1)
    probability = (teacher_RV - teacher_lse[:, None]).exp_()
    difference = (probability * (teacher_RV - student_RV)).sum(-1)
    return difference - teacher_lse + student_RV.logsumexp(-1)

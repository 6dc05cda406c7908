"""Distances between hidden states of two models, one value a row; each token counts alike, however large its state."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(teacher_RH: Tensor, student_RH: Tensor) -> Tensor:
    """‖s − t‖² / ‖t‖² of each row, fp32 (fp64 for fp64) [rows].

    Divided by the teacher's energy token by token, so that the massive activations of a few tokens do not drown
    the rest, and a sum over tokens can be split over batches and processes.

    Args:
        teacher_RH: [rows, H].
        student_RH: [rows, H]; the gradient goes here.
    """
    teacher_RH, student_RH = _wide(teacher_RH), _wide(student_RH)
    energy_R = teacher_RH.square().sum(-1).clamp_min(torch.finfo(teacher_RH.dtype).tiny)
    return (student_RH - teacher_RH).square().sum(-1) / energy_R


def cosine_distance(teacher_RH: Tensor, student_RH: Tensor) -> Tensor:
    """1 − cos(s, t) of each row, in the shapes and types of `relative_error`."""
    return 1 - torch.nn.functional.cosine_similarity(_wide(teacher_RH), _wide(student_RH), dim=-1)


def _wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))

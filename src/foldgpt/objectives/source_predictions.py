"""The source's predictions at fixed positions, for a search that compares hundreds of folded models with them."""

from __future__ import annotations

import torch
from torch import Tensor

from foldgpt.objectives.divergence import chunk_rows, forward_kl
from foldgpt.objectives.head import Head
from foldgpt.objectives.reduced_predictions import ReducedPredictions


class SourcePredictions:
    """The next-token distributions of the source at some positions.

    Args:
        head: the source's head.
        hidden_RH: the source's hidden states after the final norm, [rows, H].
    """

    def __init__(self, head: Head, hidden_RH: Tensor) -> None:
        self.hidden_RH = hidden_RH
        self._head = head
        self._reduced = None if head.linear is None else ReducedPredictions.of(head, hidden_RH)

    @torch.no_grad()
    def kl(self, student_RH: Tensor) -> Tensor:
        """KL(source ‖ student) in nats, fp32 [rows], of a student that uses the source's head.

        Args:
            student_RH: the student's hidden states after the final norm, [rows, H].
        """
        if self._reduced is None:
            return forward_kl(self._head, self.hidden_RH, student_RH)
        size = chunk_rows(self._head)
        parts = []
        for start in range(0, len(student_RH), size):
            rows = slice(start, start + size)
            parts.append(self._reduced[rows].kl(self._head.logits(student_RH[rows]), student_RH[rows]))
        return torch.cat(parts)

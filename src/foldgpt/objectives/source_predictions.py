"""The source's predictions at fixed positions, reduced to what a KL divergence needs of them.

A search compares hundreds of folded models with one source. With the source's probabilities p and the folded
model's logits z = W h + b, KL = Σ p log p − (Σ p W)·h − Σ p b + logsumexp(z): the source enters through one
vector Σ p W of hidden size and one number a position, so its logits are made once and never again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldgpt.objectives.divergence import chunk_rows, forward_kl
from foldgpt.objectives.head import Head


class SourcePredictions:
    """The next-token distributions of the source at some positions.

    Args:
        head: the source's head.
        hidden_RH: the source's hidden states after the final norm, [rows, H].
    """

    def __init__(self, head: Head, hidden_RH: Tensor) -> None:
        self.hidden_RH = hidden_RH
        self._head = head
        self._mean_RH: Tensor | None = None
        linear = head.linear
        if linear is not None:
            self._mean_RH, self._constant_R = self._reduce(linear)

    @torch.no_grad()
    def kl(self, student_RH: Tensor) -> Tensor:
        """KL(source ‖ student) in nats, fp32 [rows], of a student that uses the source's head.

        Args:
            student_RH: the student's hidden states after the final norm, [rows, H].
        """
        if self._mean_RH is None:
            return forward_kl(self._head, self.hidden_RH, student_RH)
        lse_R = torch.cat([self._head.logits(part).logsumexp(-1) for part in student_RH.split(chunk_rows(self._head))])
        return self._constant_R - (self._mean_RH * student_RH.float()).sum(-1) + lse_R

    @torch.no_grad()
    def _reduce(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Σ p W [rows, H] and Σ p log p − Σ p b [rows], both scaled as the head scales its logits."""
        weight_VH = linear.weight.float()
        means, constants = [], []
        for part in self.hidden_RH.split(chunk_rows(self._head)):
            log_p_RV = self._head.logits(part).log_softmax(-1)
            p_RV = log_p_RV.exp()
            constant_R = (p_RV * log_p_RV).sum(-1)
            if linear.bias is not None:
                constant_R -= (p_RV @ linear.bias.float()) * self._head.factor
            means.append((p_RV @ weight_VH) * self._head.factor)
            constants.append(constant_R)
        return torch.cat(means), torch.cat(constants)

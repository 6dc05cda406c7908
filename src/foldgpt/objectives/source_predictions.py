"""The source's predictions at fixed positions, reduced to what a KL divergence needs of them.

A search compares hundreds of folded models with one source. With the source's probabilities p and the logits
z = W h + b of both, KL = Σ p (z_source − z) − logsumexp(z_source) + logsumexp(z), and Σ p z = (Σ p W)·h + Σ p b: the
source enters through one vector Σ p W of hidden size and a few numbers a position, so its logits are made once and
never again.

A head in bf16 rounds its logits, the likeliest by the most, and a logsumexp is of rounded ones. What Σ p z takes from
(Σ p W)·h is not rounded, and the difference would be noise that is larger than small divergences. So the likeliest
tokens of the source are left out of the vector: their logits are read off the table of which the logsumexp is taken.
What is left to the vector is many small terms, whose errors cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldgpt.objectives.divergence import chunk_rows, forward_kl
from foldgpt.objectives.head import Head

#: Tokens of each position whose logits are read off the table.
_LIKELIEST = 32


class SourcePredictions:
    """The next-token distributions of the source at some positions.

    Shape suffixes: R rows, H hidden size, K likeliest tokens.

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
            self._reduce(linear)

    @torch.no_grad()
    def kl(self, student_RH: Tensor) -> Tensor:
        """KL(source ‖ student) in nats, fp32 [rows], of a student that uses the source's head.

        Args:
            student_RH: the student's hidden states after the final norm, [rows, H].
        """
        if self._mean_RH is None:
            return forward_kl(self._head, self.hidden_RH, student_RH)
        size = chunk_rows(self._head)
        parts = zip(*(rows.split(size) for rows in (student_RH, self._tokens_RK, self._p_RK)), strict=True)
        from_table_R = torch.cat([_cross(self._head.logits(rows), tokens, p) for rows, tokens, p in parts])
        return from_table_R - (self._mean_RH * student_RH.float()).sum(-1) - self._own_R

    @torch.no_grad()
    def _reduce(self, linear: nn.Linear) -> None:
        """Keep what a divergence needs of the source.

        These are its likeliest tokens and their p [R, K]; Σ p W over all others [R, H], scaled as the head scales its
        logits; and its own −Σ p log p [R]. Of that, as of a student's −Σ p log q, the bias of the less likely tokens is
        left out: it is the same in both.
        """
        weight_VH = linear.weight.float()
        tokens, likeliest, means, own = [], [], [], []
        for part in self.hidden_RH.split(chunk_rows(self._head)):
            logits_RV = self._head.logits(part)
            p_RV = logits_RV.softmax(-1)
            p_RK, tokens_RK = p_RV.topk(min(_LIKELIEST, self._head.vocab_size), -1)
            mean_RH = (p_RV.scatter_(-1, tokens_RK, 0.0) @ weight_VH) * self._head.factor
            own.append(_cross(logits_RV, tokens_RK, p_RK) - (mean_RH * part.float()).sum(-1))
            tokens.append(tokens_RK)
            likeliest.append(p_RK)
            means.append(mean_RH)
        self._tokens_RK, self._p_RK, self._mean_RH, self._own_R = map(torch.cat, (tokens, likeliest, means, own))


def _cross(logits_RV: Tensor, tokens_RK: Tensor, p_RK: Tensor) -> Tensor:
    """logsumexp(z) − Σ p z over some tokens [R], both of the same table of logits."""
    return logits_RV.logsumexp(-1) - (p_RK * logits_RV.gather(-1, tokens_RK)).sum(-1)

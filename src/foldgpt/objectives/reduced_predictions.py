"""A model's predictions at fixed positions, reduced to what a KL divergence from them needs.

With its probabilities p and the logits z = W h + b of another model with the same head,
KL = Σ p log p − Σ p z + logsumexp(z), and Σ p z = (Σ p W)·h + Σ p b: it enters through one vector Σ p W of hidden size
and a few numbers a position, so its own logits are made once and never again. The same holds for the gradient with
respect to h, which is Σ q W − Σ p W.

A head in bf16 rounds its logits, the likeliest by the most, and a logsumexp is of rounded ones. What Σ p z takes from
(Σ p W)·h is not rounded, and the difference would be noise that is larger than small divergences. So the likeliest
tokens are left out of the vector: their logits are read off the table of which the logsumexp is taken, and their part
of the gradient goes through the other model's head. What is left to the vector is many small terms, whose errors
cancel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foldgpt.objectives.divergence import chunk_rows, chunk_tokens
from foldgpt.objectives.head import Head

#: Tokens of each position whose logits are read off the table.
LIKELIEST = 32


class ReducedPredictions:
    """What a divergence needs of predictions at some positions, for models that share the head.

    Shape suffixes: R rows (or more axes of positions), H hidden size, K likeliest tokens.

    Not a dataclass, for FSDP's mixed precision would round all that it finds in one.

    Args:
        tokens_RK: the likeliest tokens, of an integer type.
        p_RK: their probabilities, fp32.
        mean_RH: Σ p W over all other tokens, times what the head multiplies its logits by.
        own_R: −Σ p log p, fp32; as in what it is compared with, the bias of the less likely tokens is left out.
        temperature: τ of softmax(logits / τ), which p is.
    """

    def __init__(
        self, tokens_RK: Tensor, p_RK: Tensor, mean_RH: Tensor, own_R: Tensor, temperature: float = 1.0
    ) -> None:
        self.tokens_RK = tokens_RK
        self.p_RK = p_RK
        self.mean_RH = mean_RH
        self.own_R = own_R
        self.temperature = temperature

    @classmethod
    @torch.no_grad()
    def of(
        cls, head: Head, hidden_RH: Tensor, temperature: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> ReducedPredictions:
        """Reduce the predictions made from hidden states after the final norm, [rows, H].

        Args:
            head: the model's head; its logits are linear in the hidden states.
            hidden_RH: the hidden states.
            temperature: τ.
            dtype: of the vector. −Σ p log p is taken with it as it is then, so that nothing is left of its rounding
                where a student predicts the same.
        """
        assert head.linear is not None
        weight_VH = head.linear.weight
        parts = []
        for hidden in hidden_RH.split(chunk_rows(head)):
            logits_RV = head.logits(hidden)
            if temperature != 1:
                logits_RV = logits_RV / temperature
            p_RV = logits_RV.softmax(-1)
            p_RK, tokens_RK = p_RV.topk(min(LIKELIEST, head.vocab_size), -1)
            p_RV = p_RV.scatter_(-1, tokens_RK, 0.0)
            mean_RH = _mean(p_RV if head.factor == 1 else p_RV.mul_(head.factor), weight_VH, dtype)
            # logsumexp(z) without another table.
            total_R = logits_RV.gather(-1, tokens_RK[:, :1]).squeeze(-1) - p_RK[:, 0].log()
            cross_R = _cross(total_R, logits_RV, tokens_RK, p_RK)
            parts.append((tokens_RK, p_RK, mean_RH, cross_R - _product(mean_RH, hidden) / temperature))
        tokens_RK, p_RK, mean_RH, own_R = map(torch.cat, zip(*parts, strict=True))
        return cls(tokens_RK, p_RK, mean_RH, own_R, temperature)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All of it, in the order of the arguments."""
        return self.tokens_RK, self.p_RK, self.mean_RH, self.own_R

    def __getitem__(self, rows: Any) -> ReducedPredictions:
        """Those at some of the positions, by whatever indexes a tensor of them."""
        tokens, p, mean, own = (value[rows] for value in self.tensors)
        return ReducedPredictions(tokens, p, mean, own, self.temperature)

    def to(self, device: torch.device | str) -> ReducedPredictions:
        """The same on a device."""
        tokens, p, mean, own = (value.to(device) for value in self.tensors)
        return ReducedPredictions(tokens, p, mean, own, self.temperature)

    def kl(self, student_RV: Tensor, student_RH: Tensor) -> Tensor:
        """KL from these predictions, at τ = 1, of a model with the same head, in nats, fp32 [rows].

        Args:
            student_RV: its logits, [rows, V].
            student_RH: its hidden states after the final norm, of which they were made, [rows, H].
        """
        cross_R = _cross(student_RV.logsumexp(-1), student_RV, self.tokens_RK, self.p_RK)
        return cross_R - _product(self.mean_RH, student_RH) - self.own_R

    def kl_with_gradient(self, student_RV: Tensor, student_RH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KL at the temperature of these predictions, times τ², and its gradient in two parts.

        Args:
            student_RV: as for `kl`.
            student_RH: as for `kl`.

        Returns:
            Values [rows]; the part of the gradient that goes through the head, with respect to its logits [rows, V];
            and the part that does not, with respect to the hidden states [rows, H].
        """
        tau = self.temperature
        tokens_RK = self.tokens_RK.long()
        log_q = (student_RV / tau if tau != 1 else student_RV).log_softmax(-1)
        # logsumexp(z) without another table.
        likeliest_R = tokens_RK[:, :1]
        total_R = (student_RV.gather(-1, likeliest_R) / tau - log_q.gather(-1, likeliest_R)).squeeze(-1)
        cross_R = _cross(total_R, student_RV, tokens_RK, self.p_RK / tau)
        values = cross_R - _product(self.mean_RH, student_RH) / tau - self.own_R
        gradient_RV = log_q.exp_().scatter_add_(-1, tokens_RK, -self.p_RK)
        if tau == 1:
            return values, gradient_RV, -self.mean_RH
        return values * tau**2, gradient_RV.mul_(tau), -tau * self.mean_RH


def _cross(total_R: Tensor, logits_RV: Tensor, tokens_RK: Tensor, p_RK: Tensor) -> Tensor:
    """logsumexp(z) − Σ p z over some tokens [R], both of the same table of logits."""
    return total_R - (p_RK * logits_RV.gather(-1, tokens_RK)).sum(-1)


def _mean(p_RV: Tensor, weight_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """p W in the format that is asked for, [rows, H]."""
    if dtype == weight_VH.dtype == torch.bfloat16:
        # The many roundings of p are nothing beside that of the sum, and such products are ten times as fast.
        return p_RV.bfloat16() @ weight_VH
    return _wide_product(p_RV, weight_VH).to(dtype)


def _wide_product(p_RV: Tensor, weight_VH: Tensor) -> Tensor:
    """p W in fp32, [rows, H], with a head in 16 bits widened a few tokens at a time."""
    size = len(weight_VH) if weight_VH.dtype == torch.float32 else chunk_tokens(weight_VH.shape[-1])
    product_RH = p_RV.new_zeros(len(p_RV), weight_VH.shape[-1])
    for p, weight in zip(p_RV.split(size, dim=-1), weight_VH.split(size), strict=True):
        product_RH.addmm_(p, weight.float())
    return product_RH


def _product(one_RH: Tensor, other_RH: Tensor) -> Tensor:
    return (one_RH.float() * other_RH.float()).sum(-1)

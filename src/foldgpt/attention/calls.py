"""An attention as transformers calls it, for the calls that the attentions of this package are made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

#: Queries [B, heads, T, D], keys, values and what scores are multiplied by → [B, heads, T, E].
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
#: Whether it is made for these queries, keys and values.
Serves = Callable[[Tensor, Tensor, Tensor], bool]


def in_place_of_torch_s(attend: Attend, serves: Serves) -> Callable[..., tuple[Tensor, None]]:
    """An attention as transformers calls it, which leaves to torch's kernel what it is not made for.

    It is made for bf16 on a CPU, and as many queries as keys with the causal mask or one query.

    Args:
        attend: the attention.
        serves: what else it needs.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """Attention as transformers calls it.

        Args:
            module: the attention module.
            query: [B, heads, T, D].
            key: [B, key heads, T, D]; with one query as many as there are.
            value: as many, [B, key heads, T, E].
            attention_mask: None where the only mask is the causal one.
            dropout: share of probabilities that is dropped.
            scaling: what scores are multiplied by; 1 / √D by default.
            is_causal: whether a query sees only keys up to its own place; by default what the module says.
            more: what other implementations understand.

        Returns:
            [B, T, heads, E], and None in place of the probabilities.
        """
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        is_plain = (
            query.device.type == "cpu"
            and query.dtype == key.dtype == value.dtype == torch.bfloat16
            and attention_mask is None
            and not dropout
            and (query.shape[2] == 1 or (causal and query.shape[2] == key.shape[2]))
            and not any(more.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
        )
        if not (is_plain and serves(query, key, value)):
            found: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
            )
            return found
        output = attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return output.transpose(1, 2).contiguous(), None

    return attention

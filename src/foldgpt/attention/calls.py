"""Which calls the attentions of this package are made for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    more: dict[str, Any],
) -> bool:
    """Whether all that a call asks for is bf16 on a CPU, and as many queries as keys with the causal mask or one query.

    The arguments are those by which transformers calls an attention.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and attention_mask is None
        and not dropout
        and (query.shape[2] == 1 or (causal and query.shape[2] == key.shape[2]))
        and not any(more.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    )

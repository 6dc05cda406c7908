"""Decoding on a KV cache, whatever this version of transformers calls the cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids. An offloaded embedding is on "meta": accelerate's hook moves the ids on."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def decode(model: Any, ids_BT: Tensor, cache: Any = None, **arguments: Any) -> tuple[Tensor, Any]:
    """One forward pass that reads and fills the KV cache.

    Args:
        model: a causal language model.
        ids_BT: token ids that follow what is in the cache.
        cache: the cache of the step before; None at the start.
        arguments: further arguments of the model's forward.

    Returns:
        Logits [B, T, V], and the cache for the next step (None if the model keeps none).
    """
    # `past_key_values` became `cache` in transformers 5.2x, and goes for good in 5.40.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    output = model(input_ids=ids_BT, use_cache=True, **{name: cache}, **arguments)
    return output.logits, output.get(name)

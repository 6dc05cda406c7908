"""Which attention models use while they are trained or sample: the fastest that is known for this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from foldgpt.attention.products import products_attention
from foldgpt.attention.tiles import tiled_attention

_TILES, _PRODUCTS = "foldgpt_tiles", "foldgpt_products"


@contextmanager
def fast_attention(*models: nn.Module | None, compiled: bool = False) -> Iterator[None]:
    """Let models use an attention of this package meanwhile; a model that asked for another than torch's keeps it.

    On CPUs that compute in bf16 without AMX (AMD Zen 4 and 5) that is the one in tiles; where there is AMX and blocks
    are compiled, the one whose backward pass is made of products. Calls that these are not made for (a mask, dropout,
    several queries behind a cache, other formats than bf16, other devices) go to torch's kernel as before.

    Args:
        models: the models; None is left out.
        compiled: whether their blocks are compiled.
    """
    changed: list[Any] = []
    name = _fastest(compiled)
    if name is not None:
        changed = [model for model in models if model is not None and _is_for(model)]
    for model in changed:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        for model in changed:
            model.set_attn_implementation("sdpa")


def computes_by_amx(model: Any) -> bool:
    """Whether a model's matrix products in bf16 are those of a CPU with AMX, next to which all else takes long."""
    return _is_for(model) and _fastest(compiled=True) == _PRODUCTS


def _fastest(compiled: bool) -> str | None:
    """By the kinds of CPU on which it was measured; newer versions of torch can tell which this is."""
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return None
    if not getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)():
        return _TILES
    return _PRODUCTS if compiled else None


def _is_for(model: Any) -> bool:
    """Whether a model computes in bf16 on the CPU, and by torch's attention."""
    weight = model.get_input_embeddings().weight
    return weight.dtype == torch.bfloat16 and weight.device.type in ("cpu", "meta") and _uses_sdpa(model)


def _uses_sdpa(model: Any) -> bool:
    parts = [module.config for module in model.modules() if hasattr(module, "set_attn_implementation")]
    return all(config._attn_implementation == "sdpa" for config in parts)


for _name, _attention in ((_TILES, tiled_attention), (_PRODUCTS, products_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)

"""Kinds of blocks by how they attend, and from which of them transformers reads the length of the KV cache.

It asks the first block of a kind, so that one must attend; and a model that had a cache must keep a block that has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

#: Kinds of blocks (`layer_types`) that keep no keys and values: what mixes tokens there has a state, or nothing does.
_WITHOUT_ATTENTION = frozenset({"conv", "linear_attention", "mamba", "mlp", "moe", "recurrent"})


def attention_kinds(config: Any) -> tuple[str, ...]:
    """Kind of each block, "full_attention" and the like; one for all where the config tells no `layer_types`."""
    return tuple(getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers)


def attending_blocks(kinds: Sequence[str]) -> list[int]:
    """Indices of the blocks that keep keys and values."""
    return [index for index, kind in enumerate(kinds) if kind not in _WITHOUT_ATTENTION]


def first_of_each_kind(kinds: Sequence[str], kept: Iterable[int]) -> dict[str, int]:
    """Kind → the first of the kept blocks that is of it.

    Args:
        kinds: of all blocks.
        kept: source indices, increasing.
    """
    first: dict[str, int] = {}
    for index in kept:
        first.setdefault(kinds[index], index)
    return first

"""Config fields whose meaning depends on the number or the index of the blocks.

Removing blocks renumbers the rest, so each such field must be rewritten for the kept blocks, sliced by
source index and never regenerated from a pattern. A field that looks index-dependent and has no rule here
is refused by name: a guess would save a checkpoint that loads without a word and computes something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from foldgpt.errors import PlanError, UnsupportedModelError
from foldgpt.families.table import INDEX_IN_CODE, SPECIAL_FIRST_BLOCK

Rule = Callable[[Any, str, tuple[int, ...], int], Any]


def _slice_per_block(config: Any, name: str, kept: tuple[int, ...], num_blocks: int) -> Any:
    """One entry per block: keep the entries of the kept blocks."""
    value = getattr(config, name)
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) != num_blocks:
        raise UnsupportedModelError(
            f"config field {name!r} has {len(value)} entries for {num_blocks} blocks; "
            "cannot tell which belong to which."
        )
    return [value[index] for index in kept]


def _slice_indexers(config: Any, name: str, kept: tuple[int, ...], num_blocks: int) -> Any:
    """One entry per block. A "shared" indexer points where the last "full" one before it does, and needs that one."""
    sliced = _slice_per_block(config, name, kept, num_blocks)
    for index, donor in read_blocks(config).items():
        if index in kept and donor not in kept:
            raise PlanError(
                f"cannot remove block {donor} and keep block {index}: the attention of block {index} reads what the "
                f"indexer of block {donor} chose ({name}). Keep block {donor}, or remove all that read it."
            )
    return sliced


def read_blocks(config: Any) -> dict[int, int]:
    """Block → the one before it that it reads from, so that it cannot be kept without that one.

    Args:
        config: the (text) config of a decoder.
    """
    read: dict[int, int] = {}
    donor = None
    for index, kind in enumerate(getattr(config, "indexer_types", None) or ()):
        if kind == "full":
            donor = index
        elif donor is not None:
            read[index] = donor
    return read


def _slice_repeated(config: Any, name: str, kept: tuple[int, ...], num_blocks: int) -> Any:
    """Kinds of attention and how often they come again, [[[kind, …], times], …] (GPT-Neo): the kept ones, once."""
    kinds = [kind for pattern, times in getattr(config, name) for _ in range(times) for kind in pattern]
    if len(kinds) != num_blocks:
        raise UnsupportedModelError(
            f"config field {name!r} = {_shown(getattr(config, name))} is for {len(kinds)} blocks, and there are "
            f"{num_blocks}; cannot tell which belong to which."
        )
    return [[[kinds[index] for index in kept], 1]]


def _remap_indices(config: Any, name: str, kept: tuple[int, ...], num_blocks: int) -> Any:
    """A list of block indices: the positions of those that are kept."""
    position_of = {source: position for position, source in enumerate(kept)}
    return [position_of[index] for index in getattr(config, name) if index in position_of]


def _remap_linear_attention(config: Any, name: str, kept: tuple[int, ...], num_blocks: int) -> Any:
    """Settings of linear attention, with two lists of block numbers that count from 1 (Kimi Linear)."""
    value = getattr(config, name)
    if not isinstance(value, dict):
        return value
    number_of = {source + 1: position + 1 for position, source in enumerate(kept)}
    remapped = dict(value)
    for key in ("kda_layers", "full_attn_layers"):
        numbers = value.get(key) or []
        if not all(1 <= number <= num_blocks for number in numbers):
            raise UnsupportedModelError(
                f"config field '{name}.{key}' = {_shown(numbers)} should number blocks from 1 to {num_blocks}; "
                "cannot tell which belong to which."
            )
        if numbers:
            remapped[key] = [number_of[number] for number in numbers if number in number_of]
    return remapped


def _count_first(config: Any, name: str, kept: tuple[int, ...], num_blocks: int) -> Any:
    """ "The first k blocks are special": k shrinks by the removed blocks among them."""
    limit = getattr(config, name)
    return limit - sum(1 for index in range(min(limit, num_blocks)) if index not in set(kept))


def _sparse_step(config: Any, name: str, kept: tuple[int, ...], num_blocks: int) -> Any:
    """Every k-th block is sparse: said as a list of dense blocks instead (see `remap_config_`)."""
    return 1


def _scale_with_depth(config: Any, name: str, kept: tuple[int, ...], num_blocks: int) -> Any:
    """Each block divides it by the square root of the number of blocks: the quotient must stay."""
    return getattr(config, name) * math.sqrt(len(kept) / num_blocks)


def _none_left(config: Any, name: str, kept: tuple[int, ...], num_blocks: int) -> Any:
    """Extra blocks that transformers does not load (multi-token prediction): the folded model has none."""
    return 0


#: Field → how to rewrite it. Applied to fields that are present and set.
RULES: dict[str, Rule] = {
    # One entry per block.
    "activation_sparsity_pattern": _slice_per_block,
    "attention_layers": _slice_per_block,
    "attention_types": _slice_repeated,
    "attn_type_list": _slice_per_block,
    "indexer_types": _slice_indexers,
    "intermediate_size": _slice_per_block,
    "layer_rope_theta": _slice_per_block,
    "layer_types": _slice_per_block,
    "layers_block_type": _slice_per_block,
    "mlp_layer_types": _slice_per_block,
    "no_rope_layers": _slice_per_block,
    "num_attention_heads_per_layer": _slice_per_block,
    # Lists of block indices.
    "attn_layer_indices": _remap_indices,
    "full_attn_idxs": _remap_indices,
    "linear_attn_config": _remap_linear_attention,
    "mlp_only_layers": _remap_indices,
    "moe_layers": _remap_indices,
    # Counts of leading blocks.
    "first_k_dense_replace": _count_first,
    "max_window_layers": _count_first,
    "num_dense_layers": _count_first,
    # Others.
    "decoder_sparse_step": _sparse_step,
    "mtp_num_hidden_layers": _none_left,
    "num_nextn_predict_layers": _none_left,
    "scale_depth": _scale_with_depth,
}

#: Field → the explicit list that takes its place; harmless once that list is in the config.
GENERATORS: dict[str, str] = {
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "layer_group_size": "layer_types",
    "layer_switch": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window_pattern": "layer_types",
}

#: Field → the value under which it does not depend on the index. Any other value is refused.
NEUTRAL: dict[str, Any] = {
    # Embeddings of every token for every block, in one matrix (Gemma 3n).
    "hidden_size_per_layer_input": 0,
    # Every k-th block is sparse (DeepSeek); transformers' own code for these families takes every one.
    "moe_layer_freq": 1,
    "num_kv_shared_layers": 0,
    "per_layer_config": {},
    "scale_attn_by_inverse_layer_idx": False,
}

#: Names that look index-dependent but are not.
HARMLESS = frozenset(
    {
        "altup_active_idx",
        "apply_residual_connection_post_layernorm",
        "block_auto_adjust_ff_dim",
        "block_dim",
        "block_ff_dim",
        "block_ffn_dim_multiplier",
        "block_mlp_init_scale",
        "block_multiple_of",
        "block_norm_eps",
        "block_out_init_scale",
        "block_use_swiglu",
        "block_use_xavier_init",
        "do_layer_norm_before",
        "layer_norm_elementwise_affine",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "layerdrop",
        "layernorm_embedding",
        # Of blocks for multi-token prediction, which transformers does not load.
        "mtp_layer_types",
        "mtp_layers_block_type",
        "mtp_mlp_layer_types",
        "mtp_transformer_layers",
        "n_layer",
        "n_layers",
        "num_hidden_layers",
        "num_layers",
        # Of ALiBi, in BLOOM's first checkpoints.
        "offset_alibi",
        # Says in which order the pattern has the kinds of attention; `layer_types` lists them (Cohere 2).
        "order_of_interleaved_layers",
        "qk_layernorm",
        "use_parallel_block",
        "vocab_size_per_layer_input",
        "word_embed_proj_dim",
        "_remove_final_layer_norm",
    }
)

_LOOKS_INDEXED = re.compile(
    r"(^|_)(layers?|blocks?|idxs?|indices)(_|$)|(^|_)(pattern|interval|period|freq|offset|every)(_|$)|_per_layer"
)


def check_config(config: Any) -> None:
    """Refuse a config with an index-dependent field that has no rule, or of blocks that compute with their index.

    Args:
        config: the (text) config of a decoder.

    Raises:
        UnsupportedModelError: names the field, its value and what can be done.
    """
    if config.model_type in INDEX_IN_CODE:
        raise UnsupportedModelError(
            f"blocks of model type {config.model_type!r} compute {INDEX_IN_CODE[config.model_type]} from their own "
            "index, and no config field can say another for a block that gets a new number"
        )
    num_blocks = config.num_hidden_layers
    for name, value in _own_fields(config).items():
        if name in RULES or name in HARMLESS:
            continue
        if name in NEUTRAL:
            if value not in (NEUTRAL[name], None):
                raise _refusal(config, name, value)
            continue
        if name in GENERATORS:
            if getattr(config, GENERATORS[name], None) is None and value is not None:
                raise _refusal(config, name, value)
            continue
        per_block = isinstance(value, (list, tuple)) and len(value) == num_blocks and num_blocks > 1
        named_so = bool(_LOOKS_INDEXED.search(name)) and value not in (None, False, [], {}, "")
        if per_block or named_so:
            raise _refusal(config, name, value)
        if isinstance(value, dict):
            for key, inner in value.items():
                if _LOOKS_INDEXED.search(str(key)) and _is_index_list(inner):
                    raise _refusal(config, f"{name}.{key}", inner)


def check_kept(config: Any, kept: Sequence[int]) -> None:
    """Refuse to remove a block that no other can stand in for.

    Args:
        config: the (text) config of a decoder.
        kept: source indices of the kept blocks, increasing.

    Raises:
        PlanError: the first block is removed, and the family builds it unlike all others.
    """
    if kept[0] != 0 and config.model_type in SPECIAL_FIRST_BLOCK:
        raise PlanError(
            f"cannot remove block 0: in model type {config.model_type!r} the first block "
            f"{SPECIAL_FIRST_BLOCK[config.model_type]}, and block {kept[0]} would have to take its place. Keep block 0."
        )


def _is_index_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, int) for item in value)


def remap_config_(config: Any, kept: Sequence[int]) -> None:
    """Rewrite a config in place for a model that keeps the given blocks.

    Args:
        config: the (text) config of the source.
        kept: source indices of the kept blocks, increasing.

    Raises:
        PlanError: a kept block reads what a removed one made, or would have to stand in for it; see `check_kept`.
        UnsupportedModelError: a field cannot express the result, or has no rule; the config is unchanged.
    """
    check_config(config)
    kept = tuple(kept)
    check_kept(config, kept)
    num_blocks = config.num_hidden_layers
    if len(kept) == num_blocks:
        return
    fields = _own_fields(config)
    rewritten = {
        name: rule(config, name, kept, num_blocks) for name, rule in RULES.items() if fields.get(name) is not None
    }
    if rewritten.get("decoder_sparse_step") and config.decoder_sparse_step != 1:
        rewritten["mlp_only_layers"] = _dense_positions(config, kept)
    for name, value in rewritten.items():
        if value != fields[name]:
            setattr(config, name, value)
    config.num_hidden_layers = len(kept)


def _dense_positions(config: Any, kept: tuple[int, ...]) -> list[int]:
    """Positions of kept blocks that are dense under Qwen-MoE's rule (sparse: (index + 1) % step == 0)."""
    dense = set(config.mlp_only_layers or ())
    step = config.decoder_sparse_step
    return [p for p, source in enumerate(kept) if source in dense or (source + 1) % step != 0]


def _own_fields(config: Any) -> dict[str, Any]:
    """The config's fields by name, without nested configs."""
    attributes = {**config.to_dict(), **{k: v for k, v in vars(config).items() if not k.startswith("__")}}
    return {name: value for name, value in attributes.items() if not hasattr(value, "to_dict")}


def _refusal(config: Any, name: str, value: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config field {name!r} = {_shown(value)} of model type {config.model_type!r} seems to depend on the block "
        "index, and foldgpt has no rule that rewrites it. Refusing rather than guessing; "
        "a rule is one row in foldgpt/families/config_fields.py."
    )


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."

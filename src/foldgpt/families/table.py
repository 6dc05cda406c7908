"""The tables of families. A new architecture is one row here; what depends on a model's name stands nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foldgpt.plan import Sublayer

#: Names of the matrices that a sublayer ends in; in mixtures each expert has one, or all are one parameter.
OUTPUT_MATRICES: dict[Sublayer, frozenset[str]] = {
    "mlp": frozenset({"down_proj", "c_proj", "dense_4h_to_h", "fc2"}),
    "attention": frozenset({"o_proj", "out_proj", "c_proj", "dense"}),
}


@dataclass(frozen=True)
class Sublayers:
    """Names, inside one block, of what makes up its two residual sublayers.

    Attributes:
        attention: modules of the attention sublayer; the last one returns its output.
        mlp: modules of the MLP sublayer, likewise.
        attention_norms: norms that serve the attention alone, and go when it is removed.
        mlp_norms: norms that serve the MLP alone.
        between: the module whose *input* is the residual stream between attention and MLP. None when the
            two run in parallel on the block's input.
        attention_norm_behind: the norm, if any, between the attention's output and the residual stream.
        mlp_norm_behind: the same for the MLP.
    """

    attention: tuple[str, ...] = ("self_attn",)
    mlp: tuple[str, ...] = ("mlp",)
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    between: str | None = "post_attention_layernorm"
    attention_norm_behind: str | None = None
    mlp_norm_behind: str | None = None

    def modules(self, sublayer: Sublayer) -> tuple[str, ...]:
        """The modules of one sublayer; the last one returns its output."""
        return self.attention if sublayer == "attention" else self.mlp

    def norms(self, sublayer: Sublayer) -> tuple[str, ...]:
        """The norms that serve one sublayer alone, and go when it is removed."""
        return self.attention_norms if sublayer == "attention" else self.mlp_norms

    def norm_behind(self, sublayer: Sublayer) -> str | None:
        """The norm between a sublayer's output and the residual stream, if the family has one there."""
        return self.attention_norm_behind if sublayer == "attention" else self.mlp_norm_behind


@dataclass(frozen=True)
class Variant:
    """One way a family arranges its sublayers, and the config values that select it."""

    sublayers: Sublayers
    when: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        blocks: dotted path of the list of blocks inside the causal language model.
        variants: arrangements of the sublayers, the first whose `when` matches the config counts. None
            matching (or none listed) means: blocks can be removed and shared, sublayers are not known.
    """

    blocks: str = "model.layers"
    variants: tuple[Variant, ...] = ()


_PRE_NORM = Sublayers()
_SANDWICH = Sublayers(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    between="pre_feedforward_layernorm",
    attention_norm_behind="post_attention_layernorm",
    mlp_norm_behind="post_feedforward_layernorm",
)
_POST_NORM = Sublayers(
    attention_norms=("post_attention_layernorm",),
    mlp_norms=("post_feedforward_layernorm",),
    between="mlp",
    attention_norm_behind="post_attention_layernorm",
    mlp_norm_behind="post_feedforward_layernorm",
)

_LLAMA_SHAPED = Family(variants=(Variant(_PRE_NORM),))
_GEMMA_SHAPED = Family(variants=(Variant(_SANDWICH),))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "deepseek_v2",
            "deepseek_v3",
            "granite",
            "llama",
            "mistral",
            "mixtral",
            "olmo",
            "phi3",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
            "smollm3",
        ),
        _LLAMA_SHAPED,
    ),
    "gemma": _LLAMA_SHAPED,
    "gemma2": _GEMMA_SHAPED,
    "gemma3_text": _GEMMA_SHAPED,
    "gemma3": Family(blocks="model.language_model.layers", variants=(Variant(_SANDWICH),)),
    "olmo2": Family(variants=(Variant(_POST_NORM),)),
    "stablelm": Family(
        variants=(
            # In the parallel form one norm feeds both sublayers, so it belongs to neither.
            Variant(Sublayers(attention_norms=(), mlp_norms=(), between=None), {"use_parallel_residual": True}),
            Variant(_PRE_NORM),
        )
    ),
    "gpt2": Family(
        blocks="transformer.h",
        variants=(
            Variant(
                Sublayers(("attn",), ("mlp",), ("ln_1",), ("ln_2",), between="ln_2"),
                {"add_cross_attention": False},
            ),
        ),
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        variants=(
            Variant(Sublayers(attention=("attention",), between=None), {"use_parallel_residual": True}),
            Variant(Sublayers(attention=("attention",))),
        ),
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        variants=(
            # Without norms before the sublayers (OPT-350m) the norms act on the stream itself.
            Variant(
                Sublayers(
                    mlp=("fc1", "fc2"),
                    attention_norms=("self_attn_layer_norm",),
                    mlp_norms=("final_layer_norm",),
                    between="final_layer_norm",
                ),
                {"do_layer_norm_before": True},
            ),
        ),
    ),
    "falcon": Family(
        blocks="transformer.h",
        variants=(
            Variant(
                Sublayers(("self_attention",), ("mlp",), ("ln_attn",), ("ln_mlp",), between=None),
                {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
            ),
            Variant(
                Sublayers(("self_attention",), ("mlp",), (), (), between=None),
                {"parallel_attn": True},
            ),
            Variant(
                Sublayers(attention=("self_attention",)),
                {"parallel_attn": False, "new_decoder_architecture": False},
            ),
        ),
    ),
}

#: Model type → what its blocks compute from their own index, and no config field says. Such a model is refused.
INDEX_IN_CODE: dict[str, str] = {"beam": "the weights of their residual sums", "diffllama": "lambda_init"}

#: Model type → what its first block, and no other, is built with or without. That block must stay.
SPECIAL_FIRST_BLOCK: dict[str, str] = {"modernbert-decoder": "has no norm before its attention"}

#: A decoder that follows the usual shape works without an entry; its sublayers are then unknown.
USUAL_SHAPE = Family()


def family_of(model_type: str) -> Family:
    """The family's row, or the usual `model.layers` shape for a type without one."""
    return FAMILIES.get(model_type, USUAL_SHAPE)


def sublayers_of(model_type: str, config: Any) -> Sublayers | None:
    """The arrangement of the sublayers under `config`; None where it is not known."""
    for variant in family_of(model_type).variants:
        if all(getattr(config, name, None) == value for name, value in variant.when.items()):
            return variant.sublayers
    return None

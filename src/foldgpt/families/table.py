"""The tables of families. A new architecture is one row here; what depends on a model's name stands nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from foldgpt.plan import Sublayer

#: Names of the matrices that a sublayer ends in; in mixtures each expert has one, or all are one parameter.
OUTPUT_MATRICES: dict[Sublayer, frozenset[str]] = {
    "mlp": frozenset({"down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2"}),
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
        mixers: modules that stand in the attention's place in blocks that do not attend (linear attention,
            convolutions); see `Decoder.modules`.
    """

    attention: tuple[str, ...] = ("self_attn",)
    mlp: tuple[str, ...] = ("mlp",)
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    between: str | None = "post_attention_layernorm"
    attention_norm_behind: str | None = None
    mlp_norm_behind: str | None = None
    mixers: tuple[str, ...] = ()

    def modules(self, sublayer: Sublayer) -> tuple[str, ...]:
        """The modules of one sublayer of a block that attends; the last one returns its output."""
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

#: As Llama's, but that the MLP, its norms or both have other names.
_LFM = Sublayers(
    mlp=("feed_forward",),
    attention_norms=("operator_norm",),
    mlp_norms=("ffn_norm",),
    between="ffn_norm",
    mixers=("conv",),
)
_APERTUS = Sublayers(
    attention_norms=("attention_layernorm",), mlp_norms=("feedforward_layernorm",), between="feedforward_layernorm"
)
_VAULT_GEMMA = Sublayers(mlp_norms=("pre_feedforward_layernorm",), between="pre_feedforward_layernorm")
_GLM4 = Sublayers(
    attention_norms=("input_layernorm", "post_self_attn_layernorm"),
    mlp_norms=("post_attention_layernorm", "post_mlp_layernorm"),
    attention_norm_behind="post_self_attn_layernorm",
    mlp_norm_behind="post_mlp_layernorm",
)
_AFMOE = Sublayers(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_mlp_layernorm", "post_mlp_layernorm"),
    between="pre_mlp_layernorm",
    attention_norm_behind="post_attention_layernorm",
    mlp_norm_behind="post_mlp_layernorm",
)
_GPT2 = Sublayers(("attn",), ("mlp",), ("ln_1",), ("ln_2",), between="ln_2")
#: One norm feeds both sublayers, so it belongs to neither.
_PARALLEL = Sublayers(attention_norms=(), mlp_norms=(), between=None)

_LLAMA_SHAPED = Family(variants=(Variant(_PRE_NORM),))
_GEMMA_SHAPED = Family(variants=(Variant(_SANDWICH),))
_HYBRID = Family(variants=(Variant(replace(_PRE_NORM, mixers=("linear_attn",))),))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "arcee",
            "bitnet",
            "cwm",
            "deepseek_v2",
            "deepseek_v3",
            "dots1",
            "ernie4_5",
            "exaone",
            "gemma",
            "glm",
            "glm4_moe",
            "glm4_moe_lite",
            "granite",
            "helium",
            "hunyuan_v1_dense",
            "hunyuan_v1_moe",
            "internlm3",
            "llama",
            "minimax_m2",
            "ministral",
            "ministral3",
            "mistral",
            "mixtral",
            "nanochat",
            "nemotron",
            "olmo",
            "olmoe",
            "phi3",
            "phimoe",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
            "seed_oss",
            "smollm3",
            "starcoder2",
        ),
        _LLAMA_SHAPED,
    ),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _HYBRID),
    **dict.fromkeys(("cohere", "cohere2", "phi"), Family(variants=(Variant(_PARALLEL),))),
    **dict.fromkeys(("lfm2", "lfm2_moe"), Family(variants=(Variant(_LFM),))),
    "afmoe": Family(variants=(Variant(_AFMOE),)),
    "apertus": Family(variants=(Variant(_APERTUS),)),
    "glm4": Family(variants=(Variant(_GLM4),)),
    "vaultgemma": Family(variants=(Variant(_VAULT_GEMMA),)),
    "gemma2": _GEMMA_SHAPED,
    "gemma3_text": _GEMMA_SHAPED,
    "gemma3": Family(blocks="model.language_model.layers", variants=(Variant(_SANDWICH),)),
    **dict.fromkeys(("exaone4", "flex_olmo", "olmo2", "olmo3"), Family(variants=(Variant(_POST_NORM),))),
    "stablelm": Family(
        variants=(
            Variant(_PARALLEL, {"use_parallel_residual": True}),
            Variant(_PRE_NORM),
        )
    ),
    **dict.fromkeys(
        ("gpt2", "gpt_bigcode"),
        Family(
            blocks="transformer.h",
            variants=(Variant(_GPT2, {"add_cross_attention": False}),),
        ),
    ),
    **dict.fromkeys(
        ("codegen", "gptj"),
        Family(
            blocks="transformer.h",
            variants=(Variant(replace(_PARALLEL, attention=("attn",))),),
        ),
    ),
    "gpt_neo": Family(blocks="transformer.h", variants=(Variant(_GPT2),)),
    # Their attention (and MPT's MLP) adds the stream by itself.
    "bloom": Family(blocks="transformer.h"),
    "mpt": Family(blocks="transformer.blocks"),
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

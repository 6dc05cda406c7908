"""Tiny random models of every family, built from their configs; the same seed gives the same weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from foldgpt.objectives import Head

NUM_BLOCKS = 6

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

#: Family → (model type, config values beside the common ones).
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 3}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 3}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "stablelm": ("stablelm", {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "gpt2": ("gpt2", {"n_inner": 48}),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "alibi": False}),
    "falcon-parallel": (
        "falcon",
        {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": True, "alibi": False},
    ),
    "falcon-sequential": (
        "falcon",
        {"new_decoder_architecture": False, "parallel_attn": False, "multi_query": False, "alibi": False},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
    ),
}


def tiny_config(family: str, **changes: Any) -> Any:
    """The config of a tiny model of a family."""
    model_type, extra = CONFIGS[family]
    return AutoConfig.for_model(model_type, **{**_COMMON, **extra, **changes})


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a family, fp32, in eval mode.

    Weights are larger than a fresh initialisation's, so that each block really changes the stream and a
    wrong block shows in the logits.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.6 if "embed" in name or "wte" in name else 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny_hybrid(*attending: int, **changes: Any) -> PreTrainedModel:
    """A tiny random LFM2, of which the given blocks attend and the others are convolutions."""
    torch.manual_seed(0)
    common = {**_COMMON, "block_multiple_of": 8, "full_attn_idxs": list(attending), "layer_types": None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **{**common, **changes})).eval()


def model_of_an_unknown_family(num_blocks: int) -> PreTrainedModel:
    """A tiny random model whose family has no entry: what its sublayers are is not known."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "doge",
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_blocks,
        num_attention_heads=4,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def head_of(weight_VH: torch.Tensor) -> Head:
    """A head without a model."""
    linear = torch.nn.Linear(*weight_VH.shape[::-1], bias=False).requires_grad_(False)
    linear.weight.data = weight_VH
    head = object.__new__(Head)
    head._output, head._cap, head.factor, head.vocab_size = linear, None, 1.0, len(weight_VH)
    return head


def token_ids(model: Any, shape: tuple[int, int] = (2, 20), seed: int = 0) -> torch.Tensor:
    """Random token ids of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.get_text_config().vocab_size, shape, generator=generator)

"""Independent references for folding: plain, slow, and written without foldgpt's own machinery."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

BLOCK_PATHS = (
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "model.language_model.layers",
)
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")


def blocks_of(model: nn.Module) -> nn.ModuleList:
    for path in BLOCK_PATHS:
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError("no blocks")


def skipping(model: nn.Module, removed: Iterable[int]) -> nn.Module:
    """A copy of the model in which the given blocks hand their input on (without a cache)."""
    model = copy.deepcopy(model)
    for index in removed:
        block = blocks_of(model)[index]

        def pass_on(hidden_states: torch.Tensor, *args: Any, _block: nn.Module = block, **kwargs: Any) -> Any:
            return (hidden_states, None) if "Falcon" in type(_block).__name__ else hidden_states

        block.forward = pass_on
    return model


def silenced(model: nn.Module, index: int, sublayer: str) -> nn.Module:
    """A copy of the model in which one sublayer's output matrix and bias are zero."""
    model = copy.deepcopy(model)
    block = blocks_of(model)[index]
    outputs = {
        "attention": ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense"),
        "mlp": ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h"),
    }[sublayer]
    found = [p for name, p in block.named_parameters() if any(f".{output}" in f".{name}" for output in outputs)]
    assert 1 <= len(found) <= 2, "one output matrix, perhaps with a bias"
    for parameter in found:
        nn.init.zeros_(parameter)
    return model


def copied(model: nn.Module, groups: Sequence[Sequence[int]], donor: str, part: str = "both") -> nn.Module:
    """A copy of the model in which the members of each group hold equal matrices (and their biases)."""
    model = copy.deepcopy(model)
    blocks = blocks_of(model)
    for group in groups:
        for name in _shared_names(blocks[group[0]], part):
            tensors = [blocks[index].get_parameter(name).data.clone() for index in group]
            value = {"first": tensors[0], "last": tensors[-1], "mean": torch.stack(tensors).mean(0)}[donor]
            for index in group:
                blocks[index].get_parameter(name).data.copy_(value)
    return model


def _shared_names(block: nn.Module, part: str) -> list[str]:
    matrices = [name for name, p in block.named_parameters() if p.ndim >= 2]
    holders = {name.rpartition(".")[0] for name in matrices}
    names = [name for name, _ in block.named_parameters() if name.rpartition(".")[0] in holders]
    if part == "both":
        return names
    in_attention = [name for name in names if name.split(".")[0] in ATTENTION_NAMES]
    return in_attention if part == "attention" else [name for name in names if name not in in_attention]


def stepwise_logits(model: nn.Module, ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits of a prefill and then one token at a time with the model's own KV cache."""
    output = model(input_ids=ids[:, :prefill], use_cache=True)
    logits = [output.logits]
    for step in range(prefill, ids.shape[1]):
        output = model(input_ids=ids[:, step : step + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)

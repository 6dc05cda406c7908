"""Reordering heads and neurons: it changes nothing of what a block computes, and finds a hidden order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foldgpt.families import decoder_of
from foldgpt.replay import Replay
from foldgpt.sharing.alignment import Alignment, align, can_align
from foldgpt.sharing.covariance import input_moments
from models import tiny_model, token_ids

FAMILIES = ["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3", "granite", "stablelm"]


@torch.no_grad()
def reorder_(block: Any, alignment: Alignment) -> None:
    for name, order in alignment.items():
        linear = block.get_submodule(name)
        linear.weight.copy_(order.weight(linear.weight.clone()))
        if linear.bias is not None:
            linear.bias.copy_(order.bias(linear.bias.clone()))


def aligned(model: Any, reference: int, member: int) -> dict[str, Any]:
    replay = Replay(model, token_ids(model, (3, 16)), boundaries=[0])
    return align(replay.decoder, reference, member, dict(input_moments(replay, [reference, member])))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_reordered_block_computes_the_same(family: str) -> None:
    model = tiny_model(family, num_attention_heads=8, num_key_value_heads=4).double()
    ids = token_ids(model)
    before = model(input_ids=ids, use_cache=False).logits
    alignment = aligned(model, 1, 4)
    block = decoder_of(model).blocks[4]
    changed = [
        name
        for name, order in alignment.items()
        if not torch.equal(order.weight(w := block.get_submodule(name).weight), w)
    ]
    assert len(changed) == 7  # the test would prove nothing of an order that changes nothing
    reorder_(block, alignment)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_only_whole_reordering_is_harmless() -> None:
    model = tiny_model("llama").double()
    ids = token_ids(model)
    before = model(input_ids=ids, use_cache=False).logits
    alignment = aligned(model, 1, 4)
    del alignment["mlp.down_proj"]
    reorder_(decoder_of(model).blocks[4], alignment)
    assert not torch.allclose(model(input_ids=ids, use_cache=False).logits, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (6, 3), (4, 4), (4, 1)])
@torch.no_grad()
def test_a_shuffled_copy_is_put_back(heads: int, groups: int) -> None:
    model = tiny_model("llama", num_attention_heads=heads, num_key_value_heads=groups, head_dim=8, hidden_size=48)
    blocks = decoder_of(model).blocks
    blocks[4].load_state_dict(blocks[1].state_dict())
    generator = torch.Generator().manual_seed(3)
    neurons = torch.randperm(48, generator=generator)
    group_order = torch.randperm(groups, generator=generator)
    size = heads // groups
    query_order = torch.cat([g * size + torch.randperm(size, generator=generator) for g in group_order])

    def rows(order: torch.Tensor) -> torch.Tensor:
        return (order[:, None] * 8 + torch.arange(8)).flatten()

    attention, mlp = blocks[4].self_attn, blocks[4].mlp
    for part, order in (("q_proj", rows(query_order)), ("k_proj", rows(group_order)), ("v_proj", rows(group_order))):
        getattr(attention, part).weight.copy_(getattr(attention, part).weight[order].clone())
    attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows(query_order)].clone())
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.copy_(linear.weight[neurons].clone())
    mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, neurons].clone())
    reorder_(blocks[4], aligned(model, 1, 4))
    for (name, ours), theirs in zip(blocks[1].named_parameters(), blocks[4].parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@torch.no_grad()
def test_moments_move_with_the_inputs() -> None:
    model = tiny_model("llama").double()
    replay = Replay(model, token_ids(model, (3, 16)))
    moments = dict(input_moments(replay, [1, 4]))
    alignment = align(replay.decoder, 1, 4, moments)
    reorder_(replay.decoder.blocks[4], alignment)
    after = dict(input_moments(replay, [4]))[4]
    for name, order in alignment.items():
        expected = after[name].second_KK
        torch.testing.assert_close(order.moments(moments[4][name].second_KK), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("llama", True, True),
        ("olmo2", False, True),
        ("phi3", False, False),
        ("mixtral", True, False),
        ("gpt2", False, False),
        ("opt", False, False),
    ],
)
def test_what_is_not_known_is_left_alone(family: str, attention: bool, mlp: bool) -> None:
    decoder = decoder_of(tiny_model(family))
    assert can_align(decoder, 2, "attention") is attention
    assert can_align(decoder, 2, "mlp") is mlp

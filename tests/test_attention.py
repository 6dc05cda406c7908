"""Attention in tiles is torch's own, forward and backward, for every family and wherever it is not made for a call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from foldgpt import attention
from foldgpt.attention import attention_in_tiles, tiled_attention
from models import tiny_model, token_ids


@pytest.fixture(autouse=True)
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def exact(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [2, 64, 150])
@pytest.mark.parametrize(("heads", "key_heads", "sizes"), [(6, 2, (16, 16)), (4, 4, (8, 24)), (4, 1, (32, 32))])
def test_values_and_gradients_are_exact_to_bf16(
    tokens: int, heads: int, key_heads: int, sizes: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    query = 4 * torch.randn(2, heads, tokens, sizes[0])  # scores of some size: rounded to bf16 they would be far off
    key, value = 4 * torch.randn(2, key_heads, tokens, sizes[0]), torch.randn(2, key_heads, tokens, sizes[1])
    grad = torch.randn(2, tokens, heads, sizes[1]).bfloat16()
    narrow = [part.bfloat16().requires_grad_() for part in (query, key, value)]
    wide = [part.detach().double().requires_grad_() for part in narrow]
    output, nothing = tiled_attention(nn.Module(), *narrow, None, scaling=0.2)
    expected = exact(*wide, 0.2).transpose(1, 2)
    assert nothing is None and output.is_contiguous() and output.dtype == torch.bfloat16
    found = torch.autograd.grad(output, narrow, grad)
    for ours, theirs in zip((output, *found), (expected, *torch.autograd.grad(expected, wide, grad)), strict=True):
        assert error(ours, theirs.detach()) < 6e-3


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "granite", "mistral", "opt"]
)
def test_a_model_computes_what_it_did(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where windows slide and scores are capped, which are not for tiles."""
    model: Any = tiny_model(family).bfloat16()
    ids = token_ids(model, (2, 70))
    calls = []
    apply = attention._Tiles.apply
    monkeypatch.setattr(attention._Tiles, "apply", lambda *args: calls.append(1) or apply(*args))
    with torch.no_grad():
        exact_logits = copy.deepcopy(model).double()(input_ids=ids).logits
        expected = model(input_ids=ids).logits
        implementation = model.config._attn_implementation
        with attention_in_tiles(model, None):
            found = model(input_ids=ids).logits
    assert error(found, exact_logits) < 1.2 * error(expected, exact_logits) < 0.06
    assert model.config._attn_implementation == implementation
    # Mistral's windows slide in every block, and Gemma 2 is run eagerly for its capped scores.
    assert bool(calls) == (family not in ("mistral", "gemma2"))


@pytest.mark.parametrize("keys", [1, 70])
@pytest.mark.parametrize(("heads", "key_heads", "sizes"), [(6, 2, (16, 16)), (4, 4, (8, 24)), (4, 1, (32, 32))])
def test_the_query_of_a_decoding_step_sees_all_keys(
    keys: int, heads: int, key_heads: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **__: pytest.fail("this is made for it"))
    torch.manual_seed(0)
    query = (4 * torch.randn(2, heads, 1, sizes[0])).bfloat16()
    key, value = (4 * torch.randn(2, key_heads, keys, sizes[0])).bfloat16(), torch.randn(2, key_heads, keys, sizes[1])
    output, _ = tiled_attention(nn.Module(), query, key, value.bfloat16(), None, scaling=0.2)
    expected = scaled_dot_product_attention(
        query.double(), key.double(), value.bfloat16().double(), scale=0.2, enable_gqa=True
    )
    assert output.shape == (2, 1, heads, sizes[1]) and error(output, expected.transpose(1, 2)) < 6e-3


def test_a_model_decodes_as_it_did() -> None:
    model: Any = tiny_model("llama").bfloat16()
    ids = token_ids(model, (2, 20))
    with torch.no_grad():
        whole = copy.deepcopy(model).double()(input_ids=ids).logits[:, -1]
        with attention_in_tiles(model):
            cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            found = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert error(found, whole) < 0.06


@pytest.mark.parametrize("what", ["fp32", "mask", "dropout", "behind a cache", "not causal"])
def test_other_calls_go_to_the_kernel_of_torch(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention._Tiles, "apply", lambda *_: pytest.fail("not made for this"))
    query, key, value = (torch.randn(2, heads, 5, 8).bfloat16() for heads in (4, 2, 2))
    module, more = nn.Module(), {}
    module.num_key_value_groups = 2
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril() if what == "mask" else None
    if what == "fp32":
        query, key, value = query.float(), key.float(), value.float()
    elif what == "dropout":
        more = {"dropout": 0.5}
    elif what == "behind a cache":
        query = query[:, :, -2:]
    elif what == "not causal":
        more = {"is_causal": False}
    output, _ = tiled_attention(module, query, key, value, mask, **more)
    assert output.shape == (2, query.shape[2], 4, 8)
    if what in ("fp32", "mask"):
        torch.testing.assert_close(output, exact(query, key, value, 8**-0.5).transpose(1, 2), rtol=2e-2, atol=2e-2)


def test_it_is_not_used_where_the_kernel_is_fast_or_another_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    model.set_attn_implementation("eager")
    with attention_in_tiles(model):
        assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    with attention_in_tiles(model):
        assert model.config._attn_implementation == "foldgpt_tiles"
    for name, value in (("_is_amx_tile_supported", True), ("_is_avx512_bf16_supported", False)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, name, lambda value=value: value)
            with attention_in_tiles(model):
                assert model.config._attn_implementation == "sdpa"

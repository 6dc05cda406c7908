"""Attention of our own is torch's, forward and backward, for every family and wherever it is not made for a call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from foldgpt.attention import calls, fast_attention, products, tiles
from foldgpt.attention.products import products_attention
from foldgpt.attention.tiles import tiled_attention
from foldgpt.errors import UsageError
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.recovery import check_compiler
from models import tiny_model, token_ids


@pytest.fixture(autouse=True)
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.fixture
def has_compiler() -> None:
    try:
        check_compiler(torch.device("cpu"))
    except UsageError as error:
        pytest.skip(str(error))


def exact(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("attention", [tiled_attention, products_attention])
@pytest.mark.parametrize("tokens", [2, 64, 150])
@pytest.mark.parametrize(("heads", "key_heads", "sizes"), [(6, 2, (16, 16)), (4, 4, (8, 24)), (4, 1, (32, 32))])
def test_values_and_gradients_are_exact_to_bf16(
    attention: Any, tokens: int, heads: int, key_heads: int, sizes: tuple[int, int]
) -> None:
    module: Any = nn.Module()
    module.num_key_value_groups = heads // key_heads
    check_exact(attention, module, tokens, heads, key_heads, sizes)


def check_exact(
    attention: Any, module: nn.Module, tokens: int, heads: int, key_heads: int, sizes: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    query = 4 * torch.randn(2, heads, tokens, sizes[0])  # scores of some size: rounded to bf16 they would be far off
    key, value = 4 * torch.randn(2, key_heads, tokens, sizes[0]), torch.randn(2, key_heads, tokens, sizes[1])
    grad = torch.randn(2, tokens, heads, sizes[1]).bfloat16()
    narrow = [part.bfloat16().requires_grad_() for part in (query, key, value)]
    wide = [part.detach().double().requires_grad_() for part in narrow]
    output, nothing = attention(module, *narrow, None, scaling=0.2)
    expected = exact(*wide, 0.2).transpose(1, 2)
    assert nothing is None and output.is_contiguous() and output.dtype == torch.bfloat16
    found = torch.autograd.grad(output, narrow, grad)
    of_kernel = exact(*narrow, 0.2).transpose(1, 2)
    kernel = (of_kernel, *torch.autograd.grad(of_kernel, narrow, grad))
    right = (expected, *torch.autograd.grad(expected, wide, grad))
    for ours, theirs, exactly in zip((output, *found), kernel, right, strict=True):
        # Of rows that see one token alone the gradient is 0, and what torch's kernel makes of it noise as well.
        assert error(ours, exactly.detach()) < max(6e-3, 1.2 * error(theirs, exactly.detach()))


def test_compiled_products_are_as_exact(has_compiler: None) -> None:
    """A compiler leaves out roundings that it thinks nobody wants."""
    torch._dynamo.reset()
    check_exact(torch.compile(products_attention), nn.Module(), 150, 4, 2, (16, 16))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_compiled_model_learns_as_it_did(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model: Any = tiny_model(family).bfloat16()
    ids = token_ids(model, (2, 140))
    weights = [block.mlp.down_proj.weight for block in decoder_of(model).blocks]
    exactly: Any = copy.deepcopy(model).double()
    of_exact = [block.mlp.down_proj.weight for block in decoder_of(exactly).blocks]
    expected = torch.autograd.grad(exactly(input_ids=ids, labels=ids).loss, of_exact)
    of_kernel = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weights)
    torch._dynamo.reset()
    with fast_attention(model, compiled=True):
        for block in decoder_of(model).blocks:
            block.compile(backend="aot_eager")
        with torch.autograd.profiler.profile() as profile:
            found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weights)
    names = {event.key for event in profile.key_averages()}
    kernel_name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert kernel_name in names and f"{kernel_name}_backward" not in names
    for ours, kernel, exact_grad in zip(found, of_kernel, expected, strict=True):
        assert error(ours, exact_grad) < 1.2 * error(kernel, exact_grad) < 0.1


def test_long_windows_go_to_the_kernel_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these each tile would be compiled by itself, and hold tables of as many keys."""
    applied = []
    apply = products._Products.apply
    monkeypatch.setattr(products._Products, "apply", lambda *args: applied.append(1) or apply(*args))
    for tokens, expected in ((1024, [1]), (1025, [1])):
        query, key, value = torch.randn(3, 1, 1, tokens, 8).bfloat16()
        products_attention(nn.Module(), query, key, value, None)
        assert applied == expected


def test_an_older_kernel_is_asked_for_no_grouped_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products._Products, "apply", lambda *_: pytest.fail("it takes them for others"))
    monkeypatch.setattr(products, "_KNOWS_GROUPS", False)
    module: Any = nn.Module()
    module.num_key_value_groups = 2
    query, key, value = (torch.randn(1, heads, 5, 8).bfloat16() for heads in (4, 2, 2))
    assert products_attention(module, query, key, value, None)[0].shape == (1, 5, 4, 8)


def test_a_folded_model_whose_attention_asks_for_torch_s_by_name_keeps_it() -> None:
    """Falcon's would take another name for none, and a boolean mask for numbers to add."""
    model: Any = tiny_model("falcon").bfloat16()
    plan = FoldPlan.create(source_model_of(model), removed=[1], groups=[Group(blocks=(2, 3))])
    fold_(model, plan)
    assert type(model).__name__ == "FoldedFalconForCausalLM"
    with fast_attention(model):
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "granite", "mistral", "opt"]
)
def test_a_model_computes_what_it_did(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where windows slide and scores are capped, which are not for tiles."""
    model: Any = tiny_model(family).bfloat16()
    ids = token_ids(model, (2, 70))
    calls = []
    apply = tiles._Tiles.apply
    monkeypatch.setattr(tiles._Tiles, "apply", lambda *args: calls.append(1) or apply(*args))
    with torch.no_grad():
        exact_logits = copy.deepcopy(model).double()(input_ids=ids).logits
        expected = model(input_ids=ids).logits
        implementation = model.config._attn_implementation
        with fast_attention(model, None):
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
    monkeypatch.setattr(calls, "sdpa_attention_forward", lambda *_, **__: pytest.fail("this is made for it"))
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
        with fast_attention(model):
            cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            found = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert error(found, whole) < 0.06


@pytest.mark.parametrize("attention", [tiled_attention, products_attention])
@pytest.mark.parametrize("what", ["fp32", "mask", "dropout", "behind a cache", "not causal"])
def test_other_calls_go_to_the_kernel_of_torch(attention: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (tiles._Tiles, products._Products):
        monkeypatch.setattr(one, "apply", lambda *_: pytest.fail("not made for this"))
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
    output, _ = attention(module, query, key, value, mask, **more)
    assert output.shape == (2, query.shape[2], 4, 8)
    if what in ("fp32", "mask"):
        torch.testing.assert_close(output, exact(query, key, value, 8**-0.5).transpose(1, 2), rtol=2e-2, atol=2e-2)


def test_it_is_not_used_where_the_kernel_is_fast_or_another_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    with fast_attention(model):
        assert model.config._attn_implementation == "sdpa", "of float32"
    model = model.bfloat16()
    model.set_attn_implementation("eager")
    with fast_attention(model):
        assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    with fast_attention(model):
        assert model.config._attn_implementation == "foldgpt_tiles"
    for name, value in (("_is_amx_tile_supported", True), ("_is_avx512_bf16_supported", False)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, name, lambda value=value: value)
            with fast_attention(model):
                assert model.config._attn_implementation == "sdpa"
            with fast_attention(model, compiled=True):
                expected = "sdpa" if name == "_is_avx512_bf16_supported" else "foldgpt_products"
                assert model.config._attn_implementation == expected

"""Field notes R1 to R6: what goes wrong when blocks are removed. (R7 is in the family contract.)"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    StaticCache,
)

from foldgpt.errors import PlanError, UnsupportedModelError, UsageError
from foldgpt.families import check_config, decode, decoder_of, read_blocks, remap_config_
from foldgpt.folding import fold_, predicted_parameters, save_folded, source_model_of
from foldgpt.modeling.modeling_foldgpt import Absent
from foldgpt.plan import FoldPlan
from foldgpt.selection import Request, select
from foldgpt.selection.units import Units
from models import tiny_config, tiny_model, token_ids
from reference import skipping, stepwise_logits

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def small(model_type: str, **changes: Any) -> Any:
    """A tiny random model of a family that is not in the contract, of six blocks unless said otherwise."""
    torch.manual_seed(0)
    common = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**common, **heads, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.25)
    return model.eval()


def test_r1_every_layer_index_is_renumbered() -> None:
    model = tiny_model("llama")
    fold_(model, FoldPlan.create(source_model_of(model), removed=[0, 2]))
    for position, block in enumerate(decoder_of(model).blocks):
        indices = {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")}
        assert indices == {position}


@pytest.mark.parametrize("name", ["layer_id", "layer_number"])
def test_r1_holds_for_the_other_names_of_an_index(name: str) -> None:
    model = tiny_model("llama")
    for index, block in enumerate(decoder_of(model).blocks):
        setattr(block.self_attn, name, index)
    fold_(model, FoldPlan.create(source_model_of(model), removed=[0, 2]))
    assert [getattr(block.self_attn, name) for block in decoder_of(model).blocks] == [0, 1, 2, 3]


@torch.no_grad()
def test_r1_the_trap_is_real() -> None:
    """Blocks deleted without renumbering: the cache slots are wrong. If this passes, the contract is blind."""
    model = tiny_model("llama")
    decoder = decoder_of(model)
    decoder.set_blocks(torch.nn.ModuleList([b for i, b in enumerate(decoder.blocks) if i not in (0, 2)]))
    model.config.num_hidden_layers = 4
    ids = token_ids(model)
    with pytest.raises((IndexError, AssertionError)):
        torch.testing.assert_close(stepwise_logits(model, ids, 5), model(ids, use_cache=False).logits)


@torch.no_grad()
def test_r2_number_of_blocks_is_updated_in_a_text_sub_config(tmp_path: Path) -> None:
    text = tiny_config("gemma3").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    ids = token_ids(model)
    expected = skipping(model, (1, 3))(ids).logits
    plan = FoldPlan.create(source_model_of(model), removed=[1, 3])
    fold_(model, plan)
    assert model.config.text_config.num_hidden_layers == 4
    assert len(model.config.text_config.layer_types) == 4
    save_folded(model, plan, tmp_path / "folded")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert torch.equal(loaded(ids).logits, expected)


def test_r3_layer_types_are_sliced_not_regenerated() -> None:
    model = tiny_model("gemma3")
    types = list(model.config.layer_types)
    assert types == ["sliding_attention", "sliding_attention", "full_attention"] * 2
    fold_(model, FoldPlan.create(source_model_of(model), removed=[0]))
    assert model.config.layer_types == types[1:]


def test_r4_smollm3_rope_flags_follow_their_blocks() -> None:
    config = tiny_config("smollm3")
    assert config.no_rope_layers == [1, 1, 0, 1, 1, 0]
    remap_config_(config, (0, 2, 3, 5))
    assert config.no_rope_layers == [1, 0, 1, 0]


def test_r4_qwen_moe_step_becomes_a_list_of_dense_blocks() -> None:
    config = tiny_config("qwen3_moe")  # sparse: blocks 3 and 5; every second, but for block 1
    remap_config_(config, (1, 2, 3, 5))
    assert (config.decoder_sparse_step, config.mlp_only_layers) == (1, [0, 1])


def test_r4_llama4_moe_layers_are_remapped() -> None:
    config = AutoConfig.for_model("llama4_text", num_hidden_layers=6, interleave_moe_layer_step=2)
    assert config.moe_layers == [1, 3, 5]
    given = [list(values) for values in (config.no_rope_layers, config.layer_types)]
    kept = (0, 1, 3, 5)
    remap_config_(config, kept)
    assert config.moe_layers == [1, 2, 3]
    # Block 3 is the one without rotary positions, and sees everything.
    assert len(set(given[0])) == len(set(given[1])) == 2
    assert [config.no_rope_layers, config.layer_types] == [[values[i] for i in kept] for values in given]


@pytest.mark.parametrize(("kept", "dense"), [((0, 1, 2, 3, 4, 5), 2), ((1, 2, 3), 1), ((2, 3), 0), ((0, 1, 5), 2)])
def test_r4_first_dense_blocks_of_deepseek_are_counted(kept: tuple[int, ...], dense: int) -> None:
    # As in DeepSeek's own checkpoints, whose configs say a frequency too.
    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=6, first_k_dense_replace=2, moe_layer_freq=1)
    check_config(config)
    remap_config_(config, kept)
    assert config.first_k_dense_replace == dense


@torch.no_grad()
def test_r4_deepseek_loads_with_the_right_dense_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, first_k_dense_replace=2, **small, **latent,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = token_ids(model)
    expected = skipping(model, (1,))(ids, use_cache=False).logits
    plan = FoldPlan.create(source_model_of(model), removed=[1])
    fold_(model, plan)
    save_folded(model, plan, tmp_path / "folded")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(loaded(ids, use_cache=False).logits, expected)


def test_r4_lfm2_attention_indices_and_types_agree() -> None:
    config = AutoConfig.for_model("lfm2", num_hidden_layers=6, full_attn_idxs=[2, 5])
    types = list(config.layer_types)
    remap_config_(config, (1, 2, 4, 5))
    assert config.layer_types == [types[i] for i in (1, 2, 4, 5)]
    assert config.full_attn_idxs == [1, 3]


def test_r4_qwen2_window_limit_shrinks_with_the_blocks_below_it() -> None:
    config = tiny_config("qwen2")
    types = list(config.layer_types)
    remap_config_(config, (1, 3, 4))
    assert config.layer_types == [types[i] for i in (1, 3, 4)]
    assert config.max_window_layers == 1


def test_r4_per_block_sizes_of_gemma3n_are_sliced() -> None:
    config = AutoConfig.for_model(
        "gemma3n_text", num_hidden_layers=6, num_kv_shared_layers=0, hidden_size_per_layer_input=0
    )
    config.intermediate_size = [16, 32, 48, 64, 80, 96]
    config.activation_sparsity_pattern = [0.9, 0.9, 0.0, 0.0, 0.0, 0.0]
    remap_config_(config, (1, 2, 5))
    assert config.intermediate_size == [32, 48, 96]
    assert config.activation_sparsity_pattern == [0.9, 0.0, 0.0]


def test_r4_block_types_of_nemotron_h_follow() -> None:
    config = AutoConfig.for_model("nemotron_h")
    types = list(config.layers_block_type)
    assert len(types) == config.num_hidden_layers
    kept = tuple(range(1, len(types)))
    check_config(config)
    remap_config_(config, kept)
    assert config.num_hidden_layers == len(kept)
    assert list(config.layers_block_type) == types[1:]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_layer_period", 4),
        ("cross_attention_layers", [1, 3]),
        ("my_block_pattern", "MA*"),
        ("some_list", [0, 1, 2, 3, 4, 5]),
        ("scale_by_every_n", 2),
        ("per_layer_config", {"1": {"head_dim": 8}}),
    ],
)
def test_r4_unknown_index_dependent_field_is_refused_by_name(field: str, value: Any) -> None:
    model = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(model), removed=[1])
    object.__setattr__(model.config, field, value) if field != "per_layer_config" else None
    if field == "per_layer_config":
        model.config.per_layer_config = {1: {"rms_norm_eps": 1e-3}}
    with pytest.raises(UnsupportedModelError, match=field):
        fold_(model, plan)
    assert len(decoder_of(model).blocks) == 6, "a refused model is left as it was"


def test_r4_gpt2_scaling_by_layer_index_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="scale_attn_by_inverse_layer_idx"):
        check_config(tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True))


@torch.no_grad()
def test_r4_minicpm3_scales_its_blocks_as_before(tmp_path: Path) -> None:
    """Each block divides `scale_depth` by the square root of the number of blocks."""
    model = small("minicpm3", scale_depth=1.4, **LATENT)
    ids = token_ids(model)
    expected = skipping(model, (1, 3))(ids, use_cache=False).logits
    plan = FoldPlan.create(source_model_of(model), removed=[1, 3])
    fold_(model, plan)
    assert model.config.scale_depth == pytest.approx(1.4 * (4 / 6) ** 0.5)
    save_folded(model, plan, tmp_path / "folded")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(loaded(ids, use_cache=False).logits, expected)


def test_r4_blocks_that_compute_with_their_own_index_are_refused() -> None:
    model = small("diffllama")
    plan = FoldPlan.create(source_model_of(model), removed=[1])
    with pytest.raises(UnsupportedModelError, match=r"model type 'diffllama' compute lambda_init from their own index"):
        fold_(model, plan)
    assert len(decoder_of(model).blocks) == 6


def test_r4_beam_whose_residual_sums_know_their_depth_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'beam' compute the weights of their residual sums"):
        check_config(AutoConfig.for_model("beam", num_hidden_layers=6))


def modernbert() -> Any:
    """A tiny decoder whose first block has no norm before its attention."""
    return small("modernbert-decoder", num_key_value_heads=4, pad_token_id=0, eos_token_id=1, bos_token_id=2)


@pytest.mark.parametrize("removed", [[0], [0, 1, 3]])
def test_r4_a_first_block_unlike_the_others_must_stay(removed: list[int]) -> None:
    model = modernbert()
    assert isinstance(model.model.layers[0].attn_norm, torch.nn.Identity)
    plan = FoldPlan.create(source_model_of(model), removed=removed)
    first = plan.kept[0]
    message = rf"cannot remove block 0: .*'modernbert-decoder'.* no norm before its attention, and block {first} would"
    for refusing in (fold_, predicted_parameters):
        with pytest.raises(PlanError, match=message):
            refusing(model, plan)
    with pytest.raises(PlanError, match=message):
        remap_config_(model.config, plan.kept)
    assert len(decoder_of(model).blocks) == model.config.num_hidden_layers == 6


def test_r4_searches_leave_such_a_first_block() -> None:
    model = modernbert()
    decoder = decoder_of(model)
    units = Units.blocks(6, 2, decoder)
    assert units.is_allowed([1, 4]) and not units.is_allowed([0]) and not units.is_allowed([0, 3])
    assert Units.blocks(6, 2, decoder_of(tiny_model("llama"))).is_allowed([0, 3])
    drawn = [select("random", Request(6, 3, model=model, seed=seed)).removed for seed in range(10)]
    assert all(len(removed) == 3 and 0 not in removed for removed in drawn)
    with pytest.raises(UsageError, match="in this family the first block must stay"):
        Units.blocks(6, 6, decoder).fill(range(6))


def test_r4_the_blocks_behind_such_a_first_block_can_go(tmp_path: Path) -> None:
    model = modernbert()
    plan = FoldPlan.create(source_model_of(model), removed=[1, 4])
    fold_(model, plan)
    assert save_folded(model, plan, tmp_path / "folded").logits_identical


@pytest.mark.parametrize(
    ("model_type", "values", "expected"),
    [
        ("qwen3_5_text", {"mtp_num_hidden_layers": 1}, {"mtp_num_hidden_layers": 0}),
        (
            "mellum",
            {"num_mtp_layers": 1, "mtp_layer_types": ["sliding_attention"], "mtp_mlp_layer_types": ["sparse"]},
            {"num_mtp_layers": 0},
        ),
    ],
)
def test_r4_blocks_for_multi_token_prediction_are_not_counted(
    model_type: str, values: dict[str, Any], expected: dict[str, Any]
) -> None:
    """transformers does not load them: the folded model has none."""
    config = AutoConfig.for_model(model_type, num_hidden_layers=6, **values)
    types = list(config.layer_types)
    remap_config_(config, (0, 2, 3, 5))
    assert {name: getattr(config, name) for name in expected} == expected
    again = AutoConfig.for_model(**config.to_dict())
    assert {name: getattr(again, name) for name in expected} == expected
    assert again.layer_types == [types[index] for index in (0, 2, 3, 5)]


def test_r4_the_order_of_cohere2s_pattern_is_no_index() -> None:
    config = AutoConfig.for_model("cohere2", num_hidden_layers=6, order_of_interleaved_layers="local_attn_first")
    types = list(config.layer_types)
    remap_config_(config, (1, 3, 4))
    assert config.layer_types == [types[index] for index in (1, 3, 4)]


KIMI = {"kda_layers": [1, 2, 3, 5, 6, 7], "full_attn_layers": [4, 8], "head_dim": 8, "num_heads": 4}


@pytest.mark.parametrize("kept", [(0, 2, 3, 5, 7), (3, 7), (4, 5, 7)])
def test_r4_lists_of_blocks_inside_a_nested_config_are_remapped(kept: tuple[int, ...]) -> None:
    """Kimi Linear's lists count from 1. Programs that do not read `layer_types` read these."""
    config = AutoConfig.for_model("kimi_linear", num_hidden_layers=8, linear_attn_config=KIMI)
    types = list(config.layer_types)
    assert types == (["linear_attention"] * 3 + ["full_attention"]) * 2
    remap_config_(config, kept)
    assert config.layer_types == [types[index] for index in kept]
    values = config.to_dict()
    del values["layer_types"]
    assert AutoConfig.for_model(**values).layer_types == config.layer_types
    assert {name: config.linear_attn_config[name] for name in ("head_dim", "num_heads")} == {
        "head_dim": 8,
        "num_heads": 4,
    }
    assert KIMI["kda_layers"] == [1, 2, 3, 5, 6, 7], "the caller's lists are the caller's"


def test_r4_nested_lists_that_do_not_count_from_1_are_refused() -> None:
    config = AutoConfig.for_model("kimi_linear", num_hidden_layers=8)
    config.linear_attn_config = {"kda_layers": [0, 1, 2], "full_attn_layers": [3]}
    with pytest.raises(UnsupportedModelError, match=r"linear_attn_config\.kda_layers' = \[0, 1, 2\] should number"):
        remap_config_(config, (0, 1))
    assert config.num_hidden_layers == 8


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        ({"dense_layers": [0, 2]}, True),
        ({"block_indices": (1,)}, True),
        ({"dense_layers": []}, False),
        ({"sections": [16, 24, 24]}, False),
        ({"every": 2.0, 3: [1, 2]}, False),
    ],
)
def test_r4_an_unknown_list_of_blocks_in_a_nested_config_is_refused(value: dict[Any, Any], refused: bool) -> None:
    config = tiny_config("llama")
    config.my_settings = value
    expected = pytest.raises(UnsupportedModelError, match=rf"my_settings\.{next(iter(value))}")
    with expected if refused else nullcontext():
        check_config(config)


def test_r4_embeddings_for_each_block_are_refused() -> None:
    config = AutoConfig.for_model("gemma3n_text", num_kv_shared_layers=0)
    with pytest.raises(UnsupportedModelError, match="hidden_size_per_layer_input"):
        check_config(config)


def indexed() -> Any:
    return AutoConfig.for_model("glm_moe_dsa", num_hidden_layers=4, indexer_types=["full", "shared"] * 2)


@pytest.mark.parametrize(("kept", "cut"), [((1, 2, 3), (0, 1)), ((0, 1, 3), (2, 3))])
def test_r5_an_indexer_that_others_read_must_stay(kept: tuple[int, ...], cut: tuple[int, int]) -> None:
    config = indexed()
    message = rf"cannot remove block {cut[0]} and keep block {cut[1]}: .*indexer_types.* Keep block {cut[0]}"
    with pytest.raises(PlanError, match=message):
        remap_config_(config, kept)
    assert config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("kept", "types"), [((2, 3), ["full", "shared"]), ((0, 2, 3), ["full", "full", "shared"]), ((0,), ["full"])]
)
def test_r5_indexers_go_with_all_that_read_them(kept: tuple[int, ...], types: list[str]) -> None:
    config = indexed()
    remap_config_(config, kept)
    assert config.indexer_types == types


def test_r5_searches_draw_no_set_that_takes_an_indexer_from_its_readers() -> None:
    units = replace(Units.blocks(4, 1), read_blocks=tuple(read_blocks(indexed()).items()))
    assert units.read_blocks == ((1, 0), (3, 2))
    assert [units.is_allowed(removed) for removed in ({0}, {1}, {0, 1}, {1, 2}, {2, 3})] == [0, 1, 1, 0, 1]
    assert units.fill([2, 0, 1]) == {1}
    assert replace(units, target=2).fill([2, 0, 1]) == {0, 1}


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_r5_shared_kv_blocks_are_refused(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, hidden_size_per_layer_input=0, num_kv_shared_layers=2)
    with pytest.raises(UnsupportedModelError, match="num_kv_shared_layers"):
        remap_config_(config, (0, 1, 2))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_r6_first_attention_of_each_type_must_stay(family: str) -> None:
    model = tiny_model(family)
    source = source_model_of(model)
    for first in (0,) if family == "llama" else (0, 2):
        before = copy.deepcopy(model)
        with pytest.raises(PlanError, match=f"attention of block {first}"):
            fold_(model, FoldPlan.create(source, removed_attention=[first]))
        ids = token_ids(model)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before(ids).logits)


def test_r6_holds_for_the_first_kept_block_when_earlier_ones_go() -> None:
    model = tiny_model("llama")
    with pytest.raises(PlanError, match="attention of block 1"):
        fold_(model, FoldPlan.create(source_model_of(model), removed=[0], removed_attention=[1]))


def test_r6_a_hybrid_model_keeps_one_of_the_blocks_that_attend() -> None:
    model = small("qwen3_next", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    types = model.config.layer_types
    assert types == ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 2
    with pytest.raises(PlanError, match=r"cannot remove all blocks that attend.* Keep at least one of \[3\]"):
        fold_(model, FoldPlan.create(source_model_of(model), removed=[3, 4]))
    assert len(decoder_of(model).blocks) == 6
    units = Units.blocks(6, 1, decoder_of(model))
    assert [block for block in range(6) if not units.is_allowed({block})] == [3]
    fold_(model, FoldPlan.create(source_model_of(model), removed=[0, 1]))


@pytest.mark.parametrize(
    ("kinds", "removed", "allowed"),
    [
        (("conv", "full_attention", "conv"), {1}, False),
        (("conv", "full_attention", "conv"), {0, 2}, True),
        (("conv", "sliding_attention", "full_attention"), {2}, True),
        (("linear_attention", "linear_attention", "moe"), {0, 2}, True),
        (("linear_attention", "linear_attention", "moe"), {0, 1, 2}, False),
    ],
)
def test_r6_a_search_leaves_a_block_that_attends(kinds: tuple[str, ...], removed: set[int], allowed: bool) -> None:
    assert Units(3, 1, (1, 1, 1), 1, kinds).is_allowed(removed) == allowed


def without_one_attention(family: str) -> Any:
    """A model of which a sliding attention behind the first one is removed, that never ends a text by itself."""
    model = tiny_model(family)
    sliding = [i for i, kind in enumerate(DynamicCache(config=model.config).layers) if kind.is_sliding]
    assert len(sliding) > 1
    fold_(model, FoldPlan.create(source_model_of(model), removed_attention=[sliding[1]]))
    model.generation_config.eos_token_id = None
    return model


def greedy(model: Any, ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The likeliest tokens after a prompt, without a cache."""
    for _ in range(num_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}, {}],
    ids=["lookup", "static", "dynamic"],
)
def test_r6_generation_goes_on_past_an_empty_sliding_window(family: str, options: dict[str, Any]) -> None:
    """Windows of 8 tokens: short of them, across them and beyond them."""
    model = without_one_attention(family)
    ids = token_ids(model, (1, 3)).repeat(1, 2)
    expected = greedy(model, ids, 12)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, **options), expected)
    if "prompt_lookup_num_tokens" in options:
        assisted = model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=tiny_model(family))
        assert torch.equal(assisted, expected)


@torch.no_grad()
def test_r6_beams_are_those_without_a_cache() -> None:
    model = without_one_attention("gemma3")
    ids = token_ids(model, (2, 6))
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_r6_a_cache_with_an_empty_sliding_window_can_be_cropped() -> None:
    model = without_one_attention("gemma3")
    ids = token_ids(model, (2, 6))
    cache = DynamicCache(config=model.config)
    decode(model, ids, cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [6] * 6
    cache.crop(-2)
    again, _ = decode(model, ids[:, 4:], cache)
    torch.testing.assert_close(again, model(ids, use_cache=False).logits[:, 4:], atol=1e-4, rtol=1e-4)


def test_r6_an_absent_attention_finds_the_cache_under_any_name_and_does_without() -> None:
    config = tiny_config("mistral")
    states = torch.ones(2, 3, 32)
    for place in ("cache", "past_key_values", "layer_past", None):
        cache = DynamicCache(config=config)
        arguments = ((None, cache), {}) if place is None else ((), {place: cache})
        output, weights = Absent(returns_pair=True, layer_idx=1)(states, *arguments[0], **arguments[1])
        assert weights is None and not output.any()
        assert [layer.get_seq_length() for layer in cache.layers] == [0, 3, 0, 0, 0, 0]
        assert cache.layers[1].keys.numel() == 0
    assert Absent(returns_pair=True, layer_idx=1)(states, None, cache=None)[1] is None


def test_r6_an_offloaded_cache_is_told_of_every_position() -> None:
    """Each position makes it fetch the next one."""

    class Offloaded(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            self.offloading = True
            self.told: list[int] = []

        def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            self.told.append(layer_idx)
            self.offloading = False  # streams of a GPU
            result = super().update(keys, values, layer_idx, *args, **kwargs)
            self.offloading = True
            return result

    model = tiny_model("llama")
    fold_(model, FoldPlan.create(source_model_of(model), removed_attention=[2, 3]))
    ids, cache = token_ids(model), Offloaded()
    with torch.no_grad():
        decode(model, ids[:, :8], cache)
        logits, _ = decode(model, ids[:, 8:], cache)
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, 8:], atol=1e-4, rtol=1e-4)
    assert cache.told == [0, 1, 2, 3, 4, 5] * 2


@torch.no_grad()
def test_r6_an_empty_sliding_window_compiles_whole() -> None:
    model = without_one_attention("mistral")
    ids = token_ids(model, (1, 6))
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=8)):
        decode(model, ids[:, :5], cache)
        step, _ = decode(compiled, ids[:, 5:], cache)
        torch.testing.assert_close(step, expected[:, 5:], atol=1e-4, rtol=1e-4)


def test_r6_gradient_checkpointing_goes_past_an_absent_attention() -> None:
    model = without_one_attention("mistral").train()
    ids = token_ids(model)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)

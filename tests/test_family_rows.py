"""What a row of the table of families says is so: of all that are not in the contract, on tiny random models."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from foldgpt import pipeline
from foldgpt.compensation import compensate, merge_, why_not
from foldgpt.errors import PlanError, UnsupportedModelError
from foldgpt.families import FAMILIES, decoder_of, remap_config_
from foldgpt.folding import fold_, predicted_parameters, same_kind, save_folded, source_model_of, unfold_
from foldgpt.folding.kinds import shareable_leaves
from foldgpt.plan import FoldPlan, Group
from foldgpt.recipe import Recipe
from foldgpt.recovery import RecoverySettings, make_trainable_, merge_trained_
from foldgpt.replay import Replay
from foldgpt.selection.units import Units
from foldgpt.sharing import fit_sharing
from foldgpt.sharing.alignment import can_align
from models import CONFIGS, tiny_model, token_ids
from run_inputs import tiny_recipe, tiny_text
from tiny import tiny_tokenizer

#: Its text model is that of `gemma3_text`; beside it is one for images.
_BUILT_ELSEWHERE = {"gemma3"}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "afmoe": {**_MIXTURE, "num_shared_experts": 1, "num_dense_layers": 1, "head_dim": 8, "sliding_window": 8},
    "codegen": {"rotary_dim": 4, "n_inner": 48},
    "cohere2": {"sliding_window": 8},
    "deepseek_v2": {**_DEEPSEEK, **_LATENT, "head_dim": 4},
    "deepseek_v3": {**_DEEPSEEK, **_LATENT, "head_dim": 4},
    "dots1": _DEEPSEEK,
    "exaone4": {"sliding_window": 8},
    "flex_olmo": _MIXTURE,
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {**_DEEPSEEK, "head_dim": 8},
    "glm4_moe_lite": {**_DEEPSEEK, **_LATENT},
    "gpt_bigcode": {"n_inner": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "num_layers": 6, "num_heads": 4},
    "gptj": {"rotary_dim": 4, "n_inner": 48},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "lfm2": {"block_multiple_of": 8, "full_attn_idxs": [1, 4], "layer_types": None},
    "lfm2_moe": {**_MIXTURE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"] * 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "ministral": {"head_dim": 8, "sliding_window": 8},
    "ministral3": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "olmo3": {"sliding_window": 8},
    "olmoe": _MIXTURE,
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MIXTURE, "shared_expert_intermediate_size": 16},
    "seed_oss": {"head_dim": 8},
    "vaultgemma": {"head_dim": 8, "sliding_window": 8},
}
for _name in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"):
    _EXTRA[_name] = {
        **({} if _name == "qwen3_5_text" else {**_MIXTURE, "shared_expert_intermediate_size": 16}),
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }

IN_CONTRACT = {model_type for model_type, _ in CONFIGS.values()}
ROWS = sorted({name for name, row in FAMILIES.items() if row.variants} - IN_CONTRACT - _BUILT_ELSEWHERE)
#: Of these only the place of the blocks is known.
WHOLE = sorted({name for name, row in FAMILIES.items() if not row.variants})
#: In the contract as they are built; here as they are loaded.
MIXTURES = ("mixtral", "qwen3_moe")
HYBRID = {"lfm2", "lfm2_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"}


def tiny(model_type: str) -> Any:
    torch.manual_seed(0)
    common = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **{**common, **_EXTRA.get(model_type, {})})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.6 if "embed" in name else 0.15)
            elif "A_log" not in name and "dt_bias" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def silenced(model: nn.Module, index: int, name: str) -> nn.Module:
    """A copy of the model in which one module of a block puts out zeros."""
    model = copy.deepcopy(model)

    def zeros(_module: nn.Module, _args: object, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    decoder_of(model).blocks[index].get_submodule(name).register_forward_hook(zeros)
    return model


def seen_in(model: nn.Module, index: int, names: list[str]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What goes into a block and comes out of it, and what some of its modules put out."""
    block = decoder_of(model).blocks[index]
    found: dict[str, Tensor] = {}
    ends: list[Tensor] = []

    def first(value: Any) -> Tensor:
        tensor: Tensor = (value[0] if isinstance(value, tuple) else value).clone()
        return tensor

    handles = [
        block.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: found.__setitem__(name, first(output))
        )
        for name in names
    ]
    handles.append(
        block.register_forward_pre_hook(
            lambda _module, args, kwargs: ends.append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        )
    )
    handles.append(block.register_forward_hook(lambda _module, _args, output: ends.append(first(output))))
    model(token_ids(model), use_cache=False)
    for handle in handles:
        handle.remove()
    return ends[0], ends[1], found


def input_of(model: nn.Module, index: int, name: str) -> Tensor:
    """What goes into one module of a block."""
    found: list[Tensor] = []
    handle = (
        decoder_of(model)
        .blocks[index]
        .get_submodule(name)
        .register_forward_pre_hook(
            lambda _module, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        )
    )
    model(token_ids(model), use_cache=False)
    handle.remove()
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ROWS)
def test_a_block_adds_its_sublayers_to_the_stream_and_nothing_else(model_type: str) -> None:
    model = tiny(model_type)
    decoder = decoder_of(model)
    assert decoder.sublayers is not None
    for index, block in enumerate(decoder.blocks):
        assert not list(block.parameters(recurse=False)), "what stands in the block itself is in no sublayer"
        added = [
            decoder.sublayers.norm_behind(sublayer) or decoder.modules(index, sublayer)[-1]
            for sublayer in ("attention", "mlp")
        ]
        before, after, found = seen_in(model, index, added)
        if decoder.sublayers.between is not None:
            between = input_of(model, index, decoder.sublayers.between)
            torch.testing.assert_close(between, before + found[added[0]], rtol=1e-4, atol=1e-4)
        expected = before + sum(part.view(before.shape) for part in found.values())
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
        named = {
            *decoder.modules(index, "attention"),
            *decoder.modules(index, "mlp"),
            *decoder.sublayers.norms("attention"),
            *decoder.sublayers.norms("mlp"),
        }
        others = {name for name, child in block.named_children() if list(child.parameters())} - named
        assert others <= ({"input_layernorm", "ln_1"} if decoder.sublayers.between is None else set())


@torch.no_grad()
@pytest.mark.parametrize("model_type", ROWS)
def test_a_removed_sublayer_is_one_that_is_silent(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    decoder, ids = decoder_of(model), token_ids(model)
    attending = [index for index in range(6) if decoder.attends(index)]
    # The first that attends of its kind says how long the KV cache is.
    last = attending[-1]
    for index, sublayer in ((last, "attention"), (2, "mlp")):
        folded = copy.deepcopy(model)
        plan = FoldPlan.create(source_model_of(model), **{f"removed_{sublayer}": [index]})
        fold_(folded, plan)
        removed = decoder.modules(index, sublayer)[-1]  # type: ignore[arg-type]
        behind = decoder.sublayers.norm_behind(sublayer)  # type: ignore[union-attr, arg-type]
        expected = silenced(model, index, behind or removed)(ids, use_cache=False).logits
        torch.testing.assert_close(folded(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, model(ids, use_cache=False).logits, atol=1e-2)
        save_folded(folded, plan, tmp_path / sublayer, expected_parameters=predicted_parameters(model, plan))


def loaded(model: Any, folder: Path) -> Any:
    """A model as it comes from its files, whose names for the weights may be others than those in memory."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", [*ROWS, *MIXTURES])
def test_removed_blocks_are_compensated_and_blocks_share(model_type: str, tmp_path: Path) -> None:
    model = loaded(tiny_model(model_type) if model_type in MIXTURES else tiny(model_type), tmp_path / "source")
    assert why_not(model) is None
    decoder = decoder_of(model)
    ids = token_ids(model, (16, 24))
    corrections = compensate(model, [3], ids)
    assert list(corrections) == [2]
    target = Replay(model, ids).states[4]
    plain = Replay(model, ids).states[3]
    merged = copy.deepcopy(model)
    merge_(merged, corrections)
    corrected = Replay(merged, ids).states[3]
    assert (corrected - target).square().sum() < (plain - target).square().sum()

    pair = next(
        (i, j)
        for i in range(6)
        for j in range(i + 1, 6)
        if same_kind(decoder, i, j, ("attention", "mlp")) and i != 3 != j
    )
    group = Group(blocks=pair, private=("norms", "scales"), ranks=2)
    plan = FoldPlan.create(source_model_of(merged), removed=[3], groups=[group])
    fold_(merged, plan)
    save_folded(merged, plan, tmp_path / "folded", expected_parameters=predicted_parameters(model, plan))
    # And again, from the files of the folded one.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    save_folded(again, plan, tmp_path / "again")


@pytest.mark.parametrize("model_type", [*ROWS, *MIXTURES, "falcon"])
def test_what_recovery_trains_is_merged_and_nothing_else_changes(model_type: str, tmp_path: Path) -> None:
    model = loaded(tiny(model_type) if model_type in ROWS else tiny_model(model_type), tmp_path / "source")
    plan = FoldPlan.create(source_model_of(model), removed=[3])
    fold_(model, plan)
    names, ids = [name for name, _ in model.named_parameters()], token_ids(model)
    make_trainable_(model, plan, RecoverySettings(rank=2))
    model(ids, use_cache=False).logits.sum().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not idle, "processes that share the work wait for a gradient of each"
    attached = [name for name, _ in model.named_parameters() if "lora_B" in name]
    assert len(attached) >= 2 * len(plan.kept), "LoRA on attention and MLP, or on attention and shared experts"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        adapted = model(ids, use_cache=False).logits
        merge_trained_(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, adapted, rtol=1e-3, atol=1e-3)
    assert [name for name, _ in model.named_parameters()] == names
    save_folded(model, plan, tmp_path / "recovered")


@pytest.mark.parametrize("model_type", [*ROWS, *MIXTURES])
def test_of_vectors_only_norms_are_trained(model_type: str) -> None:
    """Not the decay of linear attention, a router's bias, or what shapes an activation."""
    model = tiny(model_type) if model_type in ROWS else tiny_model(model_type)
    plan = FoldPlan.create(source_model_of(model), removed=[3])
    fold_(model, plan)
    without_weights = model_type in ("nanochat", "olmo")
    if without_weights:
        with pytest.raises(UnsupportedModelError, match="no linear layer or norm"):
            make_trainable_(model, plan, RecoverySettings(rank=0))
        return
    make_trainable_(model, plan, RecoverySettings(rank=0))
    trained = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and all(p.ndim == 1 for p in module.parameters())
    }


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_5_text"])
def test_a_recipe_runs_through_on_a_mixture_and_on_a_hybrid(model_type: str, tmp_path: Path) -> None:
    """From its files, with all that a run can do: gates, compensation, shared weights, recovery, measurement."""
    model, text = tmp_path / "model", tiny_text(tmp_path / "text.txt")
    tiny(model_type).save_pretrained(model)
    tiny_tokenizer(128).save_pretrained(model)
    recover = {"num_tokens": 256, "context": 32, "held_out_tokens": 64, "settings": {"batch_size": 4, "rank": 2}}
    changes = {"dtype": "float32", "select": {"method": "gates", "remove": 2}, "share": {"method": "adjacent"}}
    result = pipeline.run(Recipe.from_dict(tiny_recipe(model, text, recover=recover, **changes)), tmp_path / "run")
    assert len(result.plan.removed) == 2 and result.plan.groups and result.plan.compensation is not None
    recovered = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "recovered", dtype=torch.float32)
    assert type(recovered).__name__.startswith("Folded")
    assert recovered.generate(token_ids(recovered, (1, 4)), max_new_tokens=4, do_sample=False).shape == (1, 8)


@torch.no_grad()
@pytest.mark.parametrize("donor", ["mean", "last"])
@pytest.mark.parametrize("model_type", ["afmoe", "lfm2_moe", "minimax_m2"])
def test_what_chooses_among_shared_experts_goes_with_them(model_type: str, donor: Any, tmp_path: Path) -> None:
    """The correction of a router's scores that stands beside it: of another block's experts it says nothing."""
    model = tiny(model_type)
    decoder = decoder_of(model)
    pair = next((i, j) for i in (2, 3) for j in (4, 5) if same_kind(decoder, i, j, ("attention", "mlp")))
    name = "feed_forward.expert_bias" if model_type == "lfm2_moe" else "mlp.expert_bias"
    name = "mlp.e_score_correction_bias" if model_type == "minimax_m2" else name

    def biases() -> list[Tensor]:
        holders = [decoder.blocks[index].get_submodule(name.rpartition(".")[0]) for index in pair]
        return [getattr(holder, name.rpartition(".")[2]) for holder in holders]

    for number, bias in enumerate(biases()):
        bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]).roll(number))
    first, last = (bias.clone() for bias in biases())
    plan = FoldPlan.create(source_model_of(model), groups=[Group(blocks=pair, donor=donor)])
    fold_(model, plan)
    expected = last if donor == "last" else (first + last) / 2
    assert all(torch.equal(bias, expected) for bias in biases())
    assert save_folded(model, plan, tmp_path / "folded").logits_identical
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    unfold_(again)
    ids = token_ids(model)
    torch.testing.assert_close(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("model_type", WHOLE)
def test_blocks_whose_sublayers_are_not_known_are_removed_and_shared_whole(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    assert decoder_of(model).sublayers is None
    plan = FoldPlan.create(source_model_of(model), removed=[1, 4], groups=[Group(blocks=(2, 3), ranks=2)])
    folded = copy.deepcopy(model)
    fold_(folded, plan)
    save_folded(folded, plan, tmp_path / "folded", expected_parameters=predicted_parameters(model, plan))


def test_the_pattern_of_attention_is_that_of_the_kept_blocks() -> None:
    model = tiny("gpt_neo")
    fold_(model, FoldPlan.create(source_model_of(model), removed=[1, 2]))
    assert model.config.attention_layers == ["global", "local", "global", "local"]
    assert model.config.attention_types == [[["global", "local", "global", "local"], 1]]
    assert type(model.config)(**model.config.to_dict()).attention_layers == model.config.attention_layers
    other = AutoConfig.for_model("gpt_neo", attention_types=[[["global", "local"], 3]], num_layers=6)
    other.attention_types = [[["global"], 4]]
    with pytest.raises(UnsupportedModelError, match="is for 4 blocks, and there are 6"):
        remap_config_(other, (0, 1))


@pytest.mark.parametrize("model_type", sorted(HYBRID))
def test_what_stands_in_the_attention_s_place_goes_only_with_its_block(model_type: str) -> None:
    model = tiny(model_type)
    decoder = decoder_of(model)
    attending = {index for index in range(6) if decoder.attends(index)}
    assert 0 < len(attending) < 6
    index = next(index for index in range(6) if index not in attending)
    name = "conv" if model_type.startswith("lfm2") else "linear_attn"
    plan = FoldPlan.create(source_model_of(model), removed_attention=[index])
    with pytest.raises(PlanError, match=rf"cannot remove the attention of block {index}: it has none, but {name}"):
        fold_(model, plan)
    with pytest.raises(UnsupportedModelError, match="remove whole blocks"):
        Units.sublayers(decoder, 1)


def test_every_row_is_looked_at() -> None:
    assert set(_EXTRA) <= set(ROWS)
    assert set(ROWS) >= HYBRID
    assert set(FAMILIES) == {*ROWS, *WHOLE, *IN_CONTRACT, *_BUILT_ELSEWHERE}


@pytest.mark.parametrize("model_type", ["mixtral", "exaone"])
def test_an_unfolded_model_is_saved_as_its_source_is(model_type: str, tmp_path: Path) -> None:
    """By the names that its files have, with the model type that it has."""
    model = loaded(tiny(model_type) if model_type in ROWS else tiny_model(model_type), tmp_path / "source")
    plan = FoldPlan.create(source_model_of(model), groups=[Group(blocks=(1, 2))])
    fold_(model, plan)
    save_folded(model, plan, tmp_path / "folded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    unfold_(again)
    assert again.config.model_type == model_type and decoder_of(again).sublayers is not None
    again.save_pretrained(tmp_path / "unfolded")
    names = [
        {name for file in (tmp_path / folder).glob("*.safetensors") for name in load_file(file)}
        for folder in ("source", "unfolded")
    ]
    assert names[0] == names[1]


def test_queries_with_a_gate_beside_them_are_not_aligned() -> None:
    model = tiny("qwen3_5_text")
    assert not can_align(decoder_of(model), 1, "attention") and can_align(decoder_of(model), 1, "mlp")
    plan = FoldPlan.create(source_model_of(model), groups=[Group(blocks=(1, 4), private=("norms", "scales"), ranks=2)])
    assert fit_sharing(model, plan, token_ids(model, (16, 24))).fits


@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": True}], ids=str)
def test_norms_and_short_convolutions_are_no_shared_weights(changes: dict[str, Any]) -> None:
    model = (
        tiny("qwen3_5_text")
        if not changes
        else AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "cohere",
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                **changes,
            )
        )
    )
    leaves = shareable_leaves(decoder_of(model), 0, ("attention", "mlp"))
    assert leaves and not [name for name in leaves if "norm" in name or "conv" in name]


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("lfm2", {"block_dim": 32, "block_norm_eps": 1e-5, "block_mlp_init_scale": 1.0, "block_use_swiglu": True}),
        ("qwen3_5_text", {"full_attention_interval": 3}),
        ("cohere2", {"layer_switch": 4, "use_parallel_block": True}),
        ("bloom", {"offset_alibi": 100}),
        ("minimax_m2", {"attn_type_list": [1] * 6, "mtp_transformer_layers": 1}),
    ],
)
def test_fields_of_published_configs_are_known(model_type: str, fields: dict[str, Any]) -> None:
    model = tiny(model_type)
    for name, value in fields.items():
        setattr(model.config, name, value)
    fold_(model, FoldPlan.create(source_model_of(model), removed=[3]))
    assert model.config.num_hidden_layers == 5
    assert len(getattr(model.config, "attn_type_list", [0] * 5)) == 5


def test_a_folded_model_of_another_one_s_class_is_unpickled_anywhere(tmp_path: Path) -> None:
    model = tiny("exaone")
    plan = FoldPlan.create(source_model_of(model), groups=[Group(blocks=(1, 2))])
    fold_(model, plan)
    assert type(model).__name__ == "FoldedExaoneForCausalLM"
    torch.save(model, tmp_path / "model.pt")
    code = "import sys, torch; print(type(torch.load(sys.argv[1], weights_only=False)).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "FoldedExaoneForCausalLM", done.stderr

"""Private terms beside shared weights: what libraries do to them, what is refused, and checkpoints of before."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from fits import random_fit, with_merged_terms
from foldgpt.errors import PlanError, UnsupportedModelError
from foldgpt.families import decoder_of
from foldgpt.folding import (
    GroupFit,
    LowRank,
    MemberFit,
    fold_,
    predicted_parameters,
    save_folded,
    source_model_of,
    unfold_,
)
from foldgpt.plan import FoldPlan, Group
from models import tiny_model, token_ids
from reference import blocks_of, copied
from replaced import double_weights_, replace_linears_

MEAN = Group(blocks=(1, 2, 4), donor="mean", private=("norms", "scales"), ranks=2)
ZERO = Group(blocks=(1, 2, 4), donor="owner", owner=2, start="zero", private=("norms", "scales"), ranks=2)


def folded(group: Group = MEAN, fit: GroupFit | None = None, family: str = "llama") -> tuple[Any, FoldPlan]:
    model = tiny_model(family)
    plan = FoldPlan.create(source_model_of(model), groups=[group])
    fold_(model, plan, {0: random_fit(model, group) if fit is None else fit})
    return model, plan


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    model, plan = folded()
    save_folded(model, plan, tmp_path / "folded")
    return model, tmp_path / "folded"


# ------------------------------------------------------------------------------------------------ what is stored


def test_each_term_is_stored_once_at_its_position(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    attention = {name for name in names if ".o_proj" in name}
    own = {f"model.layers.{p}.self_attn.o_proj.{part}" for p in (1, 2, 4) for part in ("scale", "up", "down")}
    plain = {f"model.layers.{p}.self_attn.o_proj.weight" for p in (0, 3, 5)}
    assert attention == own | plain | {"model.layers.1.self_attn.o_proj.shared.weight"}
    assert not any(".q_proj.scale" in name for name in names), "scales stand where a sublayer joins the stream"


def test_a_scale_behind_which_a_norm_stands_is_the_norm_s_own() -> None:
    group = Group(blocks=(0, 1), donor="mean", private=("norms", "scales"))
    model = tiny_model("gemma3")
    plain = Group(blocks=(0, 1), donor="mean")
    source = source_model_of(model)
    assert predicted_parameters(model, FoldPlan.create(source, groups=[group])) == predicted_parameters(
        model, FoldPlan.create(source, groups=[plain])
    )


@torch.no_grad()
@pytest.mark.parametrize(("donor", "owner"), [("first", None), ("last", None), ("owner", 2)])
def test_the_member_that_gives_its_weights_stays_as_it_was(donor: str, owner: int | None) -> None:
    group = MEAN.model_copy(update={"donor": donor, "owner": owner})
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    plan = FoldPlan.create(source_model_of(model), groups=[group])
    fold_(model, plan, {0: random_fit(model, group)})
    assert group.giver is not None
    block, source = (decoder_of(one).blocks[group.giver] for one in (model, before))
    assert {name for name, _ in block.named_parameters()} == {name for name, _ in source.named_parameters()}
    assert all(torch.equal(p, source.get_parameter(name)) for name, p in block.named_parameters())


@torch.no_grad()
def test_fitted_shared_weights_take_the_place_of_the_donor_s() -> None:
    model = tiny_model("llama").double()
    group = Group(blocks=(1, 2), donor="least_squares")
    names = [name for name, p in decoder_of(model).blocks[1].named_parameters() if p.ndim == 2]
    mean = {name: sum(decoder_of(model).blocks[i].get_parameter(name) for i in (1, 2)) / 2 for name in names}
    plan = FoldPlan.create(source_model_of(model), groups=[group])
    expected = copied(model, [(1, 2)], "mean")
    with pytest.raises(PlanError, match=r"group \[1, 2\] are to be fitted .* no 'fitting', .*mlp\.down_proj\.weight"):
        fold_(model, plan)
    fold_(model, plan, {0: GroupFit(weights=mean)})
    ids = token_ids(model)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("norms", ["own", "owner"])
def test_norms_begin_as_the_group_says(norms: str) -> None:
    model = tiny_model("qwen3")
    source = copy.deepcopy(model)
    group = ZERO.model_copy(update={"norms": norms, "sublayers": ("attention",)})
    plan = FoldPlan.create(source_model_of(model), groups=[group], removed_mlp=[1, 4])
    fold_(model, plan)
    for name in ("input_layernorm.weight", "self_attn.q_norm.weight"):
        expected = decoder_of(source).blocks[2 if norms == "owner" else 4].get_parameter(name)
        assert torch.equal(decoder_of(model).blocks[4].get_parameter(name), expected)
    other = decoder_of(source).blocks[3]
    assert torch.equal(decoder_of(model).blocks[3].input_layernorm.weight, other.input_layernorm.weight)


@torch.no_grad()
def test_low_rank_terms_without_a_fit_begin_alike_each_time() -> None:
    """D is random: folding twice must give one checkpoint."""
    torch.manual_seed(1)
    one, _ = folded(ZERO, GroupFit())
    torch.manual_seed(2)
    other, _ = folded(ZERO, GroupFit())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    terms = decoder_of(one).blocks[4].mlp.up_proj
    assert terms.down.std() > 0.01 and not terms.up.any()
    assert not torch.equal(terms.down, decoder_of(one).blocks[1].mlp.up_proj.down)


# --------------------------------------------------------------------------------------------- what libraries do


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_chosen_on_loading_holds_for_private_terms(saved: tuple[Any, Path], dtype: torch.dtype) -> None:
    model, folder = saved
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    half.save_pretrained(folder / "half")
    again = AutoModelForCausalLM.from_pretrained(folder / "half", dtype=dtype)
    ids = token_ids(half)
    assert torch.equal(half(ids).logits, again(ids).logits)
    assert {p.dtype for p in model.to(dtype).parameters()} == {dtype}


@torch.no_grad()
def test_s9_terms_are_merged_in_more_than_16_bits_and_rounded_once() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    plan = FoldPlan.create(source_model_of(model), groups=[MEAN])
    fold_(model, plan, {0: random_fit(model, MEAN)})
    owner, borrower = (decoder_of(model).blocks[p].mlp.down_proj for p in (1, 4))
    weight = borrower.scale.double()[:, None] * owner.shared.weight.double()
    expected = (weight + borrower.up.double() @ borrower.down.double()).to(torch.bfloat16)
    unfold_(model)
    assert torch.equal(decoder_of(model).blocks[4].mlp.down_proj.weight, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_weight_of_a_leaf_is_that_with_its_terms(family: str) -> None:
    model, _ = folded(family=family)
    looked_at = {
        name: module.weight.detach().clone()
        for position in (1, 4)
        for name, module in decoder_of(model).blocks[position].named_modules()
        if type(module).__name__ == "PrivateTerms"
        for name in [f"{position}.{name}"]
    }
    assert len(looked_at) >= 8
    unfold_(model)
    for name, weight in looked_at.items():
        position, _, leaf = name.partition(".")
        expected = decoder_of(model).blocks[int(position)].get_submodule(leaf).weight
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_offloaded_to_disk(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    places = ["cpu", "disk", "cpu", "cpu", "disk", "cpu"]
    device_map = {f"model.layers.{index}": place for index, place in enumerate(places)}
    device_map |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[4].self_attn.o_proj.scale.is_meta
    assert loaded.model.layers[1].self_attn.o_proj.shared.weight.is_meta
    ids = token_ids(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_linear_layers_replaced_at_the_owner_are_replaced_everywhere_and_terms_stay() -> None:
    """What a weight-only quantiser does; the terms are no linear layers and keep their precision."""
    model, _ = folded()
    expected, _ = folded()
    replace_linears_(model)
    double_weights_(expected)
    ids = token_ids(model)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    assert decoder_of(model).blocks[4].mlp.up_proj.up is not None


@torch.no_grad()
def test_peft_adapts_shared_weights_once_and_merges_them() -> None:
    model, _ = folded()
    ids = token_ids(model)
    before = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapters = [name for name, _ in adapted.named_parameters() if "o_proj" in name and "lora_A" in name]
    assert len(adapters) == 4, "one for the group, one for each of the others"
    changed = adapted(ids).logits
    assert not torch.allclose(changed, before, atol=1e-2)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, changed, atol=1e-4, rtol=1e-4)


def test_peft_adapts_by_name_where_no_position_has_terms_and_all_linears_where_one_has() -> None:
    """A leaf with private terms stands where the named layer was; as docs/checkpoint.md says."""
    plain, _ = folded(Group(blocks=(1, 2, 4), donor="mean", private=("norms",)))
    get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    private, _ = folded()
    with pytest.raises(ValueError, match="PrivateTerms"):
        get_peft_model(private, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


@torch.no_grad()
def test_torch_compile_whole_graph() -> None:
    model, _ = folded()
    ids = token_ids(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, _ = folded()
    model.train()
    ids = token_ids(model)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    assert all(gradient.any() for gradient in plain)
    model.gradient_checkpointing_enable()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_offloaded_terms_are_not_unfolded(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """Merged into weights that are not there they would be lost without a word."""
    model, folder = saved
    device_map: dict[str, Any] = {f"model.layers.{index}": "disk" for index in range(len(model.model.layers))}
    device_map |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    ids = token_ids(loaded)
    with pytest.raises(UnsupportedModelError, match="are offloaded; load the whole model in memory to unfold it"):
        unfold_(loaded)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_model_of_the_code_in_its_checkpoint_is_unfolded(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """Loaded before foldgpt was imported, its classes are those of the copy."""
    model, folder = saved
    ids = token_ids(model)
    torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    script = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
from foldgpt.folding import unfold_
unfold_(model)
assert type(model).__name__ == "LlamaForCausalLM", type(model)
ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------- earlier versions


@torch.no_grad()
def test_a_checkpoint_of_layout_version_1_loads_and_unfolds(tmp_path: Path) -> None:
    """The first version had no private terms, kept weights at the first member, and a plan of version 1."""
    model = tiny_model("llama")
    group = Group(blocks=(1, 2), donor="last")
    plan = FoldPlan.create(source_model_of(model), groups=[group])
    expected = copied(model, [(1, 2)], "last")
    fold_(model, plan)
    save_folded(model, plan, tmp_path / "folded")
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    layout = config["fold_layout"]
    assert layout["version"] == 2 and layout["borrowed"][0]["position"] == 1
    layout.pop("private")
    layout["version"] = 1
    layout["borrowed"][0] |= {"position": 2, "owner": 1}
    groups = [{"blocks": [1, 2], "donor": "last"}]
    of_before = {k: v for k, v in config["fold_plan"].items() if k != "fitting"}
    config["fold_plan"] = {**of_before, "version": 1, "groups": groups}
    (tmp_path / "folded" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "folded" / "model.safetensors")
    for name in [name for name in tensors if ".layers.2." in name and "proj" in name]:
        tensors[name.replace(".layers.2.", ".layers.1.")] = tensors.pop(name)
    save_file(tensors, tmp_path / "folded" / "model.safetensors", metadata={"format": "pt"})

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = token_ids(model)
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    assert FoldPlan.from_json_dict(loaded.config.fold_plan).groups[0].donor == "last"
    save_folded(loaded, plan, tmp_path / "again")
    unfold_(loaded)
    assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_a_layout_of_a_later_version_is_refused(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["fold_layout"]["version"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layout version 3; this code reads versions up to 2"):
        AutoModelForCausalLM.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------- what is refused


def refused(
    group: Group, message: str, *, fit: GroupFit | None = None, family: str = "llama", error: Any = PlanError
) -> None:
    """The plan or its fit is refused, and the model is as it was."""
    model = tiny_model(family)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    plan = FoldPlan.create(source_model_of(model), groups=[group])
    with pytest.raises(error, match=message):
        fold_(model, plan, None if fit is None else {0: fit})
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert type(model).__name__[:6] != "Folded" and not hasattr(model.config, "fold_layout")


@torch.no_grad()
def test_c1_private_terms_are_not_merged_into_quantised_weights() -> None:
    """Field note C1. The first leaf with terms is plain, so a check while merging would come too late."""
    model = tiny_model("llama")
    fold_(model, FoldPlan.create(source_model_of(model), groups=[Group(blocks=(1, 2), ranks=2)]))
    down = blocks_of(model)[1].mlp.down_proj
    down.weight = torch.nn.Parameter((down.weight * 100).to(torch.int8), requires_grad=False)
    modules = list(model.named_modules())
    with pytest.raises(UnsupportedModelError, match=r"mlp\.down_proj is quantised; unfold the plain model"):
        unfold_(model)
    assert list(model.named_modules()) == modules and model.config.fold_layout["borrowed"]


@pytest.mark.parametrize(
    ("ranks", "family", "message"),
    [
        ({"mlp.up_porj": 2}, "llama", r"group \[0, 1\] does not share 'mlp\.up_porj'\. Did you mean 'mlp\.up_proj'\?"),
        ({"input_layernorm": 2}, "llama", r"does not share 'input_layernorm'\."),
        ({"mlp.experts": 2}, "mixtral", r"linear layer of several outputs; mlp\.experts is a MixtralExperts"),
        ({"self_attn.k_proj": 17}, "llama", r"rank 17 for self_attn\.k_proj, which is a matrix of 16 × 32"),
        (17, "llama", r"rank 17 for self_attn\.k_proj"),
    ],
    ids=str,
)
def test_ranks_for_what_cannot_have_them_are_refused(ranks: Any, family: str, message: str) -> None:
    refused(Group(blocks=(0, 1), donor="mean", ranks=ranks), message, family=family)


@pytest.mark.parametrize("options", [{"donor": "mean"}, {"donor": "first", "start": "zero"}], ids=str)
def test_scales_are_refused_where_the_end_of_a_sublayer_is_not_known(options: dict[str, Any]) -> None:
    model = tiny_model("opt", do_layer_norm_before=False)
    group = Group(blocks=(0, 1), private=("norms", "scales"), **options)
    with pytest.raises(UnsupportedModelError, match="sublayers of model type 'opt' are not known"):
        fold_(model, FoldPlan.create(source_model_of(model), groups=[group]))


def test_one_rank_for_all_leaves_out_what_has_one_output() -> None:
    """The gate of a shared expert is a linear layer of one output, of which a low-rank term would be all."""
    config = Qwen2MoeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = Qwen2MoeForCausalLM(config).eval()
    plan = FoldPlan.create(source_model_of(model), groups=[Group(blocks=(1, 2), ranks=4)])
    expected = predicted_parameters(model, plan)
    fold_(model, plan)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    terms = decoder_of(model).blocks[2].mlp
    assert hasattr(terms.shared_expert.down_proj, "up") and not hasattr(terms.shared_expert_gate, "up")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_offloaded_blocks_are_refused_but_counted(family: str) -> None:
    """A norm without weights in memory cannot be tried out, so that has to be asked last."""
    model = tiny_model(family)
    plan = FoldPlan.create(
        source_model_of(model), groups=[Group(blocks=(0, 1), start="zero", private=("norms", "scales"))]
    )
    expected = predicted_parameters(model, plan)
    decoder_of(model).blocks.to("meta")
    assert predicted_parameters(model, plan) == expected
    with pytest.raises(UnsupportedModelError, match=r"the weights of blocks \[0, 1\] are offloaded"):
        fold_(model, plan)


def of_block(index: int, **parts: Any) -> GroupFit:
    return GroupFit(members={index: MemberFit(**parts)})


ONES = torch.ones(32)


@pytest.mark.parametrize(
    ("group", "fit", "message"),
    [
        (
            MEAN,
            GroupFit(weights={"mlp.up_proj.wieght": ONES}),
            r"weight of 'mlp\.up_proj\.wieght': .* Did you mean",
        ),
        (MEAN, GroupFit(weights={"mlp.up_proj.weight": ONES}), r"is \[32\]; the model needs \[48, 32\]"),
        (MEAN, GroupFit(weights={"input_layernorm.weight": ONES}), r"shared weight of 'input_layernorm\.weight'"),
        (MEAN, of_block(3, scales={}), r"group \[1, 2, 4\] has private values for block 3, which has none"),
        (
            MEAN,
            of_block(2, scales={"mlp.up_proj": torch.ones(48)}),
            r"scale of 'mlp\.up_proj': the plan has none",
        ),
        (
            MEAN,
            of_block(2, scales={"mlp.down_proj": torch.ones(48)}),
            r"scale of 'mlp\.down_proj' is \[48\]; .* \[32\]",
        ),
        (
            MEAN,
            of_block(2, low_rank={"mlp.up_proj": LowRank(torch.ones(48, 3), torch.ones(3, 32))}),
            r"up of the low-rank term of 'mlp\.up_proj' is \[48, 3\]; the model needs \[48, 2\]",
        ),
        (MEAN, of_block(2, norms={"mlp.up_proj.weight": ONES}), r"norm of 'mlp\.up_proj\.weight': the plan has none"),
        (ZERO, of_block(2, norms={}), "private values for block 2, which has none in this group"),
        (
            ZERO,
            GroupFit(weights={"mlp.up_proj.weight": torch.ones(48, 32)}),
            "so block 2 keeps its own",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_fit_for_another_plan_is_refused(group: Group, fit: GroupFit, message: str) -> None:
    refused(group, message, fit=fit)


def test_a_fit_for_a_group_that_is_not_there_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(PlanError, match="there is a fit for group 1; the plan has 1 groups"):
        fold_(model, FoldPlan.create(source_model_of(model), groups=[MEAN]), {1: GroupFit()})


@torch.no_grad()
def test_a_fit_may_lift_a_position_that_starts_at_zero() -> None:
    model = tiny_model("llama").double()
    fit = random_fit(model, ZERO)
    reference = with_merged_terms(copied_from(model, 2, (1, 4)), ZERO, fit)
    fold_(model, FoldPlan.create(source_model_of(model), groups=[ZERO]), {0: fit})
    ids = token_ids(model)
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-10, rtol=1e-10)


def copied_from(model: Any, owner: int, others: tuple[int, ...]) -> Any:
    """A copy in which other blocks hold the matrices of one."""
    model = copy.deepcopy(model)
    blocks = decoder_of(model).blocks
    for index in others:
        for name, parameter in blocks[index].named_parameters():
            if parameter.ndim == 2:
                parameter.data.copy_(blocks[owner].get_parameter(name))
    return model

"""Plans and models that do not go together, or cannot be folded or saved, are refused with nothing changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from checkpoint_case import folded
from foldgpt.errors import PlanError, UnsupportedModelError, VerificationError
from foldgpt.families import decoder_of
from foldgpt.folding import (
    DONORS,
    fold_,
    predicted_parameters,
    save_folded,
    source_model_of,
    unfold_,
)
from foldgpt.plan import Donor, FoldPlan, Group, SourceModel
from models import tiny_model


def refused(model: Any, plan: FoldPlan, error: type[Exception], message: str) -> None:
    """The plan is refused, and the model is as it was."""
    before = copy.deepcopy(model.config.to_dict())
    blocks = list(decoder_of(model).blocks)
    weights = {name: p.clone() for name, p in model.named_parameters() if not p.is_meta}
    model_class = type(model)
    with pytest.raises(error, match=message):
        fold_(model, plan)
    assert type(model) is model_class and model.config.to_dict() == before
    assert all(one is other for one, other in zip(decoder_of(model).blocks, blocks, strict=True))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if not p.is_meta)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"num_blocks": 8}, r"the plan is for a model of 8 blocks \(some/model\); this LlamaForCausalLM has 6"),
        (
            {"model_type": "qwen3"},
            r"the plan is for model type 'qwen3' \(some/model\); this LlamaForCausalLM is 'llama'",
        ),
    ],
)
def test_a_plan_for_another_model_is_refused(source: dict[str, Any], message: str) -> None:
    values = {"model": "some/model", "model_type": "llama", "num_blocks": 6, **source}
    plan = FoldPlan.create(SourceModel(**values), removed=[1])
    model = tiny_model("llama")
    refused(model, plan, PlanError, message)
    with pytest.raises(PlanError, match=message):
        predicted_parameters(model, plan)


def test_each_donor_of_a_plan_can_be_made() -> None:
    """A name that plans take and folding does not know would end in a KeyError."""
    given = {"first", "last", "owner", "least_squares"}  # by a member, or by a fit
    assert set(get_args(Donor)) == given | DONORS.keys()


def test_a_group_of_mixed_kinds_changes_nothing() -> None:
    """Field note S6, after an earlier group that would have been fine."""
    model = tiny_model("gemma3")
    groups = [Group(blocks=(0, 1), donor="mean"), Group(blocks=(2, 3))]
    plan = FoldPlan.create(source_model_of(model), removed=[5], groups=groups)
    refused(model, plan, PlanError, r"group \[2, 3\] mixes kinds: layer_types is full_attention in block 2")


def test_a_folded_model_is_not_folded_again() -> None:
    model, plan = folded(removed=(), shared=True)
    with pytest.raises(PlanError, match="folded already; fold its source"):
        fold_(model, plan)
    unfold_(model)
    fold_(model, plan)


def test_an_unfolded_model_without_sublayers_says_what_it_is(tmp_path: Path) -> None:
    model = tiny_model("llama")
    groups = [Group(blocks=(4, 5), ranks=1, private=("norms", "scales"))]
    plan = FoldPlan.create(source_model_of(model), removed=[1], removed_mlp=[2], groups=groups)
    fold_(model, plan)
    again = "sublayers of this model are removed already; fold the source itself"
    refused(model, plan, PlanError, again)
    unfold_(model)
    rest = FoldPlan.create(plan.source, removed=[1], removed_mlp=[2])
    assert FoldPlan.from_json_dict(model.config.fold_plan) == rest
    assert not model.config.fold_layout["borrowed"] and not model.config.fold_layout["private"]
    refused(model, plan, PlanError, again)
    with pytest.raises(PlanError, match=r"cuts something else\. If it was unfolded, give the plan without groups"):
        save_folded(model, plan, tmp_path / "unfolded")
    assert save_folded(model, plan.model_copy(update={"groups": ()}), tmp_path / "unfolded").logits_identical


def test_an_ordinary_model_is_not_saved_with_a_plan_that_shares(tmp_path: Path) -> None:
    """`show` and `recover` read the plan beside it, and would look for groups that are not there."""
    model, plan = folded(removed=(1,), shared=True)
    unfold_(model)
    with pytest.raises(PlanError, match=r"it is of its source's own class.*If it was unfolded, give the plan without"):
        save_folded(model, plan, tmp_path / "unfolded")
    assert not list(tmp_path.iterdir())
    rest = plan.model_copy(update={"groups": ()})
    assert save_folded(model, rest, tmp_path / "unfolded").logits_identical
    lacking = FoldPlan.create(plan.source, removed=[1], removed_mlp=[2])
    with pytest.raises(PlanError, match="it is of its source's own class, and what shares weights or lacks sublayers"):
        save_folded(model, lacking, tmp_path / "lacking")


def test_a_model_that_shares_nothing_cannot_be_unfolded() -> None:
    model, _ = folded()
    with pytest.raises(PlanError, match="LlamaForCausalLM shares no weights; there is nothing to unfold"):
        unfold_(model)


def test_sublayers_of_an_unknown_family_are_refused_but_blocks_are_not() -> None:
    model = tiny_model("llama")
    model.config.model_type = "novel"
    source = source_model_of(model)
    for parts in ({"removed_mlp": [2]}, {"groups": [Group(blocks=(0, 1), sublayers=("mlp",))]}):
        plan = FoldPlan.create(source, removed=[5], **parts)  # type: ignore[arg-type]
        refused(model, plan, UnsupportedModelError, "sublayers of model type 'novel' are not known")
    fold_(model, FoldPlan.create(source, removed=[5]))
    assert len(decoder_of(model).blocks) == 5


def test_offloaded_weights_cannot_be_shared_and_nothing_is_changed(tmp_path: Path) -> None:
    folder = tmp_path / "folded"
    save_folded(*folded(), folder)
    device_map = {"model.layers.3": "disk", "model.layers.4": "disk"}
    device_map |= {f"model.layers.{index}": "cpu" for index in range(3)}
    device_map |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    groups = [Group(blocks=(0, 2), donor="last"), Group(blocks=(3, 4))]
    plan = FoldPlan.create(source_model_of(model), removed=[1], groups=groups)
    refused(model, plan, UnsupportedModelError, r"weights of blocks \[3, 4\] are offloaded")


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_is_not_saved_with_the_plan_of_another(tmp_path: Path, shared: bool) -> None:
    model, plan = folded(shared=shared)
    if shared:
        other = FoldPlan.create(plan.source, removed=plan.removed, groups=[Group(blocks=(2, 3), donor="mean")])
        says = r"another plan: the one in its config \(fold_plan\) cuts something else"
    else:
        other, says = FoldPlan.create(plan.source, removed=[1, 4]), "the plan keeps 4 blocks, the model has 5"
    with pytest.raises(PlanError, match=says):
        save_folded(model, other, tmp_path / "folded")
    assert list(tmp_path.iterdir()) == []
    save_folded(model, plan, tmp_path / "folded")


def test_a_model_that_puts_out_no_numbers_is_said_to(tmp_path: Path) -> None:
    model, plan = folded()
    decoder_of(model).blocks[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(VerificationError, match="not finite, in memory already"):
        save_folded(model, plan, tmp_path / "folded")
    assert list(tmp_path.iterdir()) == []


def test_a_wrapped_model_is_refused_as_it_is() -> None:
    model = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(model), removed=[1], groups=[Group(blocks=(3, 4))])
    before = set(model.state_dict())
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model)):
        with pytest.raises(UnsupportedModelError, match=r"(OptimizedModule|DataParallel) is no model of transformers"):
            fold_(wrapped, plan)
    assert type(model) is transformers.LlamaForCausalLM
    assert before == set(model.state_dict())
    assert type(model.config) is transformers.LlamaConfig

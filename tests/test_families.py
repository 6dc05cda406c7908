"""The contract that every family passes, on tiny random models built from their configs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from fits import random_fit, with_merged_terms
from foldgpt.families import FAMILIES, decoder_of
from foldgpt.folding import fold_, predicted_parameters, same_kind, save_folded, source_model_of, unfold_
from foldgpt.plan import FoldPlan, Group
from models import CONFIGS, NUM_BLOCKS, tiny_model, token_ids
from reference import copied, silenced, skipping, stepwise_logits

pytestmark = pytest.mark.parametrize("family", CONFIGS)

REMOVED = (1, 4)


PRIVATE = {"private": ("norms", "scales"), "ranks": 2}


def folded(model: Any, fits: Any = None, **parts: Any) -> tuple[Any, FoldPlan]:
    """A folded copy of a model, and its plan."""
    plan = FoldPlan.create(source_model_of(model), **parts)
    result = copy.deepcopy(model)
    fold_(result, plan, fits)
    return result, plan


def groups_of_one_kind(model: Any, **options: Any) -> list[Group]:
    """Pairs of blocks that may share, in order of depth, each block once."""
    decoder = decoder_of(model)
    groups, taken = [], set()
    for first in range(NUM_BLOCKS):
        for second in range(first + 1, NUM_BLOCKS):
            if {first, second} & taken or not same_kind(decoder, first, second, ("attention", "mlp")):
                continue
            groups.append(Group(blocks=(first, second), **options))
            taken |= {first, second}
    return groups


@torch.no_grad()
def test_identity_plan_changes_nothing(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    result, plan = folded(model)
    ids = token_ids(model)
    assert plan.kept == tuple(range(NUM_BLOCKS)) and not plan.groups
    assert torch.equal(result(ids).logits, model(ids).logits)
    assert result.config.to_dict() == model.config.to_dict()


@torch.no_grad()
def test_removal_equals_skipping_the_blocks(family: str) -> None:
    model = tiny_model(family)
    result, _ = folded(model, removed=REMOVED)
    ids = token_ids(model)
    expected = skipping(model, REMOVED)(ids, use_cache=False).logits
    assert torch.equal(result(ids, use_cache=False).logits, expected)
    assert not torch.allclose(expected, model(ids).logits, atol=1e-2), "the removed blocks must matter"


@torch.no_grad()
@pytest.mark.parametrize("removed", [(0,), REMOVED, (0, 1, 2, 3, 4), (5,)], ids=str)
def test_removal_saves_loads_and_decodes_in_the_source_class(
    family: str, removed: tuple[int, ...], tmp_path: Path
) -> None:
    model = tiny_model(family)
    result, plan = folded(model, removed=removed)
    save_folded(result, plan, tmp_path / "folded", expected_parameters=predicted_parameters(model, plan))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert type(loaded) is type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.num_hidden_layers == NUM_BLOCKS - len(removed)
    ids = token_ids(model)
    uncached = loaded(ids, use_cache=False).logits
    assert torch.equal(uncached, result(ids, use_cache=False).logits)
    torch.testing.assert_close(stepwise_logits(loaded, ids, prefill=5), uncached, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("donor", ["first", "last", "mean"])
def test_sharing_equals_copied_weights(family: str, donor: str) -> None:
    model = tiny_model(family)
    groups = groups_of_one_kind(model, donor=donor)
    assert groups
    result, plan = folded(model, groups=groups)
    ids = token_ids(model)
    expected = copied(model, [group.blocks for group in groups], donor)
    assert torch.equal(result(ids).logits, expected(ids).logits)
    assert sum(p.numel() for p in result.parameters()) == predicted_parameters(model, plan)


@torch.no_grad()
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_sharing_one_sublayer_equals_copied_weights(family: str, part: Any) -> None:
    model = tiny_model(family)
    groups = groups_of_one_kind(model, sublayers=(part,))
    result, _ = folded(model, groups=groups)
    ids = token_ids(model)
    expected = copied(model, [group.blocks for group in groups], "first", part)
    assert torch.equal(result(ids).logits, expected(ids).logits)


@torch.no_grad()
def test_sharing_and_removal_save_load_decode_and_unfold(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    groups = groups_of_one_kind(model, donor="mean")[:1]
    removed = [index for index in range(NUM_BLOCKS) if index not in groups[0].blocks][:1]
    result, plan = folded(model, groups=groups, removed=removed)
    expected_parameters = predicted_parameters(model, plan)
    save_folded(result, plan, tmp_path / "folded", expected_parameters=expected_parameters)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    ids = token_ids(model)
    logits = result(ids, use_cache=False).logits
    assert torch.equal(loaded(ids, use_cache=False).logits, logits)
    assert isinstance(loaded, type(model))
    assert sum(p.numel() for p in loaded.parameters()) == expected_parameters
    torch.testing.assert_close(stepwise_logits(loaded, ids, prefill=5), logits, atol=1e-4, rtol=1e-4)

    unfold_(loaded)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids, use_cache=False).logits, logits)
    loaded.save_pretrained(tmp_path / "unfolded")
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "unfolded")
    assert type(ordinary) is type(model)
    assert torch.equal(ordinary(ids, use_cache=False).logits, logits)


@torch.no_grad()
def test_generate_equals_uncached_greedy(family: str) -> None:
    model = tiny_model(family)
    groups = [group for group in groups_of_one_kind(model) if 2 not in group.blocks][:1]
    result, _ = folded(model, removed=(2,), groups=groups)
    prompt = token_ids(model, (1, 6))
    generated = result.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    ids = prompt
    for _ in range(6):
        logits = result(ids, use_cache=False).logits[:, -1]
        logits[:, result.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, ids)


@torch.no_grad()
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_removed_sublayer_contributes_zero_and_takes_its_norm_along(family: str, part: str, tmp_path: Path) -> None:
    """Field note R7: not an identity that returns the normed input. R6: stepping stays right."""
    model = tiny_model(family)
    index = 3
    result, plan = folded(model, **{f"removed_{part}": [index]})
    ids = token_ids(model)
    expected = silenced(model, index, part)
    logits = result(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    decoder = decoder_of(result)
    names = decoder.sublayers.attention_norms if part == "attention" else decoder.sublayers.mlp_norms  # type: ignore[union-attr]
    for name in names:
        assert not list(decoder.blocks[index].get_submodule(name).parameters())
    save_folded(result, plan, tmp_path / "folded", expected_parameters=predicted_parameters(model, plan))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(stepwise_logits(loaded, ids, prefill=5), logits, atol=1e-4, rtol=1e-4)


def in_fp64(model: Any) -> Any:
    """A copy in fp64, in which products that know no fp64 (those of experts) are made one by one."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def test_private_terms_compute_what_merged_weights_do(family: str) -> None:
    """In fp64: scales, low-rank terms and norms of both members, and one block removed."""
    model = in_fp64(tiny_model(family))
    group = groups_of_one_kind(model, donor="mean", **PRIVATE)[0]
    removed = [index for index in range(NUM_BLOCKS) if index not in group.blocks][:1]
    fit = random_fit(model, group)
    assert set(fit.members) == set(group.blocks)
    result, _ = folded(model, {0: fit}, groups=[group], removed=removed)
    reference, _ = folded(with_merged_terms(copied(model, [group.blocks], "mean"), group, fit), removed=removed)
    ids = token_ids(model)
    expected = reference(ids, use_cache=False).logits
    logits = result(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)
    plain, _ = folded(model, groups=[group], removed=removed)
    assert not torch.allclose(logits, plain(ids, use_cache=False).logits, atol=1e-2), "the private terms must matter"
    unfold_(result)
    assert type(result) is type(model)
    torch.testing.assert_close(result(ids, use_cache=False).logits, expected, atol=1e-10, rtol=1e-10)
    assert sum(p.numel() for p in result.parameters()) == sum(p.numel() for p in reference.parameters())


@torch.no_grad()
def test_private_terms_save_load_and_decode(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    group = groups_of_one_kind(model, donor="last", **PRIVATE)[0]
    removed = [index for index in range(NUM_BLOCKS) if index not in group.blocks][:1]
    result, plan = folded(model, {0: random_fit(model, group)}, groups=[group], removed=removed)
    expected_parameters = predicted_parameters(model, plan)
    save_folded(result, plan, tmp_path / "folded", expected_parameters=expected_parameters)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(p.numel() for p in loaded.parameters()) == expected_parameters
    ids = token_ids(model)
    logits = result(ids, use_cache=False).logits
    assert torch.equal(loaded(ids, use_cache=False).logits, logits)
    torch.testing.assert_close(stepwise_logits(loaded, ids, prefill=5), logits, atol=1e-4, rtol=1e-4)
    base = AutoModel.from_pretrained(tmp_path / "folded")
    last = loaded(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(base(ids, use_cache=False).last_hidden_state, last)
    uncached = loaded.generate(ids[:, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(loaded.generate(ids[:, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False), uncached)


def test_a_position_that_starts_at_zero_begins_as_removed_and_learns(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    first, second = groups_of_one_kind(model)[-1].blocks
    group = Group(blocks=(first, second), donor="owner", owner=first, start="zero", **PRIVATE)
    removed = [next(index for index in range(NUM_BLOCKS) if index not in group.blocks)]
    result, plan = folded(model, groups=[group], removed=removed)
    ids = token_ids(model)
    with torch.no_grad():
        removal, start = folded(model, removed=plan.at_start.removed)
        assert start == plan.at_start and start.is_removal_only and second in start.removed
        expected = removal(ids, use_cache=False).logits
        assert torch.equal(result(ids, use_cache=False).logits, expected)
    expected_parameters = predicted_parameters(model, plan)
    assert sum(p.numel() for p in result.parameters()) == expected_parameters
    save_folded(result, plan, tmp_path / "folded", expected_parameters=expected_parameters)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    position = plan.position_of[second]
    assert len(decoder_of(loaded).blocks) == position + 1 + sum(index > second for index in plan.kept)
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, expected)
        torch.testing.assert_close(stepwise_logits(loaded, ids, prefill=5), expected, atol=1e-4, rtol=1e-4)
        base = AutoModel.from_pretrained(tmp_path / "folded")
        last = removal(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(base(ids, use_cache=False).last_hidden_state, last)

    # What begins at 0 has a gradient of ordinary size, and one step makes the position count.
    loss = loaded(ids, labels=ids, use_cache=False).loss
    loss.backward()
    block = decoder_of(loaded).blocks[position]
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None and p.grad.any()}
    assert gradients, "nothing at the position can learn"
    ordinary = max(p.grad.norm() for p in decoder_of(loaded).blocks[plan.position_of[first]].parameters())
    assert all(torch.isfinite(g).all() and g.norm() < 20 * ordinary for g in gradients.values())
    with torch.no_grad():
        for name, gradient in gradients.items():
            block.get_parameter(name).sub_(0.1 * gradient / gradient.norm())
        loaded = in_fp64(loaded)
        stepped = loaded(ids, labels=ids, use_cache=False)
        assert stepped.loss < loss
        unfold_(loaded)
        assert type(loaded) is type(model)
        torch.testing.assert_close(loaded(ids, use_cache=False).logits, stepped.logits, atol=1e-10, rtol=1e-10)


def test_family_is_in_the_table(family: str) -> None:
    assert tiny_model(family).config.model_type in FAMILIES

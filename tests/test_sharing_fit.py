"""Fits of shared weights and private terms: what is fitted is what the folded model computes, and it helps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from foldgpt.errors import UnsupportedModelError
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.sharing.fit import SharingFit, fit_sharing, sharing_replay
from foldgpt.sharing.output_fit import first_that_chooses
from models import tiny_model, token_ids

SCALES = ("norms", "scales")
#: One of each sandwich, pre-norm, post-norm, parallel, transposed and flattened arrangement.
FAMILIES = ["llama", "llama-tied", "gemma3", "olmo2", "granite", "stablelm-parallel", "gpt2", "opt", "qwen3"]

GROUPS = {
    "first": Group(blocks=(0, 1), private=SCALES, ranks=4),
    "last": Group(blocks=(0, 1), donor="last", ranks={"mlp.down_proj": 4}),
    "mean": Group(blocks=(0, 1), donor="mean", private=SCALES),
    "least squares": Group(blocks=(0, 1), donor="least_squares", private=SCALES, ranks=4),
    "zero": Group(blocks=(0, 1), donor="first", start="zero", norms="owner", private=SCALES, ranks=4),
    "attention": Group(blocks=(0, 1), sublayers=("attention",), donor="least_squares", private=SCALES),
    "zero attention": Group(blocks=(0, 1), sublayers=("attention",), start="zero", private=SCALES, ranks=4),
    "zero MLP": Group(blocks=(0, 1), sublayers=("mlp",), start="zero", private=SCALES, ranks=4),
}


def plan_of(model: Any, *groups: Group, **changes: Any) -> FoldPlan:
    return FoldPlan.create(source_model_of(model), groups=groups, **changes)


def folded(model: Any, plan: FoldPlan, fit: SharingFit | None) -> Any:
    made = copy.deepcopy(model)
    fold_(made, plan, None if fit is None else fit.fits)
    return made


@torch.no_grad()
def kl_to(model: Any, made: Any, ids: torch.Tensor) -> float:
    """Mean KL in nats per token, from the logits themselves."""
    ours = made(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    theirs = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def groups_for(family: str) -> list[str]:
    known = list(GROUPS)
    if family in ("gpt2", "opt"):  # their layers have other names
        known.remove("last")
    return known


@pytest.mark.parametrize(("family", "kind"), [(f, k) for f in FAMILIES for k in groups_for(f)])
def test_the_fit_is_what_the_folded_model_computes(family: str, kind: str) -> None:
    """The KL that the fit foretells on its held-out windows is that of the model it is folded into."""
    model = tiny_model(family)
    ids = token_ids(model, (16, 16))
    plan = plan_of(model, GROUPS[kind], removed=[4])
    fit = fit_sharing(model, plan, ids)
    held = ids[-fit.num_held_out // 16 :]
    assert fit.kl == pytest.approx(kl_to(model, folded(model, plan, fit), held), rel=2e-3)
    assert [report.block for report in fit.members] == list(GROUPS[kind].fitted_members)
    for report in fit.members:
        assert report.kept == (report.kl_after < report.kl_before)


@pytest.mark.parametrize(("family", "left"), [("llama", 0.05), ("gemma3", 0.15)])  # through a norm it is not exact
def test_a_member_that_is_the_owner_over_again_costs_next_to_nothing(family: str, left: float) -> None:
    """Blocks 0 and 1 differ by a scale of each sublayer's output and a low-rank change, which the fit finds."""
    model = tiny_model(family)
    blocks = decoder_of(model).blocks
    with torch.no_grad():
        blocks[1].load_state_dict(blocks[0].state_dict())
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight = blocks[1].get_submodule(name).weight
            weight.mul_(1.5).add_(0.2 * torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1]))
    ids = token_ids(model, (64, 24))
    group = Group(blocks=(0, 1), private=SCALES, ranks={"self_attn.o_proj": 2, "mlp.down_proj": 2})
    plan = plan_of(model, group)
    fit = fit_sharing(model, plan, ids)
    new = token_ids(model, (16, 24), seed=7)
    assert kl_to(model, folded(model, plan, fit), new) < left * kl_to(model, folded(model, plan, None), new)


def test_an_attention_that_starts_at_zero_before_its_own_mlp_aims_at_what_it_put_out() -> None:
    """The MLP behind it adds its share by itself; the attention is not to take that over as well."""
    model = tiny_model("llama")
    blocks = decoder_of(model).blocks
    with torch.no_grad():
        for name in ("self_attn", "input_layernorm"):
            blocks[1].get_submodule(name).load_state_dict(blocks[0].get_submodule(name).state_dict())
    ids = token_ids(model, (64, 24))
    plan = plan_of(model, Group(blocks=(0, 1), sublayers=("attention",), start="zero", private=SCALES))
    fit = fit_sharing(model, plan, ids)
    new = token_ids(model, (16, 24), seed=7)
    assert kl_to(model, folded(model, plan, fit), new) < 0.05 * kl_to(model, folded(model, plan, None), new)


@pytest.mark.parametrize(("batches", "first"), [(1, 1), (2, 1), (3, 2), (4, 3), (8, 6)])
def test_some_windows_choose_the_ridge(batches: int, first: int) -> None:
    assert first_that_chooses(batches) == first


def test_alignment_undoes_a_shuffle() -> None:
    """Block 1 is block 0 with its neurons in another order: the mean of the two is worth nothing unless aligned."""
    model = tiny_model("llama")
    blocks = decoder_of(model).blocks
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        blocks[1].load_state_dict(blocks[0].state_dict())
        for part in ("gate_proj", "up_proj"):
            linear = blocks[1].mlp.get_submodule(part)
            linear.weight.copy_(linear.weight[order].clone())
        blocks[1].mlp.down_proj.weight.copy_(blocks[1].mlp.down_proj.weight[:, order].clone())
    ids = token_ids(model, (16, 16))
    plan = plan_of(model, Group(blocks=(0, 1), donor="mean"))
    assert kl_to(model, folded(model, plan, fit_sharing(model, plan, ids)), ids) < 1e-6
    assert kl_to(model, folded(model, plan, fit_sharing(model, plan, ids, aligned=False)), ids) > 0.01


def test_least_squares_beats_the_mean_on_new_text() -> None:
    model = tiny_model("llama")
    ids, new = token_ids(model, (64, 24)), token_ids(model, (16, 24), seed=7)

    def kl(donor: str) -> float:
        plan = plan_of(model, Group(blocks=(0, 1), donor=donor))
        return kl_to(model, folded(model, plan, fit_sharing(model, plan, ids)), new)

    assert kl("least_squares") < 0.95 * kl("mean")


def test_a_position_that_starts_at_zero_is_lifted_where_that_helps() -> None:
    model = tiny_model("llama")
    ids, new = token_ids(model, (64, 24)), token_ids(model, (16, 24), seed=7)
    group = Group(blocks=(0, 1), start="zero", norms="owner", private=SCALES, ranks=8)
    plan = plan_of(model, group)
    fit = fit_sharing(model, plan, ids)
    assert fit.members[0].kept
    assert kl_to(model, folded(model, plan, fit), new) < 0.95 * kl_to(model, folded(model, plan, None), new)


def test_a_fit_that_does_not_help_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (16, 16))
    from foldgpt.sharing import fit as module
    from foldgpt.sharing.output_fit import OutputFit

    def harmful(wanted: Any, **_: Any) -> OutputFit:
        return OutputFit(10 * torch.ones_like(wanted.start_H), None, 1.0, 1.0)

    monkeypatch.setattr(module, "fit_output", harmful)
    plan = plan_of(model, Group(blocks=(0, 1), private=SCALES))
    fit = fit_sharing(model, plan, ids)
    assert not fit.members[0].kept and not fit.fits
    assert fit.kl == pytest.approx(kl_to(model, folded(model, plan, None), ids[-2:]), rel=2e-3)


def test_the_source_is_left_as_it_was() -> None:
    model = tiny_model("gemma3")
    ids = token_ids(model, (16, 16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    structure = str(model)
    fit_sharing(model, plan_of(model, Group(blocks=(0, 1), start="zero", norms="owner", private=SCALES, ranks=2)), ids)
    assert str(model) == structure
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_errors_before_a_group_are_made_good() -> None:
    """With a replay of the source, the fit aims at the source though an earlier block has changed."""
    model = tiny_model("llama")
    ids = token_ids(model, (64, 24))
    replay = sharing_replay(model, ids)
    source = copy.deepcopy(model)
    decoder_of(model).blocks[0].mlp.down_proj.weight.mul_(0.7)
    plan = plan_of(model, Group(blocks=(1, 2), private=SCALES, ranks=8))
    informed = fit_sharing(model, plan, ids, replay=replay)
    naive = fit_sharing(model, plan, ids)
    new = token_ids(model, (16, 24), seed=7)
    assert kl_to(source, folded(model, plan, informed), new) < kl_to(source, folded(model, plan, naive), new)


@pytest.mark.parametrize(
    ("groups", "fitted"),
    [
        ([Group(blocks=(0, 1))], []),
        ([Group(blocks=(0, 1), donor="mean")], []),
        ([Group(blocks=(0, 1), start="zero", norms="owner", private=SCALES)], []),
        (
            [
                Group(blocks=(0, 1), sublayers=("attention",), private=SCALES, ranks=4),
                Group(blocks=(1, 2), sublayers=("mlp",), donor="last", norms="owner"),
            ],
            [1],
        ),
    ],
)
def test_groups_of_experts_are_not_fitted_but_reckoned_with(groups: list[Group], fitted: list[int]) -> None:
    model = tiny_model("mixtral")
    ids = token_ids(model, (16, 16))
    plan = plan_of(model, *groups)
    fit = fit_sharing(model, plan, ids)
    assert [report.block for report in fit.members] == fitted
    assert fit.kl == pytest.approx(kl_to(model, folded(model, plan, fit), ids[-2:]), rel=2e-3)


def test_least_squares_of_experts_is_refused() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(UnsupportedModelError, match="not a linear layer"):
        fit_sharing(model, plan_of(model, Group(blocks=(0, 1), donor="least_squares")), token_ids(model, (8, 12)))


def test_an_mlp_that_starts_at_zero_is_fitted_without_the_attention_that_is_gone() -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (16, 16))
    plan = plan_of(
        model, Group(blocks=(1, 2), sublayers=("mlp",), start="zero", private=SCALES, ranks=4), removed_attention=[2]
    )
    fit = fit_sharing(model, plan, ids)
    assert fit.members[0].kl_before == pytest.approx(kl_to(model, folded(model, plan, None), ids[-2:]), rel=2e-3)
    assert fit.kl == pytest.approx(kl_to(model, folded(model, plan, fit), ids[-2:]), rel=2e-3)


def test_two_kinds_of_groups_in_one_block() -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (16, 16))
    plan = plan_of(
        model,
        Group(blocks=(0, 2), sublayers=("attention",), donor="least_squares"),
        Group(blocks=(2, 3, 4), sublayers=("mlp",), donor="mean", private=SCALES),
    )
    fit = fit_sharing(model, plan, ids)
    assert fit.kl == pytest.approx(kl_to(model, folded(model, plan, fit), ids[-2:]), rel=2e-3)
    assert [report.block for report in fit.members] == [0, 2, 3, 4]

"""From a size to a plan: what is chosen is the best of what was measured, and what was measured is true."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foldgpt.compensation import compensate_, compensate_and_judge_
from foldgpt.errors import FoldGPTError, PlanError, UsageError
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, predicted_parameters, source_model_of
from foldgpt.plan import Compensation, FoldPlan
from foldgpt.sharing import solver
from foldgpt.sharing.adjacent import adjacent_groups
from foldgpt.sharing.distance import SharingCost
from foldgpt.sharing.fit import fit_sharing
from foldgpt.sharing.solver import Solution, limit_of, middle, solve
from foldgpt.sizes import Size
from models import model_of_an_unknown_family, tiny_hybrid, tiny_model, token_ids

ORDER = [4, 3, 2, 1, 5, 0]


def solved(model: Any, size: float, ids: torch.Tensor) -> Solution:
    return solve(
        model, source_model_of(model), ids, limit_of(model, Size("ratio", size)), lambda number: ORDER[:number]
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("size", [0.83, 0.6])
@torch.no_grad()
def test_the_choice_is_the_best_and_fits_the_budget(family: str, size: float) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (16, 16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = solved(model, size, ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kinds = {(c.num_removed > 0, c.num_at_zero > 0, c.num_shared > 0) for c in found.candidates}
    assert {(True, False, False), (False, True, False)} <= kinds
    assert any(shared for _, _, shared in kinds)
    assert found.best.kl == min(candidate.kl for candidate in found.candidates)
    for candidate in found.candidates:
        assert (
            candidate.parameters == predicted_parameters(model, candidate.plan) <= limit_of(model, Size("ratio", size))
        )
    held = ids[-found.num_held_out // 16 :]
    theirs = model(input_ids=held, use_cache=False).logits.double().log_softmax(-1)
    for candidate in found.candidates:
        folded = copy.deepcopy(model)
        fold_(folded, candidate.plan, fit_sharing(model, candidate.plan, ids).fits)
        ours = folded(input_ids=held, use_cache=False).logits.double().log_softmax(-1)
        assert candidate.kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=5e-3)
        assert sum(p.numel() for p in folded.parameters()) == candidate.parameters


@torch.no_grad()
def test_a_limit_is_a_limit() -> None:
    """Private norms must not come on top of a limit that removal meets to the parameter."""
    model = tiny_model("llama")
    source = source_model_of(model)
    limit = predicted_parameters(model, FoldPlan.create(source, removed=ORDER[:2]))
    found = solve(model, source, token_ids(model, (16, 16)), limit, lambda number: ORDER[:number])
    assert len(found.candidates) > 1
    assert all(candidate.parameters <= limit for candidate in found.candidates)


@torch.no_grad()
def test_shared_experts_are_measured_as_they_are_folded() -> None:
    model = tiny_model("mixtral")
    ids = token_ids(model, (16, 16))
    found = solved(model, 0.7, ids)
    [shared] = [candidate for candidate in found.candidates if candidate.num_shared == 1]
    folded = copy.deepcopy(model)
    fold_(folded, shared.plan)
    theirs = model(input_ids=ids[-2:], use_cache=False).logits.double().log_softmax(-1)
    ours = folded(input_ids=ids[-2:], use_cache=False).logits.double().log_softmax(-1)
    assert shared.kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=5e-3)


@torch.no_grad()
def test_removal_wins_where_blocks_do_nothing() -> None:
    model = tiny_model("llama")
    for index in (3, 4):
        block = decoder_of(model).blocks[index]
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    found = solved(model, 0.67, token_ids(model, (16, 16)))
    assert found.best.name == "remove 2" and found.best.kl < 1e-6


@torch.no_grad()
def test_sharing_wins_where_blocks_are_alike() -> None:
    model = tiny_model("llama")
    blocks = decoder_of(model).blocks
    for one, other in ((1, 2), (3, 4)):
        norms = {name: p.clone() for name, p in blocks[other].named_parameters() if "norm" in name}
        blocks[other].load_state_dict(blocks[one].state_dict())
        for name, value in norms.items():
            blocks[other].get_parameter(name).copy_(value)
    found = solved(model, 0.67, token_ids(model, (16, 16)))
    assert found.best.num_shared == 2 and found.best.num_removed == 0
    assert {group.blocks for group in found.best.plan.groups} == {(1, 2), (3, 4)}
    assert found.best.kl < 0.01


@torch.no_grad()
def test_attention_and_mlp_share_apart_where_they_are_alike_apart() -> None:
    model = tiny_model("llama")
    blocks = decoder_of(model).blocks
    for one, other in ((0, 1), (2, 3)):
        blocks[other].self_attn.load_state_dict(blocks[one].self_attn.state_dict())
    for one, other in ((1, 2), (3, 4)):
        blocks[other].mlp.load_state_dict(blocks[one].mlp.state_dict())
    found = solved(model, 0.67, token_ids(model, (16, 16)))
    assert found.best.name == "remove 0, share 2 attentions and 2 MLPs in measured groups, fitted"
    assert (found.best.num_removed, found.best.num_shared) == (0, 4)
    assert {(group.blocks, group.sublayers) for group in found.best.plan.groups} == {
        ((0, 1), ("attention",)),
        ((2, 3), ("attention",)),
        ((1, 2), ("mlp",)),
        ((3, 4), ("mlp",)),
    }
    assert found.best.kl < 0.01


@pytest.mark.parametrize("settings", [{}, {"features": "output", "ridge": 3.0}], ids=str)
@torch.no_grad()
def test_candidates_are_compensated_as_they_will_be_folded(settings: dict[str, Any]) -> None:
    """On held-out windows, and the source is as it was afterwards."""
    model = tiny_model("llama")
    ids = token_ids(model, (64, 24))
    text = {"texts": ("a",), "context": 24, "num_tokens": ids.numel(), "fingerprint": "0"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    limit = limit_of(model, Size("ratio", 0.83))
    plain = solve(model, source_model_of(model), ids, limit, lambda number: ORDER[:number])
    found = solve(
        model,
        source_model_of(model),
        ids,
        limit,
        lambda number: ORDER[:number],
        compensation=Compensation(**text, **settings),
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    removal, compensated = plain.candidates[0], found.candidates[0]
    assert removal.plan.removed == compensated.plan.removed and compensated.kl < 0.99 * removal.kl
    folded = copy.deepcopy(model)
    report = compensate_(folded, compensated.plan, ids, **settings)
    assert report.kl_after == pytest.approx(compensated.kl, rel=1e-3)


@torch.no_grad()
def test_what_candidates_remove_is_compensated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (16, 16))
    text = Compensation(texts=("a",), context=16, num_tokens=ids.numel(), fingerprint="0")
    starts: list[tuple[int, ...]] = []

    def counted(model: Any, plan: FoldPlan, *rest: Any, **settings: Any) -> Any:
        starts.append(plan.removed)
        return compensate_and_judge_(model, plan, *rest, **settings)

    class Forgetful(dict[Any, Any]):
        """Never has what it is asked for."""

        def __contains__(self, key: object) -> bool:
            return False

    monkeypatch.setattr(solver, "compensate_and_judge_", counted)
    arguments = source_model_of(model), ids, limit_of(model, Size("ratio", 0.6)), lambda number: ORDER[:number]
    once = solve(model, *arguments, compensation=text)
    compensated = [c.plan.at_start.removed for c in once.candidates if c.plan.compensation is not None]
    assert set(starts) == set(compensated) and len(starts) < len(compensated)
    searched = solver._Solver(model, *arguments, text, None, None)
    searched._compensations = Forgetful()
    again = searched.run()
    assert [c.kl for c in again.candidates] == [c.kl for c in once.candidates]


@torch.no_grad()
def test_a_candidate_that_compensation_does_not_help_goes_without() -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (8, 4))  # too few tokens to fit anything on
    text = {"texts": ("a",), "context": 4, "num_tokens": ids.numel(), "fingerprint": "0"}
    limit = limit_of(model, Size("ratio", 0.83))
    kls = [
        solve(model, source_model_of(model), ids, limit, lambda number: ORDER[:number], compensation=how)
        .candidates[0]
        .kl
        for how in (None, Compensation(**text, ridge=1e-6))
    ]
    assert not compensate_(
        copy.deepcopy(model), FoldPlan.create(source_model_of(model), removed=ORDER[:1]), ids, ridge=1e-6
    ).kept
    assert kls[0] == pytest.approx(kls[1], rel=1e-6)


@torch.no_grad()
def test_a_family_whose_sublayers_are_not_known_is_met_by_removal() -> None:
    model = model_of_an_unknown_family(6)
    assert decoder_of(model).sublayers is None
    found = solved(model, 0.6, token_ids(model, (16, 16)))
    assert found.candidates[0].plan.is_removal_only
    assert all(math.isfinite(candidate.kl) for candidate in found.candidates)


def test_a_way_that_cannot_be_folded_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """The fifth block in this order is the one that attends; four have to go."""
    model = tiny_hybrid(3)
    order = [0, 1, 4, 5, 3, 2]
    limit = limit_of(model, Size("ratio", 0.36))
    found = solve(model, source_model_of(model), token_ids(model, (16, 16)), limit, lambda n: tuple(sorted(order[:n])))
    assert {candidate.name for candidate in found.candidates} >= {"remove 4"}
    assert all(3 in candidate.plan.kept for candidate in found.candidates)
    assert "left out: cannot remove all blocks that attend" in capsys.readouterr().err


def test_the_fewest_blocks_are_those_that_can_go() -> None:
    """One by itself cannot, two can."""
    model = tiny_model("llama")

    def removal(number: int) -> tuple[int, ...]:
        if number in refused:
            raise PlanError("this one may not go")
        return tuple(ORDER[:number])

    limit, ids, refused = limit_of(model, Size("ratio", 0.83)), token_ids(model, (16, 16)), {1}
    found = solve(model, source_model_of(model), ids, limit, removal)
    assert found.candidates[0].name == "remove 2"
    refused |= set(range(2, 6))
    with pytest.raises(UsageError, match=r"no removal of blocks .* this one may not go"):
        solve(model, source_model_of(model), ids, limit, removal)


def test_predictions_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (16, 16))
    with monkeypatch.context() as patched:
        patched.setattr(solver, "fit_sharing", lambda *_, **__: SimpleNamespace(kl=math.nan))
        with pytest.raises(FoldGPTError, match=r"remove 2: .*not finite.*--dtype"):
            solved(model, 0.83, ids)
    decoder_of(model).blocks[5].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(FoldGPTError, match=r"layers\.5\.mlp\.down_proj\.weight holds values that are not finite"):
        solved(model, 0.83, ids)


def test_a_size_that_cannot_be_met_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="one block must stay"):
        solve(model, source_model_of(model), token_ids(model, (16, 16)), 10, lambda number: ORDER[:number])


@pytest.mark.parametrize(("family", "is_compensated"), [("llama", False), ("gemma3", True)])
@torch.no_grad()
def test_a_search_that_was_stopped_measures_nothing_twice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family: str,
    is_compensated: bool,
) -> None:
    """Stopped behind every other one of its measurements, it ends where one that was left alone does."""
    model, checkpoint = tiny_model(family), tmp_path / "progress.json"
    ids, source = token_ids(model, (4, 8)), source_model_of(model)
    text = Compensation(texts=("a",), context=8, num_tokens=ids.numel(), fingerprint="0") if is_compensated else None
    limit = limit_of(model, Size("ratio", 0.83))

    def search(place: Path | None, number_off: int = 0) -> Solution:
        order = ORDER[number_off:] + ORDER[:number_off]
        return solve(model, source, ids, limit, lambda number: order[:number], compensation=text, checkpoint=place)

    stops = False
    measured: list[str] = []
    for name, of in (("fit_sharing", solver), ("pair", SharingCost)):
        original = getattr(of, name)

        def once(*arguments: Any, original: Any = original, name: str = name, **options: Any) -> Any:
            if stops and name == "fit_sharing" and measured.count(name) == 2:
                raise KeyboardInterrupt
            measured.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(of, name, once)
    whole = search(None)
    num_pairs, pairs, stops = measured.count("pair"), 0, True
    for _ in whole.candidates[2::2]:
        measured.clear()
        with pytest.raises(KeyboardInterrupt):
            search(checkpoint)
        assert measured.count("fit_sharing") == 2
        pairs += measured.count("pair")
    measured.clear()
    resumed = search(checkpoint)
    assert resumed == whole
    assert pairs + measured.count("pair") == num_pairs
    assert capsys.readouterr().err.count("measured before") >= len(whole.candidates) - 2
    measured.clear()
    search(checkpoint)
    assert not measured, "all is there"
    content = json.loads(checkpoint.read_text())
    for damaged in ({"candidates": [{"name": "remove 1"}]}, {"pairs": 3}, {"candidates": {}}):
        checkpoint.write_text(json.dumps({**content, **damaged}))
        with pytest.raises(KeyboardInterrupt):
            search(checkpoint)
        measured.clear()
    with pytest.raises(KeyboardInterrupt):
        search(checkpoint, 1)
    assert measured, "what another selection found is of no use"


def test_pairs_stand_around_the_middle() -> None:
    decoder = decoder_of(tiny_model("llama"))
    groups = adjacent_groups(decoder, range(6), size=2)
    assert [group.blocks for group in middle(groups, range(6), 1)] == [(2, 3)]
    assert [group.blocks for group in middle(groups, range(6), 3)] == [(0, 1), (2, 3), (4, 5)]

"""Compensated searches: what folding leaves of the promising sets decides, within the allowance."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foldgpt import pipeline
from foldgpt.recipe import Recipe
from foldgpt.selection import Request, Selection, select
from foldgpt.selection.folded_cost import FoldedCost
from foldgpt.selection.further_windows import fitted_windows, held_windows, last_stage_windows, prior_windows
from foldgpt.selection.gating.allowance import greedy_equivalents
from foldgpt.selection.gating.discrepancy import Discrepancy
from foldgpt.selection.gating.folded_refinement import FoldedRefinement
from foldgpt.selection.units import Removed
from models import tiny_model, token_ids
from run_inputs import tiny_recipe

MODULE = "foldgpt.selection.gating.folded_refinement"


@pytest.fixture
def request_(monkeypatch: pytest.MonkeyPatch) -> Request:
    """A compensated search that may take twice what greedy does, and in which much may lie between the measures."""
    monkeypatch.setattr("foldgpt.selection.gating.discrepancy._UNITS", 2.0)
    model = tiny_model("llama", num_hidden_layers=10)
    ids = token_ids(model, (64, 32))
    return Request(
        10,
        3,
        model=model,
        ids_WT=ids[:16],
        further_ids_WT=ids[16:],
        copies=0.0,
        compensate=True,
        options={"effort": 2.0},
    )


class Folded(FoldedCost):
    """The real measure, watched; or, with `costs`, made up."""

    def __init__(self, request: Request, fitted_WT: Tensor, held_WT: Tensor) -> None:
        self.made.append((fitted_WT, held_WT))
        super().__init__(request, fitted_WT, held_WT)

    made: list[tuple[Tensor, Tensor]]
    measured: list[Removed]
    costs: Callable[[Removed], float] | None = None
    stop_at: int | None = None

    def cost(self, removed: Removed) -> float:
        if len(self.measured) == self.stop_at:
            raise KeyboardInterrupt
        self.measured.append(removed)
        value = super().cost(removed)
        costs = type(self).costs
        return value if costs is None else costs(removed)


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> type[Folded]:
    """Stands in for `FoldedCost`; what it is told to do holds for one test."""

    fresh = type("Fresh", (Folded,), {"made": [], "measured": []})
    monkeypatch.setattr(f"{MODULE}.FoldedCost", fresh)
    return fresh


def parts(found: Selection) -> tuple[Any, ...]:
    return found.removed, found.removed_attention, found.removed_mlp


# ------------------------------------------------------------------------------------------------ the regression


def of(*units: int) -> Removed:
    return frozenset(units)


def test_before_anything_is_known_no_difference_is_expected_and_any_is_possible() -> None:
    expected_S, doubt_S = Discrepancy(12, 1, 3).predict([of(1, 2, 3), of(4, 5, 6)])
    assert expected_S.tolist() == [0, 0] and doubt_S[0] == pytest.approx(float(doubt_S[1])) and doubt_S[0] > 0.1


def test_what_is_known_of_a_set_is_expected_of_sets_like_it() -> None:
    discrepancy = Discrepancy(24, 1, 3)
    discrepancy.fit({of(1, 2, 3): -0.2, of(17, 18, 19): 0.2})
    same, near, far, other = (of(1, 2, 3), of(1, 2, 4), of(10, 11, 12), of(17, 18, 20))
    expected_S, doubt_S = discrepancy.predict([same, near, far, other])
    assert expected_S[0] == pytest.approx(-0.2, abs=0.03) and expected_S[3] > 0.1
    assert -0.2 < expected_S[1] < expected_S[2] < expected_S[3]
    assert doubt_S[0] < 0.025 < doubt_S[1] < doubt_S[2]


def test_a_difference_that_units_add_is_found_from_a_few_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    sets = [frozenset(torch.randperm(30, generator=generator)[:9].tolist()) for _ in range(80)]
    truth = {removed: sum(0.03 * math.cos(unit / 5) for unit in removed) for removed in sets}
    discrepancy = Discrepancy(30, 1, 9)
    discrepancy.fit({removed: truth[removed] for removed in sets[:12]})
    expected_S, doubt_S = discrepancy.predict(sets[12:])
    wrong_S = expected_S - torch.tensor([truth[removed] for removed in sets[12:]])
    raw = torch.tensor([truth[removed] for removed in sets[12:]]).std()
    assert wrong_S.square().mean().sqrt() < 0.4 * raw
    assert (wrong_S.abs() < 3 * doubt_S).all()


def test_attention_and_mlp_of_a_block_are_less_alike_than_those_of_neighbours() -> None:
    discrepancy = Discrepancy(16, 2, 1)
    discrepancy.fit({of(6): 0.2})
    same, other_kind, next_block = discrepancy.predict([of(6), of(7), of(8)])[0].tolist()
    assert other_kind < next_block < same


def test_where_little_of_a_cost_is_damage_little_can_lie_between_its_measures() -> None:
    _, whole_S = Discrepancy(8, 1, 2).predict([of(1, 2)])
    _, tenth_S = Discrepancy(8, 1, 2, scale=0.1).predict([of(1, 2)])
    assert tenth_S == pytest.approx(0.1 * whole_S)


# ------------------------------------------------------------------------------------------------ what decides


def test_sets_are_judged_behind_the_fit_that_folding_makes(request_: Request, folded: type[Folded]) -> None:
    report = select("gates", request_).report
    ((fitted, held),) = folded.made
    everything = torch.cat([request_.ids_WT, request_.further_ids_WT])
    assert torch.equal(fitted, everything[:48]), "fitted on three times the windows of the search"
    assert torch.equal(held, everything[-16:]), "and measured on as many as it has"
    by_hand = FoldedCost(request_, fitted, held)
    for final in report["finals"]:
        assert final["num_tokens"] == held.numel()
        assert final["cost"] == pytest.approx(by_hand.cost(frozenset(final["removed"])))
    costs = [final["cost"] for final in report["finals"]]
    assert len(costs) > 1 and costs == sorted(costs)
    assert len(set(folded.measured)) == len(folded.measured) == len(costs), "each is measured once"


def test_what_is_best_as_folded_is_removed(request_: Request, folded: type[Folded]) -> None:
    folded.costs = lambda removed: 1.0
    select("gates", request_)
    last = folded.measured[-1]
    folded.costs = lambda removed: 1.0 - 0.5 * (removed == last)
    found = select("gates", request_)
    assert frozenset(found.removed) == last
    own = request_.need_cost("test").cost(last)
    assert found.report["cost"] == pytest.approx(own, rel=1e-3), "what is reported of a search is of its own windows"


@pytest.mark.parametrize("liked", [(0, 1, 2), (4, 5, 8)])
def test_sets_that_the_search_misjudges_are_found(request_: Request, folded: type[Folded], liked: tuple[int]) -> None:
    """Each of three blocks is worth less than half of what the search thinks."""
    search = request_.need_cost("test")

    def cost(removed: Removed) -> float:
        return search.cost(removed) * 0.4 ** len(removed & set(liked))

    folded.costs = cost
    alone = frozenset(select("gates", replace(request_, further_ids_WT=None)).removed)
    found = frozenset(select("gates", request_).removed)
    order = sorted((frozenset(each) for each in itertools.combinations(range(10), 3)), key=cost)
    assert order.index(found) <= 2 < order.index(alone)


def test_a_set_that_was_not_measured_by_the_search_is_first_measured_by_it(
    request_: Request, folded: type[Folded]
) -> None:
    report = select("gates", request_).report
    known = {frozenset(row["removed"]): row["cost"] for row in report["refined"]}
    assert set(folded.measured[:2]) <= known.keys()
    search = request_.need_cost("test")
    for removed, cost in known.items():
        assert cost == pytest.approx(search.cost(removed), rel=1e-3)


def test_it_ends_when_nothing_may_well_be_less(
    request_: Request, folded: type[Folded], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(request_, options={"effort": 50.0})
    monkeypatch.setattr("foldgpt.selection.gating.discrepancy._UNITS", 0.002)
    monkeypatch.setattr("foldgpt.selection.gating.discrepancy._OFFSET", 0.002)
    search = request.need_cost("test")
    folded.costs = search.cost
    report = select("gates", request).report
    assert report["forward_equivalents"] < 25 * greedy_equivalents(search)
    assert len(report["finals"]) == 2, "one alone says too little"
    assert report["finals"][0]["cost"] == min(map(search.cost, map(frozenset, itertools.combinations(range(10), 3))))


def test_predictions_that_are_not_finite_do_not_win(request_: Request, folded: type[Folded]) -> None:
    first = frozenset(select("gates", request_).report["finals"][0]["removed"])
    folded.costs = lambda removed: math.inf if removed == first else 1.0
    found = select("gates", request_)
    assert frozenset(found.removed) != first
    assert first not in [frozenset(final["removed"]) for final in found.report["finals"]]
    folded.costs = lambda removed: math.inf
    found = select("gates", request_)
    assert found.report["finals"] == [] and found.report["cost"] == found.report["refined"][0]["cost"]


# ------------------------------------------------------------------------------------------------ what it takes


@pytest.mark.parametrize("changes", [{}, {"sublayers": True}, {"objective": "lm"}])
def test_it_is_paid_from_the_allowance(request_: Request, changes: dict[str, Any]) -> None:
    request = replace(request_, **changes)
    report = select("gates", request).report
    assert len(report["finals"]) > 1
    cost = request.need_cost("test")
    allowance = 2.0 * greedy_equivalents(cost) + cost.prior_equivalents
    without = select("gates", replace(request, further_ids_WT=None)).report
    assert without["finals"] == []
    assert report["forward_equivalents"] <= allowance


def test_what_a_set_is_expected_to_take_is_what_it_takes(request_: Request) -> None:
    refinement = FoldedRefinement(request_, request_.need_cost("test"))
    sets = [frozenset(removed) for removed in ([4], [2, 5, 9], [7, 8, 9])]
    measure = FoldedCost(request_, refinement._fitted_WT, refinement._held_WT)
    tokens = request_.ids_WT.numel()
    took = [measure.forward_tokens / tokens]
    for removed in sets:
        measure.cost(removed)
        took.append(measure.forward_tokens / tokens)
    expected = [refinement._start, *map(refinement._price, sets)]
    for before, after, price in zip([0.0, *took], took, expected, strict=False):
        # That removed blocks are not run is not taken into account.
        assert after - before <= price * 1.001 <= 2 * (after - before)


def test_nothing_is_left_for_fewer_than_two(request_: Request) -> None:
    refinement = FoldedRefinement(request_, request_.need_cost("test"))
    sets = [frozenset([2, 5, 8]), frozenset([4, 5, 6])]
    reserves = [refinement.reserve(float(allowance), sets) for allowance in range(100)]
    pays = [reserve > 0 for reserve in reserves]
    assert pays == sorted(pays) and not pays[0] and pays[-1]
    least = reserves[pays.index(True)]
    two = refinement._start + sum(map(refinement._price, sets))
    assert two <= least <= two + 0.5
    assert all(reserve < allowance / 2 for allowance, reserve in enumerate(reserves) if allowance)


def test_a_search_leaves_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldgpt.selection.gating.refine._PATIENCE", 10**6)
    monkeypatch.setattr("foldgpt.selection.gating.discrepancy._UNITS", 2.0)
    model = tiny_model("llama", num_hidden_layers=16)
    ids = token_ids(model, (32, 16))
    options = {"effort": 1.0}
    request = Request(16, 5, model=model, ids_WT=ids[:8], further_ids_WT=ids[8:], compensate=True, options=options)
    cost = request.need_cost("test")
    allowance = greedy_equivalents(cost) + cost.prior_equivalents
    report = select("gates", request).report
    assert len(report["finals"]) > 1 and report["forward_equivalents"] <= allowance
    monkeypatch.setattr(FoldedRefinement, "reserve", lambda *args: 0.0)
    assert select("gates", request).report["finals"] == [], "refinement takes all that it may"


@pytest.mark.parametrize("windows", [0, 1, 3, 8, 15, 16, 40])
def test_it_needs_some_text(request_: Request, windows: int) -> None:
    """Of 16 windows and 3 more, 5 are to be held out, and 3 are at least half as many."""
    request = replace(request_, further_ids_WT=request_.further_ids_WT[:windows])
    refinement = FoldedRefinement(request, request.need_cost("test"))
    sets = [frozenset([1, 2, 3])]
    assert refinement.has_text == (windows >= 3)
    assert (refinement.reserve(1000.0, sets) > 0) == refinement.has_text
    recorded = last_stage_windows(16, windows, compensated=True)
    assert recorded == (len(refinement._fitted_WT) + len(refinement._held_WT) if refinement.has_text else 0)
    assert not FoldedRefinement(replace(request, compensate=False), request.need_cost("test")).has_text


def test_nothing_is_fitted_on_windows_that_sets_are_judged_on() -> None:
    for searched, further in itertools.product(range(1, 41), repeat=2):
        fitted, held = fitted_windows(searched, further), held_windows(searched, further)
        assert fitted >= 1 and 1 <= held <= further and fitted + held <= searched + further
        assert held <= 2 * searched, "of much text a quarter would take the allowance"
        assert 0 <= prior_windows(searched, further) <= further - held


def test_a_run_judges_on_the_last_quarter_of_its_calibration_text(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    method = {"method": "gates", "remove": 2, "num_tokens": 128, "options": {"effort": 9.0}}
    recipe = Recipe.from_dict(tiny_recipe(*inputs, select=method, compensate={"method": "linear"}))
    report = pipeline.run(recipe, tmp_path / "run").plan.origin["report"]
    assert report["num_tokens"] == 128
    assert report["finals"][0]["num_tokens"] == recipe.calibration.num_tokens / 4


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("changes", [{}, {"objective": "lm"}, {"sublayers": True}])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_search_stopped_there_ends_in_the_same(
    after: int,
    request_: Request,
    folded: type[Folded],
    changes: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("foldgpt.selection.checkpoint._SECONDS_BETWEEN", 0.0)
    request = replace(request_, **changes)
    whole = select("gates", request)
    order = list(folded.measured)
    assert len(order) > 3
    folded.measured.clear()
    stopped = replace(request, checkpoint=tmp_path / "progress.json")
    folded.stop_at = after
    with pytest.raises(KeyboardInterrupt):
        select("gates", stopped)
    folded.stop_at = None
    resumed = select("gates", stopped)
    assert folded.measured[: len(order)] == order[: len(folded.measured)]
    assert parts(resumed) == parts(whole)
    kept = json.loads(stopped.checkpoint.read_text())
    # Up to rounding: the recordings that are paid for twice are no part of the allowance.
    again = resumed.report["forward_equivalents"] - whole.report["forward_equivalents"]
    assert (kept["set_up_again"] >= 1 and again >= kept["set_up_again"] - 0.01) or len(folded.measured) != len(order)


def test_what_a_stopped_search_knew_is_not_measured_again(
    request_: Request, folded: type[Folded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgpt.selection.checkpoint._SECONDS_BETWEEN", 0.0)
    stopped = replace(request_, checkpoint=tmp_path / "progress.json")
    folded.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        select("gates", stopped)
    kept = json.loads(stopped.checkpoint.read_text())["folded"]
    assert [frozenset(removed) for removed in kept["sets"]] == folded.measured and len(kept["costs"]) == 2
    folded.stop_at = None
    select("gates", stopped)
    assert len(set(folded.measured)) == len(folded.measured)


def test_what_was_searched_on_a_part_of_the_windows_is_judged_on_all_of_them(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgpt.selection.gating.stage_samples._REFINEMENT_TOKENS", 256)
    report = select("gates", replace(request_, options={"effort": 5.0})).report
    cost = request_.need_cost("test")
    best = sorted(frozenset(row["removed"]) for row in report["refined"])
    assert 1 < len(best) <= 4 and frozenset(report["finals"][0]["removed"]) in best
    for row in report["refined"]:
        assert row["cost"] == pytest.approx(cost.cost(frozenset(row["removed"])), rel=1e-3)
    assert report["forward_equivalents"] <= 5 * greedy_equivalents(cost) + cost.prior_equivalents

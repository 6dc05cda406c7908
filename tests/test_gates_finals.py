"""Finals: what is level after a search is decided by further text, within the allowance."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foldgpt import pipeline
from foldgpt.recipe import Recipe
from foldgpt.selection import RemovalCost, Request, select
from foldgpt.selection.folded_cost import FoldedCost
from foldgpt.selection.further_windows import fitted_windows, held_windows, prior_windows, windows_of_finals
from foldgpt.selection.gating.allowance import greedy_equivalents
from foldgpt.selection.gating.finals import Final, Round
from foldgpt.selection.gating.further_text import FurtherText
from foldgpt.selection.gating.refine import Refinement
from foldgpt.selection.units import Removed
from models import tiny_model, token_ids
from run_inputs import tiny_recipe


def _sets_in_finals(
    request: Request, monkeypatch: pytest.MonkeyPatch, known: dict[Removed, float], **arguments: Any
) -> list[Removed] | None:
    """What `FurtherText` puts into finals; None where there are none."""
    sent: list[list[Removed]] = []

    def seen(sets: list[Removed], *_: Any, **__: Any) -> list[Final]:
        sent.append(sets)
        return []

    monkeypatch.setattr("foldgpt.selection.gating.further_text.finals", seen)
    further = FurtherText(request, request.need_cost("test"))
    assert further.finals(known, lambda: 99.0, [], lambda: None, **arguments) == []
    return sent[0] if sent else None


def test_no_more_than_four_are_measured(long_request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {frozenset([unit]): 1.0 + 0.01 * unit for unit in range(9)}
    sets = _sets_in_finals(long_request, monkeypatch, known)
    assert sets == [frozenset([unit]) for unit in range(4)]
    earlier = [[Round(sets)]]
    later = _sets_in_finals(long_request, monkeypatch, known, earlier=earlier, incumbents=sets[1:3])
    assert later == [frozenset([unit]) for unit in (1, 2, 4, 5, 6, 7)]
    known = {removed: known[removed] for removed in sets}
    assert _sets_in_finals(long_request, monkeypatch, known, earlier=earlier, incumbents=sets[1:3]) is None


@pytest.fixture
def long_request(monkeypatch: pytest.MonkeyPatch) -> Request:
    """A search that may take twice what greedy does, after which the best four sets count as level."""
    for name in ("_LEVEL", "_LEVEL_COMPENSATED"):
        monkeypatch.setattr(f"foldgpt.selection.gating.further_text.{name}", 1.0)
    model = tiny_model("llama", num_hidden_layers=10)
    ids = token_ids(model, (64, 32))
    return Request(10, 3, model=model, ids_WT=ids[:16], further_ids_WT=ids[16:], copies=0.0, options={"effort": 2.0})


def test_a_search_ends_with_finals(long_request: Request) -> None:
    report = select("gates", long_request).report
    best = report["finals"][0]
    assert long_request.further_ids_WT is not None
    by_hand = [
        replace(long_request, ids_WT=ids_WT).need_cost("test").cost(frozenset(best["removed"]))
        for ids_WT in long_request.further_ids_WT.split(16)
    ]
    assert best["num_tokens"] == 48 * 32 and best["cost"] == pytest.approx(sum(by_hand) / 3, rel=1e-3)
    own = long_request.need_cost("test").cost(frozenset(best["removed"]))
    assert report["cost"] == pytest.approx(own, rel=1e-3), "what is reported of a search is of its own windows"


def test_the_winner_of_the_finals_is_removed(long_request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    loser = frozenset(select("gates", replace(long_request, further_ids_WT=None)).removed)
    cost = RemovalCost.cost

    def flattered(self: RemovalCost, removed: Removed, *args: Any, **kwargs: Any) -> float:
        is_further = torch.equal(self.replay.ids_WT, long_request.further_ids_WT[:16])
        return cost(self, removed, *args, **kwargs) + 9.0 * (is_further and removed == loser)

    monkeypatch.setattr(RemovalCost, "cost", flattered)
    assert frozenset(select("gates", long_request).removed) != loser


class _Liked:
    """Further text on which sets are the better the more they have of three blocks."""

    def __init__(self, blocks: set[int], stop_at: int | None = None) -> None:
        self.blocks, self.stop_at = blocks, stop_at
        self.measured: list[Removed] = []
        self.seconds = self.forward_tokens = 0.0

    def source_cost(self) -> float:
        return 0.0

    def cost(self, removed: Removed) -> float:
        if len(self.measured) == self.stop_at:
            raise KeyboardInterrupt
        self.measured.append(removed)
        return 1.0 - 0.2 * len(self.blocks & removed)


@pytest.fixture
def far_request(long_request: Request, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A search in which all sets are level, and for which passes are left."""
    monkeypatch.setattr("foldgpt.selection.gating.further_text._LEVEL", 99.0)
    return replace(long_request, further_ids_WT=long_request.ids_WT, options={"effort": 9.0})


def test_what_wins_on_further_text_is_searched_around(far_request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    liked = _Liked({0, 1, 2})
    centers: list[Removed] = []

    def around(self: Refinement, center: Removed, limit: Callable[..., float], is_spent: Callable[[], bool]) -> None:
        assert limit(self.known) > min(self.known.values()) and not is_spent()
        centers.append(center)
        self.known[frozenset(liked.blocks)] = 1.01 * min(self.known.values())

    monkeypatch.setattr(FurtherText, "_measure", lambda self, ids_WT: liked)
    monkeypatch.setattr(Refinement, "around", around)
    found = select("gates", far_request)
    assert found.removed == (0, 1, 2) and len(set(liked.measured)) == len(liked.measured), "each is measured once"
    assert centers[0] == max(liked.measured[:4], key=lambda removed: len(removed & liked.blocks))
    assert frozenset([0, 1, 2]) in liked.measured[4:]


@pytest.mark.parametrize(("effort", "finds"), [(0.7, False), (1.0, True)])
def test_what_is_found_around_the_winner_is_paid_from_the_allowance(
    far_request: Request, monkeypatch: pytest.MonkeyPatch, effort: float, finds: bool
) -> None:
    """Refinement sees a part of the windows here, and what it finds is measured on all of them."""
    monkeypatch.setattr("foldgpt.selection.gating.stage_samples._REFINEMENT_TOKENS", 64)
    monkeypatch.setattr(FurtherText, "_measure", lambda self, ids_WT: _Liked({0, 4, 5}))
    found: list[int] = []
    around = Refinement.around

    def counted(self: Refinement, *arguments: Any) -> None:
        before = len(self.known)
        around(self, *arguments)
        found.append(len(self.known) - before)

    monkeypatch.setattr(Refinement, "around", counted)
    request = replace(far_request, options={"effort": effort})
    spent = select("gates", request).report["forward_equivalents"]
    assert found and any(found) == finds, "where too little is left nothing is begun"
    assert spent <= effort * greedy_equivalents(request.need_cost("test"))


@pytest.mark.parametrize("stop_at", [2, 4, 5, 7])
def test_a_search_stopped_in_later_finals_ends_in_the_same(
    far_request: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    monkeypatch.setattr("foldgpt.selection.checkpoint._SECONDS_BETWEEN", 0.0)
    liked = _Liked({0, 4, 5})
    monkeypatch.setattr(FurtherText, "_measure", lambda self, ids_WT: liked)
    whole = select("gates", far_request)
    assert len(liked.measured) > 7
    stopped = replace(far_request, checkpoint=tmp_path / "progress.json")
    first, rest = _Liked(liked.blocks, stop_at), _Liked(liked.blocks)
    monkeypatch.setattr(FurtherText, "_measure", lambda self, ids_WT: first)
    with pytest.raises(KeyboardInterrupt):
        select("gates", stopped)
    monkeypatch.setattr(FurtherText, "_measure", lambda self, ids_WT: rest)
    resumed = select("gates", stopped)
    assert [*first.measured, *rest.measured] == liked.measured
    assert resumed.removed == whole.removed and resumed.report["finals"] == whole.report["finals"]


@pytest.mark.parametrize("calls", [0, 1])
def test_a_search_stopped_while_it_looks_around_ends_in_the_same(
    far_request: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    monkeypatch.setattr("foldgpt.selection.checkpoint._SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(FurtherText, "_measure", lambda self, ids_WT: _Liked({0, 4, 5}))
    whole = select("gates", far_request)
    around, measure = Refinement.around, Refinement._measure
    begun: list[int] = []

    def watched(self: Refinement, *arguments: Any) -> None:
        begun.append(0)
        around(self, *arguments)

    def interrupted(self: Refinement, *arguments: Any) -> bool:
        if begun and begun[-1] == calls:
            raise KeyboardInterrupt
        begun[-1:] = [begun[-1] + 1] if begun else []
        return measure(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Refinement, "around", watched)
        patched.setattr(Refinement, "_measure", interrupted)
        select("gates", stopped := replace(far_request, checkpoint=tmp_path / "progress.json"))
    resumed = select("gates", stopped)
    assert resumed.removed == whole.removed and resumed.report["finals"] == whole.report["finals"]
    assert resumed.report["refined"] == whole.report["refined"]


def test_finals_are_paid_from_the_allowance(long_request: Request) -> None:
    allowance = 2.0 * greedy_equivalents(long_request.need_cost("test"))
    without = select("gates", replace(long_request, further_ids_WT=None)).report
    report = select("gates", long_request).report
    # Three rounds, each with a recording and runs of some of the four sets.
    assert without["forward_equivalents"] + 3 < report["forward_equivalents"] <= allowance
    assert without["finals"] == []


def test_what_a_round_will_take_is_no_less_than_what_it_takes(long_request: Request) -> None:
    cost = long_request.need_cost("test")
    ids_WT = long_request.further_ids_WT[:12]
    sets = [frozenset(removed) for removed in ([0, 1, 2], [0, 1, 3], [2, 5, 9], [7, 8, 9])]
    round_cost = replace(long_request, ids_WT=ids_WT).need_cost("test")
    for removed in sets:
        round_cost.cost(removed)
    took = round_cost.forward_equivalents * len(ids_WT) / 16
    assert took <= cost.further_equivalents(sets, ids_WT) <= 1.6 * took


def test_a_round_of_compensated_sets_is_expected_to_begin_at_the_blocks_that_compensate(long_request: Request) -> None:
    request = replace(long_request, compensate=True)
    held_WT = request.further_ids_WT[-12:]
    sets = [frozenset(removed) for removed in ([4], [2, 5, 9], [7, 8, 9])]
    folded = FoldedCost(request, request.ids_WT, held_WT)
    for removed in sets:
        folded.cost(removed)
    # That removed blocks are not run is not taken into account.
    not_run = sum(map(len, sets)) / 10 * held_WT.numel()
    expected = request.need_cost("test").further_equivalents(sets, held_WT) * request.ids_WT.numel()
    assert expected == pytest.approx(folded._held.forward_tokens + not_run, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"compensate": True}, {"objective": "lm"}, {"sublayers": True}])
@pytest.mark.parametrize("after", [0, 1])
def test_a_search_stopped_in_its_finals_ends_in_the_same(
    after: int, long_request: Request, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgpt.selection.checkpoint._SECONDS_BETWEEN", 0.0)
    request = replace(long_request, **changes)
    whole = select("gates", request)
    assert whole.report["finals"]
    stopped = replace(request, checkpoint=tmp_path / "progress.json")
    measured: list[Removed] = []

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def measure(self: FurtherText, ids_WT: Tensor) -> Any:
            found = real(self, ids_WT)
            cost = found.cost

            def costs(removed: Removed, *arguments: Any) -> float:
                if len(measured) == after and not resumes:
                    raise KeyboardInterrupt
                measured.extend([removed] if removed else [])  # not what removing nothing costs
                return float(cost(removed, *arguments))

            found.cost = costs
            return found

        return measure

    resumes = False
    monkeypatch.setattr(FurtherText, "_measure", watched(FurtherText._measure))
    with pytest.raises(KeyboardInterrupt):
        select("gates", stopped)
    before, resumes = list(measured), True
    measured.clear()
    resumed = select("gates", stopped)
    first = [frozenset(removed) for removed in json.loads(stopped.checkpoint.read_text())["stages"][0][0]["sets"]]
    assert len(before) == after and sorted([*before, *measured][: len(first)], key=sorted) == sorted(first, key=sorted)
    assert (resumed.removed, resumed.removed_attention, resumed.removed_mlp) == (
        whole.removed,
        whole.removed_attention,
        whole.removed_mlp,
    )
    assert resumed.report["finals"] == whole.report["finals"]
    # Up to rounding: the search's recording is paid for twice, that of the stopped round, which is no shorter, once.
    again = resumed.report["forward_equivalents"] - whole.report["forward_equivalents"]
    set_up_again = json.loads(stopped.checkpoint.read_text())["set_up_again"]
    assert 1 <= set_up_again <= again + 0.01 < set_up_again + 0.9


@pytest.mark.parametrize("compensate", ["none", "linear"])
def test_a_run_judges_on_the_rest_of_its_calibration_text(
    compensate: str, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_LEVEL", "_LEVEL_COMPENSATED"):
        monkeypatch.setattr(f"foldgpt.selection.gating.further_text.{name}", 9.0)
    method = {"method": "gates", "remove": 2, "num_tokens": 128, "options": {"effort": 9.0}}
    recipe = Recipe.from_dict(tiny_recipe(*inputs, select=method, compensate={"method": compensate}))
    report = pipeline.run(recipe, tmp_path / "run").plan.origin["report"]
    assert report["num_tokens"] == 128
    num_tokens = recipe.calibration.num_tokens
    assert report["finals"][0]["num_tokens"] == (num_tokens - 128 if compensate == "none" else num_tokens / 4)


def test_a_round_of_a_few_windows_is_left_out(long_request: Request) -> None:
    few = long_request.further_ids_WT[:7]
    assert select("gates", replace(long_request, further_ids_WT=few)).report["finals"] == []


def _folded_costs(monkeypatch: pytest.MonkeyPatch, costs: Mapping[Removed, float] | None = None) -> list[list[Tensor]]:
    """Watch what sets are compensated on and judged on; without `costs`, by the real measure."""
    seen: list[list[Tensor]] = []

    class Watched(FoldedCost):
        def __init__(self, request: Request, fitted_WT: Tensor, held_WT: Tensor) -> None:
            seen.append([fitted_WT, held_WT])
            super().__init__(request, fitted_WT, held_WT)

        def cost(self, removed: Removed) -> float:
            value = super().cost(removed)
            return value if costs is None else costs[removed]

    monkeypatch.setattr("foldgpt.selection.gating.further_text.FoldedCost", Watched)
    return seen


def test_compensated_sets_are_judged_behind_the_fit_that_folding_makes(
    long_request: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(long_request, compensate=True)
    seen = _folded_costs(monkeypatch)
    report = select("gates", request).report
    ((fitted, held),) = seen
    everything = torch.cat([request.ids_WT, request.further_ids_WT])
    assert torch.equal(fitted, everything[:48]), "fitted on three times the windows of the search"
    assert torch.equal(held, everything[-16:]), "and measured on as many as it has"
    by_hand = FoldedCost(request, fitted, held)
    for final in report["finals"]:
        assert final["num_tokens"] == held.numel()
        assert final["cost"] == pytest.approx(by_hand.cost(frozenset(final["removed"])))
    assert len(report["finals"]) > 1


def test_what_is_best_behind_that_fit_is_removed(long_request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(long_request, compensate=True)
    finals = select("gates", request).report["finals"]
    last = frozenset(finals[-1]["removed"])
    _folded_costs(monkeypatch, {frozenset(final["removed"]): 1.0 - (final is finals[-1]) for final in finals})
    assert frozenset(select("gates", request).removed) == last


def test_sets_within_a_tenth_are_compensated_and_judged(long_request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    request = replace(long_request, compensate=True)
    further = FurtherText(request, request.need_cost("test"))
    sets = [frozenset([1, 2, unit]) for unit in range(3, 10)]
    found = further.finals(dict(zip(sets, [1.0, 1.09, 1.11], strict=False)), lambda: 99.0, [], lambda: None)
    assert {final.removed for final in found} == set(sets[:2])
    found = further.finals(dict.fromkeys(sets, 1.0), lambda: 99.0, [], lambda: None)
    assert {final.removed for final in found} == set(sets[:6]), "six at most"


@pytest.mark.parametrize("changes", [{}, {"sublayers": True}])
def test_compensated_finals_are_paid_from_the_allowance(long_request: Request, changes: dict[str, Any]) -> None:
    request = replace(long_request, compensate=True, **changes)
    effort = float(request.options["effort"])
    report = select("gates", request).report
    assert len(report["finals"]) > 1
    cost = request.need_cost("test")
    assert report["forward_equivalents"] <= effort * greedy_equivalents(cost) + cost.prior_equivalents


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("windows", [0, 1, 3, 8, 15, 16, 40])
def test_finals_need_some_text(long_request: Request, windows: int, compensate: bool) -> None:
    """Compensated: of 16 windows and 3 more, 5 are to be held out, and 3 are at least half as many."""
    request = replace(long_request, compensate=compensate, further_ids_WT=long_request.further_ids_WT[:windows])
    further = FurtherText(request, request.need_cost("test"))
    sets = [frozenset([1, 2, 3])]
    assert bool(further.rounds) == (windows >= (3 if compensate else 8))
    assert (further.reserve(1000.0, sets) > 0) == bool(further.rounds)
    recorded = windows_of_finals(16, windows, compensate)
    if not further.rounds:
        assert recorded == 0
    elif compensate:
        assert recorded == len(further._fitted_WT) + len(further.rounds[0])
    else:
        assert recorded == max(map(len, further.rounds))


def test_nothing_is_fitted_on_windows_that_compensated_sets_are_judged_on() -> None:
    for searched, further in itertools.product(range(1, 41), repeat=2):
        fitted, held = fitted_windows(searched, further), held_windows(searched, further)
        assert fitted >= 1 and 1 <= held <= further and fitted + held <= searched + further
        assert 0 <= prior_windows(searched, further) <= further - held


def test_a_search_leaves_what_its_finals_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldgpt.selection.gating.further_text._LEVEL_COMPENSATED", 1.0)
    monkeypatch.setattr("foldgpt.selection.gating.refine._PATIENCE", 10**6)
    model = tiny_model("llama", num_hidden_layers=16)
    ids = token_ids(model, (32, 16))
    options = {"effort": 1.0}
    request = Request(16, 5, model=model, ids_WT=ids[:8], further_ids_WT=ids[8:], compensate=True, options=options)
    cost = request.need_cost("test")
    allowance = greedy_equivalents(cost) + cost.prior_equivalents
    report = select("gates", request).report
    assert len(report["finals"]) > 1 and report["forward_equivalents"] <= allowance
    monkeypatch.setattr(FurtherText, "reserve", lambda *args: 0.0)
    assert select("gates", request).report["finals"] == [], "refinement takes all that it may"


def test_nothing_is_left_for_finals_of_fewer_than_two(long_request: Request) -> None:
    request = replace(long_request, compensate=True)
    further = FurtherText(request, request.need_cost("test"))
    sets = [frozenset([2, 5, 8]), frozenset([4, 5, 6])]
    reserves = [further.reserve(float(allowance), sets) for allowance in range(100)]
    pays = [reserve > 0 for reserve in reserves]
    assert pays == sorted(pays) and not pays[0] and pays[-1]
    least = reserves[pays.index(True)]
    start = further._equivalents([], further.rounds[0])
    one = (reserves[-1] - start) / 6
    assert start + 2 * one <= least <= start + 2 * one + 0.25
    assert all(reserve <= allowance / 4 for allowance, reserve in enumerate(reserves))


def test_what_was_refined_on_a_part_of_the_windows_is_judged_on_all_of_them_and_paid_for(
    long_request: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgpt.selection.gating.stage_samples._REFINEMENT_TOKENS", 64)
    model = long_request.model
    ids = token_ids(model, (64, 32))
    request = replace(long_request, ids_WT=ids, further_ids_WT=None, options={"effort": 0.3})
    report = select("gates", request).report
    cost = request.need_cost("test")
    assert report["refined"]
    for row in report["refined"]:
        assert row["cost"] == pytest.approx(cost.cost(frozenset(row["removed"])), rel=1e-3)
    assert report["forward_equivalents"] <= 0.3 * greedy_equivalents(cost)


def test_as_many_sets_as_finals_take_are_measured_on_all_windows(
    long_request: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgpt.selection.gating.stage_samples._REFINEMENT_TOKENS", 256)
    request = replace(long_request, compensate=True, options={"effort": 5.0})
    assert len(select("gates", request).report["finals"]) == 6

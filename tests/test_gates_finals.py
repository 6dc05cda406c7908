"""Finals: what is level after a search is decided by further text, within the allowance."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foldgpt import pipeline
from foldgpt.recipe import Recipe
from foldgpt.selection import RemovalCost, Request, select
from foldgpt.selection.further_windows import last_stage_windows
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
    monkeypatch.setattr("foldgpt.selection.gating.further_text._LEVEL", 1.0)
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


@pytest.mark.parametrize("changes", [{}, {"objective": "lm"}, {"sublayers": True}])
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


def test_a_run_judges_on_the_rest_of_its_calibration_text(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgpt.selection.gating.further_text._LEVEL", 9.0)
    method = {"method": "gates", "remove": 2, "num_tokens": 128, "options": {"effort": 9.0}}
    recipe = Recipe.from_dict(tiny_recipe(*inputs, select=method, compensate={"method": "none"}))
    report = pipeline.run(recipe, tmp_path / "run").plan.origin["report"]
    assert report["num_tokens"] == 128
    assert report["finals"][0]["num_tokens"] == recipe.calibration.num_tokens - 128


def test_a_round_of_a_few_windows_is_left_out(long_request: Request) -> None:
    few = long_request.further_ids_WT[:7]
    assert select("gates", replace(long_request, further_ids_WT=few)).report["finals"] == []


@pytest.mark.parametrize("windows", [0, 1, 3, 8, 15, 16, 40])
def test_finals_need_some_text(long_request: Request, windows: int) -> None:
    request = replace(long_request, further_ids_WT=long_request.further_ids_WT[:windows])
    further = FurtherText(request, request.need_cost("test"))
    assert bool(further.rounds) == (windows >= 8) == (further.reserve(1000.0) > 0)
    assert last_stage_windows(16, windows, compensated=False) == max(map(len, further.rounds), default=0)
    assert FurtherText(replace(request, compensate=True), request.need_cost("test")).rounds == []


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
    report = select("gates", replace(long_request, options={"effort": 5.0})).report
    assert len(report["refined"]) >= len(report["finals"]) and len(report["finals"]) > 1

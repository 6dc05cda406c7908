"""Finals: what is level after a search is decided by further text, within the allowance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foldgpt import pipeline
from foldgpt.recipe import Recipe
from foldgpt.selection import RemovalCost, Request, select
from foldgpt.selection.gating.finals import Final, finals
from foldgpt.selection.gating.gates import greedy_equivalents
from foldgpt.selection.units import Removed
from models import tiny_model, token_ids
from run_inputs import tiny_recipe

A, B, C, FAR = (frozenset([unit]) for unit in range(4))
WINDOWS = torch.zeros(2, 8, dtype=torch.int64)


def _finals(
    known: dict[Removed, float],
    truth: list[dict[Removed, float]],
    *,
    affordable: int = 9,
    floor: float = 0.0,
    windows: list[Tensor] | None = None,
) -> tuple[list[Final], list[Removed]]:
    """The outcome, and the sets in the order they were measured."""
    measured: list[Removed] = []
    rounds = iter(truth)

    def measure(ids_WT: Tensor) -> Any:
        values = next(rounds)

        def cost(removed: Removed) -> float:
            measured.append(removed)
            return values[removed]

        return SimpleNamespace(cost=cost, source_cost=lambda: floor)

    found = finals(
        known,
        floor,
        windows or [WINDOWS] * len(truth),
        measure,
        affordable=lambda removed, ids_WT: min(affordable, len(removed)),
        after_round=lambda cost: None,
    )
    return found, measured


def test_further_text_decides_between_sets_that_are_level() -> None:
    found, measured = _finals({A: 1.00, B: 1.01, FAR: 1.2}, [{A: 1.3, B: 1.0}])
    assert [final.removed for final in found] == [B, A] and measured == [A, B]
    assert found[0].cost == 1.0 and found[0].num_tokens == WINDOWS.numel()


def test_one_that_is_ahead_from_the_start_needs_no_finals() -> None:
    assert _finals({A: 1.0, FAR: 1.2}, [{A: 1.0, FAR: 0.1}]) == ([], [])


def test_who_falls_behind_is_measured_no_more_and_does_not_win_by_it() -> None:
    rounds = [{A: 1.0, B: 1.01, C: 2.0}, {A: 1.3, B: 1.0}]
    found, measured = _finals({A: 1.0, B: 1.0, C: 1.0}, rounds)
    assert measured == [A, B, C, A, B]
    assert [final.removed for final in found] == [B, A], "C was measured on half of the text only"
    assert found[0].cost == pytest.approx(1.005) and found[0].num_tokens == 2 * WINDOWS.numel()


def test_rounds_end_when_one_is_ahead() -> None:
    found, measured = _finals({A: 1.0, B: 1.0}, [{A: 1.0, B: 2.0}, {A: 9.0, B: 0.0}])
    assert measured == [A, B] and found == [Final(A, 1.0, WINDOWS.numel()), Final(B, 2.0, WINDOWS.numel())]


@pytest.mark.parametrize("affordable", [0, 1])
def test_without_allowance_or_text_the_search_has_decided(affordable: int) -> None:
    assert _finals({A: 1.0, B: 1.0}, [{A: 2.0, B: 1.0}], affordable=affordable) == ([], [])
    assert _finals({A: 1.0, B: 1.0}, []) == ([], [])


def test_where_not_all_can_be_paid_for_the_best_ones_play() -> None:
    found, measured = _finals({A: 1.01, B: 1.0, C: 1.02}, [{A: 1.0, B: 2.0, C: 0.0}], affordable=2)
    assert measured == [A, B] and [final.removed for final in found] == [A, B]


def test_long_rounds_count_more() -> None:
    windows = [torch.zeros(3, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)]
    found, _ = _finals({A: 1.0, B: 1.0}, [{A: 1.0, B: 1.02}, {A: 1.02, B: 1.0}], windows=windows)
    assert [(final.removed, final.cost) for final in found] == [(A, pytest.approx(1.005)), (B, pytest.approx(1.015))]


def test_what_is_level_is_a_share_of_the_damage_not_of_the_loss() -> None:
    """A loss of 4.2 where the source has 3.2: 3 % of the difference are 0.03."""
    assert _finals({A: 4.20, B: 4.24}, [{A: 9.0, B: 4.0}], floor=3.2) == ([], [])
    assert _finals({A: 4.20, B: 4.22}, [{A: 4.3, B: 4.2}], floor=3.2)[0][0].removed == B


def test_costs_below_zero_by_rounding_do_no_harm() -> None:
    assert _finals({A: -1e-9, B: -1e-9}, [{A: 1e-9, B: -1e-9}])[0][0].removed == B


def test_no_more_than_four_are_measured() -> None:
    known = {frozenset([unit]): 1.0 for unit in range(9)}
    found, _ = _finals(known, [dict.fromkeys(known, 1.0)])
    assert [sorted(final.removed) for final in found] == [[0], [1], [2], [3]]


@pytest.fixture
def long_request(monkeypatch: pytest.MonkeyPatch) -> Request:
    """A search that may take twice what greedy does, after which the best four sets count as level."""
    monkeypatch.setattr("foldgpt.selection.gating.finals._LEVEL", 1.0)
    model = tiny_model("llama", num_hidden_layers=10)
    ids = token_ids(model, (64, 32))
    return Request(10, 3, model=model, ids_WT=ids[:16], further_ids_WT=ids[16:], options={"effort": 2.0})


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


@pytest.mark.parametrize("changes", [{"compensate": True}, {"objective": "lm"}, {"sublayers": True}])
def test_a_search_stopped_in_its_finals_ends_in_the_same(
    long_request: Request, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(long_request, **changes)
    whole = select("gates", request)
    assert whole.report["finals"]
    stopped = replace(request, checkpoint=tmp_path / "progress.json")

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("foldgpt.selection.gating.gates.finals", stop)
        with pytest.raises(KeyboardInterrupt):
            select("gates", stopped)
    resumed = select("gates", stopped)
    assert (resumed.removed, resumed.removed_attention, resumed.removed_mlp) == (
        whole.removed,
        whole.removed_attention,
        whole.removed_mlp,
    )
    assert resumed.report["finals"] == whole.report["finals"]


def test_a_run_judges_on_the_rest_of_its_calibration_text(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgpt.selection.gating.finals._LEVEL", 9.0)
    method = {"method": "gates", "remove": 2, "num_tokens": 128, "options": {"effort": 9.0}}
    recipe = Recipe.from_dict(tiny_recipe(*inputs, select=method))
    report = pipeline.run(recipe, tmp_path / "run").plan.origin["report"]
    assert report["num_tokens"] == 128
    assert report["finals"][0]["num_tokens"] == recipe.calibration.num_tokens - 128


def test_a_round_of_a_few_windows_is_left_out(long_request: Request) -> None:
    few = long_request.further_ids_WT[:7]
    assert select("gates", replace(long_request, further_ids_WT=few)).report["finals"] == []

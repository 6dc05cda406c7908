"""Finals: what is level after a search is decided by further text, within the allowance."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foldgpt.selection import RemovalCost, Request, select
from foldgpt.selection.gating.finals import Final, finals
from foldgpt.selection.gating.gates import greedy_equivalents
from foldgpt.selection.units import Removed
from models import tiny_model, token_ids

A, B, C, FAR = (frozenset([unit]) for unit in range(4))
WINDOWS = torch.zeros(2, 8, dtype=torch.int64)


def _finals(
    known: dict[Removed, float], truth: list[dict[Removed, float]], *, rounds_allowed: int = 9
) -> tuple[list[Final], list[Removed]]:
    """The outcome, and the sets in the order they were measured."""
    measured: list[Removed] = []
    rounds = iter(truth)

    def measure(ids_WT: Tensor) -> Any:
        values = next(rounds)

        def cost(removed: Removed) -> float:
            measured.append(removed)
            return values[removed]

        return SimpleNamespace(cost=cost)

    left = iter(range(rounds_allowed))
    found = finals(
        known,
        [WINDOWS] * len(truth),
        measure,
        may_run=lambda number, ids_WT: next(left, None) is not None,
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


def test_without_allowance_or_text_the_search_has_decided() -> None:
    assert _finals({A: 1.0, B: 1.0}, [{A: 2.0, B: 1.0}], rounds_allowed=0) == ([], [])
    assert _finals({A: 1.0, B: 1.0}, []) == ([], [])


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
    spent = replace(long_request, options={"effort": without["forward_equivalents"] / allowance * 2.0})
    assert select("gates", spent).report["finals"] == []


def test_a_round_of_a_few_windows_is_left_out(long_request: Request) -> None:
    few = long_request.further_ids_WT[:7]
    assert select("gates", replace(long_request, further_ids_WT=few)).report["finals"] == []

"""Finals by themselves: which of some sets wins, what is measured for that, and when they end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foldgpt.selection.gating.finals import Final, Round, finals, level_with_best
from foldgpt.selection.units import Removed

A, B, C, FAR = (frozenset([unit]) for unit in range(4))
WINDOWS = torch.zeros(2, 8, dtype=torch.int64)


def _finals(
    known: dict[Removed, float],
    truth: list[dict[Removed, float]],
    *,
    affordable: int | Iterator[int] = 9,
    floor: float | Sequence[float] = 0.0,
    windows: list[Tensor] | None = None,
    past: list[Round] | None = None,
    earlier: Sequence[Sequence[Round]] = (),
) -> tuple[list[Final], list[Removed]]:
    """The outcome, and the sets in the order they were measured."""
    measured: list[Removed] = []
    floors = [floor] * (len(truth) + 1) if isinstance(floor, float) else floor
    rounds = iter(zip(truth, floors, strict=False))

    def measure(ids_WT: Tensor) -> Any:
        values, nothing = next(rounds)

        def cost(removed: Removed) -> float:
            measured.append(removed)
            return values[removed]

        return SimpleNamespace(seconds=0.0, forward_tokens=0.0, cost=cost, source_cost=lambda: nothing)

    found = finals(
        level_with_best(known, floors[0], 0.03),
        windows or [WINDOWS] * len(truth),
        measure,
        level=0.03,
        past=[] if past is None else past,
        earlier=earlier,
        affordable=lambda removed, ids_WT: min(
            affordable if isinstance(affordable, int) else next(affordable), len(removed)
        ),
        after_each=lambda cost: None,
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


def test_the_loss_of_the_source_counts_by_the_length_of_its_round() -> None:
    """It is 1.4 on average, not 2: of the best one's 2.4, the damage is 1, and 2.43 is level with it."""
    windows = [torch.zeros(number, 8, dtype=torch.int64) for number in (8, 2, 2)]
    # 2.4, 2.425 and 2.445 on average over the first two.
    truth = [{A: 2.0, B: 2.0, C: 2.0}, {A: 4.0, B: 4.125, C: 4.225}, {A: 2.4, B: 2.4, C: 2.4}]
    _, measured = _finals({A: 2.0, B: 2.0, C: 2.0}, truth, floor=[1.0, 3.0, 1.4], windows=windows)
    assert measured == [A, B, C, A, B, C, A, B]


def test_costs_below_zero_by_rounding_do_no_harm() -> None:
    assert _finals({A: -1e-9, B: -1e-9}, [{A: 1e-9, B: -1e-9}])[0][0].removed == B


def test_what_was_measured_before_is_taken_over() -> None:
    known = {A: 1.0, B: 1.0, C: 1.0}
    truth = [{A: 1.0, B: 1.01, C: 2.0}, {A: 1.3, B: 1.0}]
    past: list[Round] = []
    whole, _ = _finals(known, truth, past=past)
    assert [len(found.costs) for found in past] == [3, 2]
    for number, stopped in ((0, A), (0, C), (1, B)):
        kept = [Round.from_json_dict(found.to_json_dict()) for found in past[: number + 1]]
        kept[number].floor = None
        del kept[number].costs[stopped]
        # The allowance is another now; what was begun is ended.
        affordable = 9 * (number == 0)
        found, measured = _finals(known, truth[number:], windows=[WINDOWS] * 2, past=kept, affordable=affordable)
        assert found == whole and measured[0] == stopped and len(measured) == 1 + 2 * (number == 0)
        assert _finals(known, [], windows=[WINDOWS] * 2, past=kept, affordable=0) == (whole, [])


def test_a_kept_round_knows_which_set_costs_what() -> None:
    """Sets are measured in another order than they are in."""
    found = Round([A, B], {B: 1.0, A: 2.0}, 0.5)
    assert Round.from_json_dict(json.loads(json.dumps(found.to_json_dict()))) == found


def test_later_finals_measure_what_is_new_beside_what_won() -> None:
    past: list[Round] = []
    first, _ = _finals({A: 1.0, B: 1.0}, [{A: 1.0, B: 1.01}, {A: 1.3, B: 1.0}], past=past)
    assert [final.removed for final in first] == [B, A]
    truth = [{C: 1.0}, {C: 0.9}]
    found, measured = _finals({B: 1.0, A: 1.0, C: 1.0}, truth, earlier=[past])
    assert measured == [C, C]
    assert found == [Final(C, 0.95, 32), Final(B, 1.005, 32), Final(A, 1.15, 32)]


def test_what_later_rounds_cannot_pay_for_unseats_nothing() -> None:
    past: list[Round] = []
    first, _ = _finals({A: 1.0, B: 1.0}, [{A: 1.0, B: 1.01}, {A: 1.3, B: 1.0}], past=past)
    paid = iter([1, 0])
    found, measured = _finals(
        {A: 1.0, B: 1.0, C: 1.0}, [{C: 1.02}], earlier=[past], affordable=paid, windows=[WINDOWS] * 2
    )
    assert measured == [C] and found == first, "on the first part alone A would be ahead"


def test_where_nothing_new_can_be_paid_for_there_are_no_later_finals() -> None:
    past: list[Round] = []
    _finals({A: 1.0, B: 1.0}, [{A: 1.0, B: 1.01}], past=past)
    later: list[Round] = []
    assert _finals({A: 1.0, B: 1.0, C: 1.0}, [{}], earlier=[past], affordable=0, past=later) == ([], [])
    assert later == []

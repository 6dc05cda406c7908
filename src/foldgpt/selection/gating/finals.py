"""Finals: sets that a search cannot tell apart are judged on text that it has not seen.

A search measures hundreds of sets at the same few thousand positions and takes the least cost. Among sets that are
level, the least is the one that these positions flatter most, so that what decides between them has to be other text.
(Of compensated sets it is not the text alone, and something else decides: `folded_refinement`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from foldgpt.progress import bar
from foldgpt.selection.units import Removed


@dataclass(frozen=True)
class Final:
    """A set that reached the finals, or was folded.

    Attributes:
        removed: the set.
        cost: its mean cost on further text.
        num_tokens: of that text.
    """

    removed: Removed
    cost: float
    num_tokens: int


class Measure(Protocol):
    """What sets cost on some windows.

    Attributes:
        seconds: time spent so far.
    """

    seconds: float

    @property
    def forward_tokens(self) -> float:
        """Work so far, as tokens that pass all blocks."""

    def cost(self, removed: Removed) -> float:
        """The cost of a set."""

    def source_cost(self) -> float:
        """What removing nothing costs."""


@dataclass
class Round:
    """What is measured on one part of the text.

    Attributes:
        sets: that are in it, the best first.
        costs: of those that have been measured.
        floor: what removing nothing costs; None until it has been measured.
    """

    sets: list[Removed]
    costs: dict[Removed, float] = field(default_factory=dict)
    floor: float | None = None

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "sets": [sorted(removed) for removed in self.sets],
            "measured": [sorted(removed) for removed in self.costs],
            "costs": list(self.costs.values()),
            "floor": self.floor,
        }

    @classmethod
    def from_json_dict(cls, value: Mapping[str, Any]) -> Round:
        """Read what `to_json_dict` wrote."""
        measured = map(frozenset, value["measured"])
        costs = dict(zip(measured, value["costs"], strict=True))
        return cls([frozenset(removed) for removed in value["sets"]], costs, value["floor"])


def finals(
    sets: Sequence[Removed],
    rounds: Iterable[Tensor],
    measure: Callable[[Tensor], Measure],
    *,
    level: float,
    past: list[Round],
    earlier: Sequence[Sequence[Round]] = (),
    affordable: Callable[[Sequence[Removed], Tensor], int],
    after_each: Callable[[Measure], None],
) -> list[Final]:
    """Measure what is level on further text, part by part, until one is ahead or no more can be paid for.

    Args:
        sets: that are level by the search, the best first.
        rounds: further windows, int64 [W, T] each.
        measure: the measure on some windows.
        level: sets are level whose damage is at most this share more than the best one's.
        past: what an earlier run of the same search measured; what is measured now is added.
        earlier: finals that came before these, of the same search; what they measured is taken over.
        affordable: how many of these sets, from the first on, may be measured on these windows.
        after_each: called with the measure whenever it has measured something.

    Returns:
        The sets that were measured in every round, best first; none if there is no text or no allowance for a round of
        two, or for any set that has not been measured before.
    """
    left = list(sets)
    totals = dict.fromkeys(left, 0.0)
    floors, num_tokens = 0.0, 0
    for number, ids_WT in enumerate(rounds):
        if number == len(past):
            found = _taken_over(left, [stage[number] for stage in earlier if number < len(stage)])
            unmeasured = [removed for removed in left if removed not in found.costs]
            paid = unmeasured[: affordable(unmeasured, ids_WT)] if unmeasured else []
            found.sets = [removed for removed in left if removed in found.costs or removed in paid]
            # Later rounds go on without what cannot be paid for: on less text it does not beat what is known on more.
            if len(found.sets) < 2 or (unmeasured and not paid and number == 0):
                break
            past.append(found)
        costs, floor = _completed(past[number], ids_WT, measure, after_each)
        totals = {removed: totals[removed] + ids_WT.numel() * cost for removed, cost in costs.items()}
        floors += ids_WT.numel() * floor
        num_tokens += ids_WT.numel()
        left = level_with_best(totals, floors, level)
    if not num_tokens:
        return []
    return [Final(removed, totals[removed] / num_tokens, num_tokens) for removed in _best_first(totals)]


def _completed(
    found: Round, ids_WT: Tensor, measure: Callable[[Tensor], Measure], after_each: Callable[[Measure], None]
) -> tuple[dict[Removed, float], float]:
    """What the sets of a round cost, and what removing nothing does; measured as far as it is not known."""
    if len(found.costs) < len(found.sets) or found.floor is None:
        cost = measure(ids_WT)  # let go on return, with its states, before the next ones are recorded
        found.floor = cost.source_cost()
        with bar("the best ones on further text", len(found.sets)) as progress:
            progress.advance(len(found.costs))
            for removed in sorted(set(found.sets) - found.costs.keys(), key=sorted):  # what begins alike shares states
                found.costs[removed] = cost.cost(removed)
                progress.advance()
                after_each(cost)
    return found.costs, found.floor


def _taken_over(sets: Sequence[Removed], rounds: Sequence[Round]) -> Round:
    """A round of some sets with what earlier ones on the same part of the text have measured of them."""
    costs = {removed: cost for found in rounds for removed, cost in found.costs.items() if removed in sets}
    return Round(list(sets), costs, next((found.floor for found in rounds), None))


def level_with_best(costs: Mapping[Removed, float], floor: float, level: float) -> list[Removed]:
    """The best set, and those that are level with it, best first.

    Args:
        costs: set → cost.
        floor: what removing nothing costs; see `RemovalCost.source_cost`.
        level: sets are level whose damage is at most this share more than the best one's.
    """
    best = _best_first(costs)
    highest = highest_level_cost(costs[best[0]], floor, level)
    return [removed for removed in best if costs[removed] <= highest]


def highest_level_cost(least: float, floor: float, level: float) -> float:
    """The cost up to which sets are level with the best one; see `level_with_best`."""
    return least + level * abs(least - floor)


def _best_first(costs: Mapping[Removed, float]) -> list[Removed]:
    return sorted(costs, key=lambda removed: (costs[removed], sorted(removed)))

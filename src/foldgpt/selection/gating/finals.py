"""Finals: sets that a search cannot tell apart are judged on text that it has not seen.

A search measures hundreds of sets at the same few thousand positions and takes the least cost. Among sets that are
level, the least is the one that these positions flatter most, so that what decides between them has to be other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from foldgpt.progress import bar
from foldgpt.selection.cost import RemovalCost
from foldgpt.selection.units import Removed

#: Sets are level whose damage is at most this much more than the best one's. On 2,048 positions the mean KL is known to
#: about 3 %; differences between sets, which are measured at the same ones, to less.
_LEVEL = 0.03
#: The best of them; each is measured once a round.
_MOST = 4


@dataclass(frozen=True)
class Final:
    """A set that reached the finals.

    Attributes:
        removed: the set.
        cost: its mean cost on further text.
        num_tokens: of that text.
    """

    removed: Removed
    cost: float
    num_tokens: int


def finals(
    known: Mapping[Removed, float],
    floor: float,
    rounds: Iterable[Tensor],
    measure: Callable[[Tensor], RemovalCost],
    *,
    affordable: Callable[[Sequence[Removed], Tensor], int],
    after_round: Callable[[RemovalCost], None],
) -> list[Final]:
    """Measure what is level on further text, part by part, until one is ahead or no more can be paid for.

    Args:
        known: set → cost, as the search measured them.
        floor: what removing nothing costs there; see `RemovalCost.source_cost`.
        rounds: further windows, int64 [W, T] each.
        measure: the measure on some windows.
        affordable: how many of these sets, from the first on, may be measured on these windows.
        after_round: gets the measure of each round, with what it has spent.

    Returns:
        The sets that were measured in every round, best first; none if one was ahead from the start, or if there is no
        text or no allowance for a round of two.
    """
    level = _level(known, floor)
    totals = dict.fromkeys(level, 0.0)
    floors, num_tokens = 0.0, 0
    for ids_WT in rounds:
        level = level[: affordable(level, ids_WT)]
        if len(level) < 2:
            break
        cost = measure(ids_WT)
        with bar("the best ones on further text", len(level)) as progress:
            for removed in sorted(level, key=sorted):  # what begins alike shares states
                totals[removed] += ids_WT.numel() * cost.cost(removed)
                progress.advance()
        floors += ids_WT.numel() * cost.source_cost()
        num_tokens += ids_WT.numel()
        after_round(cost)
        del cost  # with its states, before the next ones are recorded
        totals = {removed: totals[removed] for removed in level}
        level = _level(totals, floors)
    if not num_tokens:
        return []
    return [Final(removed, totals[removed] / num_tokens, num_tokens) for removed in _best_first(totals)]


def _level(costs: Mapping[Removed, float], floor: float) -> list[Removed]:
    """The best set, and those that are level with it, best first."""
    best = _best_first(costs)[:_MOST]
    least = costs[best[0]]
    return [removed for removed in best if costs[removed] - least <= _LEVEL * abs(least - floor)]


def _best_first(costs: Mapping[Removed, float]) -> list[Removed]:
    return sorted(costs, key=lambda removed: (costs[removed], sorted(removed)))

"""Finals: sets that a search cannot tell apart are judged on text that it has not seen.

A search measures hundreds of sets at the same few thousand positions and takes the least cost. Among sets that are
level, the least is the one that these positions flatter most, so that what decides between them has to be other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from foldgpt.progress import bar
from foldgpt.selection.cost import RemovalCost
from foldgpt.selection.units import Removed

#: Sets are level that cost at most this much more than the best one. On 2,048 positions the mean KL is known to about
#: 3 %; differences between sets, which are measured at the same ones, to less.
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
    rounds: Iterable[Tensor],
    measure: Callable[[Tensor], RemovalCost],
    *,
    may_run: Callable[[int, Tensor], bool],
    after_round: Callable[[RemovalCost], None],
) -> list[Final]:
    """Measure what is level on further text, part by part, until one is ahead or no more may be run.

    Args:
        known: set → cost, as the search measured them.
        rounds: further windows, int64 [W, T] each.
        measure: the measure on some windows.
        may_run: whether so many sets may be measured on these windows.
        after_round: gets the measure of each round, with what it has spent.

    Returns:
        The sets that were measured in every round, best first; none if one was ahead from the start, or if there is no
        text or no allowance for a round.
    """
    costs = {removed: [known[removed]] for removed in known}
    level = _level(costs)
    found: dict[Removed, list[float]] = {removed: [] for removed in level}
    num_tokens = 0
    for ids_WT in rounds:
        if len(level) < 2 or not may_run(len(level), ids_WT):
            break
        cost = measure(ids_WT)
        with bar("the best ones on further text", len(level)) as progress:
            for removed in sorted(level, key=sorted):  # what begins alike shares states
                found[removed].append(cost.cost(removed))
                progress.advance()
        after_round(cost)
        num_tokens += ids_WT.numel()
        level = _level({removed: found[removed] for removed in level})
    if not num_tokens:
        return []
    longest = max(map(len, found.values()))
    finalists = [Final(removed, fmean(costs), num_tokens) for removed, costs in found.items() if len(costs) == longest]
    return sorted(finalists, key=lambda final: (final.cost, sorted(final.removed)))


def _level(costs: Mapping[Removed, list[float]]) -> list[Removed]:
    """The best set, and those that are level with it."""
    mean = {removed: fmean(values) for removed, values in costs.items()}
    best = sorted(mean, key=lambda removed: (mean[removed], sorted(removed)))[:_MOST]
    return [removed for removed in best if mean[removed] <= (1 + _LEVEL) * mean[best[0]]]

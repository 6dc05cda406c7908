"""Refinement of compensated sets by what folding leaves of them, on text that the search has not seen.

Searches compensate by a weaker fit than folding does, and measure on a few windows. The order of sets behind the one is
not that behind the other, and what looks best to a search are sets like one another, which it misjudges alike. So what
decides is the dear measure: each set is given the fit that folding makes, and is measured on windows that are held out.
Which sets are given it is chosen one after the other: the one whose cost may well be the least, by what the search says
of it, by what was found to lie between the two measures for sets like it, and by how little is known of either. A set
that the search has not measured is first measured by it, which is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from foldgpt.artifacts import with_infinity, without_infinity
from foldgpt.progress import bar
from foldgpt.selection.cost import RemovalCost
from foldgpt.selection.folded_cost import FoldedCost, fit_tokens
from foldgpt.selection.further_windows import fitted_windows, held_windows, last_stage_windows
from foldgpt.selection.gating.discrepancy import Discrepancy
from foldgpt.selection.gating.finals import Final
from foldgpt.selection.gating.refine import Refinement
from foldgpt.selection.gating.surrogate import log_of
from foldgpt.selection.selection import Request
from foldgpt.selection.units import Removed

#: The share of the allowance that a search leaves for it.
_SHARE = 0.45
#: Standard deviations below what is expected that a cost may well be.
_DOUBT = 1.0
#: Before swaps are tried, so many of the sets that are known, or that gates were learned on, say what lies between the
#: two measures. The doubt makes them unlike one another.
_FIRST = 4
#: From so many of the best sets swaps are tried, and so many are followed: farther away the regression of a search
#: knows too little.
_STARTS, _SWAPS = 3, 3
#: After so many sets that the search measured another one is folded, if one that is known may be the least: what a
#: regression expects of many sets is too good for some of them, and passes are spent on finding that out.
_BETWEEN = 2


@dataclass
class FoldedSets:
    """What folding leaves of some sets.

    Attributes:
        costs: set → cost, in the order in which they were measured; infinite where predictions are not finite.
        num_known: how many sets the search had measured when the last one was folded.
    """

    costs: dict[Removed, float] = field(default_factory=dict)
    num_known: int = 0

    def add(self, removed: Removed, cost: float, num_known: int) -> None:
        """One more set; see there."""
        self.costs[removed] = cost
        self.num_known = num_known

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "sets": [sorted(removed) for removed in self.costs],
            "costs": without_infinity(list(self.costs.values())),
            "num_known": self.num_known,
        }

    @classmethod
    def from_json_dict(cls, value: Mapping[str, Any]) -> FoldedSets:
        """Read what `to_json_dict` wrote."""
        sets = map(frozenset, value["sets"])
        return cls(dict(zip(sets, with_infinity(value["costs"]), strict=True)), value["num_known"])


class FoldedRefinement:
    """Measures promising sets of a compensated search as folding leaves them; one object for all of a search.

    Args:
        request: of the search.
        cost: its measure.

    Attributes:
        has_text: whether there is text enough; never for a search that does not compensate.
    """

    def __init__(self, request: Request, cost: RemovalCost) -> None:
        self._request = request
        self._cost = cost
        self.has_text = False
        further_WT, ids_WT = request.further_ids_WT, request.ids_WT
        if not request.compensate or further_WT is None or ids_WT is None:
            return
        searched, further = len(ids_WT), len(further_WT)
        self.has_text = last_stage_windows(searched, further, compensated=True) > 0
        self._fitted_WT = torch.cat([ids_WT, further_WT])[: fitted_windows(searched, further)]
        self._held_WT = further_WT[further - held_windows(searched, further) :]

    def reserve(self, allowance: float, sets: Collection[Removed]) -> float:
        """What a search should leave for it, in forward equivalents; nothing where that would not pay for two sets.

        Args:
            allowance: of the whole search.
            sets: some like those that it may measure.
        """
        if not self.has_text:
            return 0.0
        share = _SHARE * allowance
        return share if self._start + 2 * fmean(map(self._price, sets)) <= share else 0.0

    def search(
        self,
        refinement: Refinement,
        pool: Collection[Removed],
        left: Callable[[], float],
        folded: FoldedSets,
        keep: Callable[[], None],
    ) -> list[Final]:
        """Measure what may well be the least, until nothing may be less than the least that is known.

        Args:
            refinement: what the search has measured, and its regression; more is measured with it.
            pool: sets to look at beside those and their swaps.
            left: of the allowance, in forward equivalents.
            folded: what is measured is added; not empty if the search is resumed.
            keep: called whenever something was measured and counted.

        Returns:
            The sets that were measured, best first, without those whose predictions are not finite.
        """
        if not self.has_text:
            return []
        measure: FoldedCost | None = None
        counted = (0.0, 0.0)
        one = fmean(map(self._price, refinement.known))
        number = len(folded.costs) + max(1, int((left() - (0.0 if folded.costs else self._start)) / one))
        with bar("sets as folding leaves them", number) as progress:
            progress.advance(len(folded.costs))
            while (found := self._most_promising(refinement, pool, folded)) is not None:
                price = self._price(found) + (0.0 if folded.costs else self._start + self._price(found))
                if found not in refinement.known:
                    price += self._cost.predicted_equivalents(1, refinement.sample)
                if price > left():
                    break
                if found not in refinement.known:
                    refinement.measure(found)
                    continue
                if measure is None:
                    measure = FoldedCost(self._request, self._fitted_WT, self._held_WT)
                    # What a resumed search records again is no part of the allowance.
                    counted = (0.0, measure.forward_tokens if folded.costs else 0.0)
                folded.add(found, measure.cost(found), len(refinement.known))
                now = (measure.seconds, measure.forward_tokens)
                self._cost.add_spent(now[0] - counted[0], (now[1] - counted[1]) / self._num_tokens)
                counted = now
                keep()
                progress.advance()
        best = sorted((cost, sorted(removed)) for removed, cost in folded.costs.items() if math.isfinite(cost))
        return [Final(frozenset(removed), cost, self._held_WT.numel()) for cost, removed in best]

    def _most_promising(self, refinement: Refinement, pool: Collection[Removed], folded: FoldedSets) -> Removed | None:
        """The set to measure next, by the search if it has not; None if none may be the least."""
        regressions = _Regressions(refinement, self._discrepancy(refinement, folded.costs))
        sets = {*pool, *refinement.known}
        found = None
        if len(folded.costs) < _FIRST:
            found = _least(sets, refinement, folded, regressions)
        if found is None:
            best = sorted(folded.costs, key=lambda removed: (folded.costs[removed], sorted(removed)))[:_STARTS]
            for start in best:
                sets |= refinement.swaps(start) | refinement.double_swaps(start)
                sets.add(_descended(start, refinement, regressions))
            found = _least(sets, refinement, folded, regressions)
        return found

    def _discrepancy(self, refinement: Refinement, folded: Mapping[Removed, float]) -> Discrepancy:
        units = self._cost.units
        best = min(refinement.known.values())
        # By the language-modelling loss only what is above the source's own is damage.
        scale = abs(best - self._cost.source_cost(refinement.sample)) / max(best, 1e-12)
        size = fmean(map(len, refinement.known))
        discrepancy = Discrepancy(len(units), units.per_block, size, min(1.0, scale))
        finite = {removed: cost for removed, cost in folded.items() if math.isfinite(cost)}
        if finite:
            known = refinement.known
            discrepancy.fit({removed: log_of(cost) - log_of(known[removed]) for removed, cost in finite.items()})
        return discrepancy

    @property
    def _start(self) -> float:
        """What the recordings take, in forward equivalents."""
        return self._equivalents([])

    def _price(self, removed: Removed) -> float:
        """What one more set takes, in forward equivalents, at most."""
        return self._equivalents([removed]) - self._start

    def _equivalents(self, sets: list[Removed]) -> float:
        fits = fit_tokens(sets, self._cost.units, self._fitted_WT.numel()) / self._num_tokens
        return self._cost.further_equivalents(sets, self._held_WT) + fits

    @property
    def _num_tokens(self) -> int:
        return self._cost.replay.ids_WT.numel()


@dataclass(frozen=True)
class _Regressions:
    """What is expected of the dear measure: what the search says, or is expected to say, and what lies between them."""

    refinement: Refinement
    discrepancy: Discrepancy

    def bounds(self, sets: Iterable[Removed]) -> dict[Removed, float]:
        """The least log cost that each set may well have, in an order that does not depend on the given one."""
        known = sorted(sets, key=sorted)
        if not known:
            return {}
        (expected_S, uncertain_S), (difference_S, doubt_S) = self._by_search(known), self.discrepancy.predict(known)
        bounds_S = expected_S + difference_S - _DOUBT * (uncertain_S.square() + doubt_S.square()).sqrt()
        return dict(zip(known, bounds_S.tolist(), strict=True))

    def _by_search(self, sets: Sequence[Removed]) -> tuple[Tensor, Tensor]:
        """What the search says of each set, or is expected to say, and the standard deviation of that, fp64 [S]."""
        known = self.refinement.known
        expected_S, uncertain_S = self.refinement.predict(sets)
        measured_S = torch.tensor([removed in known for removed in sets])
        values_S = torch.tensor([log_of(known.get(removed, 1.0)) for removed in sets], dtype=torch.float64)
        return torch.where(measured_S, values_S, expected_S), uncertain_S.masked_fill(measured_S, 0.0)


def _least(
    sets: Collection[Removed], refinement: Refinement, folded: FoldedSets, regressions: _Regressions
) -> Removed | None:
    """The set that may well cost least; None if none may cost less than the least of two that were folded."""
    bounds = regressions.bounds(set(sets) - folded.costs.keys())
    # From one set alone it is not known whether all cost more, or less, as folding leaves them.
    least = min(map(log_of, folded.costs.values())) if len(folded.costs) > 1 else math.inf
    promising = [removed for removed in bounds if bounds[removed] < least]
    measured = [removed for removed in promising if removed in refinement.known]
    if measured and len(refinement.known) - folded.num_known >= _BETWEEN:
        promising = measured
    return min(promising, key=lambda removed: bounds[removed], default=None)


def _descended(start: Removed, refinement: Refinement, regressions: _Regressions) -> Removed:
    """Where swaps lead of which each may well be better than what was before it."""
    best, least = start, regressions.bounds([start])[start]
    for _ in range(_SWAPS):
        bounds = regressions.bounds(refinement.swaps(best))
        swapped = min(bounds, key=lambda removed: bounds[removed], default=best)
        if bounds.get(swapped, math.inf) >= least:
            break
        best, least = swapped, bounds[swapped]
    return best

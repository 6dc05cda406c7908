"""Refinement: measure the sets that look best, swap by swap, until what was allowed is spent.

The regression ranks what has not been measured: the sets that were drawn while the gates were learned, and all that
differ from the best one by a swap of a removed for a kept unit, or by two swaps of units whose gates were in doubt.
The likeliest runs of neighbouring blocks are measured first.
It ranks them by the least cost that they may well have: what it expects, less its own uncertainty (the confidence bound
of Srinivas et al. 2010, arXiv 0912.3995). The best few are measured, the regression learns from them, and so on, until
no single swap of the best set may well be better than it. What the regression gets wrong costs a measurement, not the
result: the answer is the best *measured* set. Where finals prefer another set, its swaps are looked at in the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from foldgpt.errors import UsageError
from foldgpt.selection.cost import RemovalCost, Sample
from foldgpt.selection.gating.surrogate import Measurement, Surrogate, log_of
from foldgpt.selection.units import Removed, Units

#: Sets measured between two fits of the regression.
_ROUND = 4
#: Rounds without a better set after which the search ends, if no swap of the best set may well be better.
_PATIENCE = 6
#: Runs measured at the beginning. From scattered blocks one is several swaps away, and the regression, which has seen
#: scattered blocks, makes more of what a run costs than it is.
_RUNS = 6
#: Standard deviations below what is expected that a cost may well be.
_DOUBT = 1.0
#: Units in doubt that two swaps at once are tried for, of the removed and of the kept ones.
_DOUBTFUL = 6


class Refinement:
    """Measures promising sets; one object for all of a search.

    Args:
        cost: the measure.
        sample: where to measure.
        keep_probabilities_U: from the gates, fp64 [U].
        surrogate: ranks what was not measured; fitted to all measurements after each round.
        measurements: of the gates' training, with other samples.
        known: set → cost on `sample`, of a search that is resumed.
        measured: set → cost on `sample`, of sets that need not be measured again.
        waited: rounds without a better set, of a search that is resumed.
        after_round: called after each round.

    Attributes:
        known: set → cost on `sample`, in the order in which they were measured.
        waited: rounds since the last better set.
        sample: where sets are measured.
    """

    def __init__(
        self,
        cost: RemovalCost,
        sample: Sample,
        *,
        keep_probabilities_U: Tensor,
        surrogate: Surrogate,
        measurements: Sequence[Measurement],
        known: Mapping[Removed, float],
        measured: Mapping[Removed, float],
        waited: int,
        after_round: Callable[[], None],
    ) -> None:
        self.known = dict(known)
        self.waited = waited
        self._measured = measured
        self._cost = cost
        self.sample = sample
        self._keep_probabilities_U = keep_probabilities_U
        self._surrogate = surrogate
        self._measurements = [*measurements, *_as_measurements(self.known)]
        self._after_round = after_round
        if self._measurements:
            surrogate.fit(self._measurements)

    def search(
        self,
        start: Iterable[Removed],
        own: Removed,
        is_spent: Callable[[], bool],
        *,
        runs: Collection[Removed] = (),
    ) -> None:
        """Measure what looks best, until no swap of the best set may well be better.

        Args:
            start: sets to begin with; the most promising come first.
            own: what the gates alone would remove; measured in any case.
            is_spent: whether no more may be measured.
            runs: sets of neighbouring blocks, the likeliest of which are measured at the beginning too.
        """
        pool = {*start, *runs}
        while True:
            near: set[Removed] = set()
            if self.known:
                best = min(self.known, key=lambda removed: self.known[removed])
                near = self.swaps(best)
                pool |= near | self.double_swaps(best)
            # Before anything is known, what is most likely good comes first.
            bounds = self._bounds(pool, doubt=_DOUBT if self.known else 0.0)
            if not bounds:
                return
            if self.waited >= _PATIENCE:
                least = log_of(self.known[best])
                if not any(bound < least for removed, bound in bounds.items() if removed in near):
                    return
            chosen = sorted(bounds, key=lambda removed: bounds[removed])[:_ROUND]
            first: list[Removed] = []
            if not self.known:
                # The first ones may be all that is paid for.
                first = list(dict.fromkeys([chosen[0], own]))
                likely = sorted(bounds.keys() & set(runs), key=lambda run: (bounds[run], sorted(run)))[:_RUNS]
                chosen = sorted({*chosen, *likely}, key=lambda removed: (bounds[removed], sorted(removed)))
            if not self._measure(chosen, is_spent, first):
                return

    def around(
        self,
        center: Removed,
        limit: Callable[[Mapping[Removed, float]], float],
        is_spent: Callable[[], bool],
    ) -> None:
        """Measure the swaps of a set that may well be good enough, until none is left.

        Args:
            center: the set.
            limit: the cost up to which sets are good enough, by all that is known.
            is_spent: whether no more may be measured.
        """
        near = self.swaps(center)
        while True:
            bounds = self._bounds(near, doubt=_DOUBT)
            best = sorted(bounds, key=lambda removed: bounds[removed])[:_ROUND]
            highest = log_of(limit(self.known))
            chosen = [removed for removed in best if bounds[removed] < highest]
            if not chosen or not self._measure(chosen, is_spent):
                return

    def predict(self, sets: Sequence[Removed]) -> tuple[Tensor, Tensor]:
        """The log cost that is expected of each set, and its standard deviation, both fp64 [S].

        Args:
            sets: any sets; what was measured of them is not taken into account as such.
        """
        expected_S, uncertain_S = (f(sets, _REFINEMENT) for f in (self._surrogate.predict, self._surrogate.uncertainty))
        return expected_S, uncertain_S

    def swaps(self, removed: Removed) -> set[Removed]:
        """Sets that differ from one by a swap; see the function of that name."""
        return swaps(removed, self._cost.units, self._keep_probabilities_U)

    def double_swaps(self, removed: Removed) -> set[Removed]:
        """Sets that differ from one by two swaps of units in doubt; see the function of that name."""
        return double_swaps(removed, self._cost.units, self._keep_probabilities_U)

    def measure(self, removed: Removed) -> None:
        """Measure one set, whatever it takes."""
        self._measure([removed], lambda: False)

    def _bounds(self, pool: Iterable[Removed], doubt: float) -> dict[Removed, float]:
        """The least log cost that each set which was not measured may well have."""
        open_sets = sorted(set(pool) - self.known.keys(), key=sorted)
        if not open_sets:
            return {}
        expected_S, uncertain_S = self.predict(open_sets)
        return dict(zip(open_sets, (expected_S - doubt * uncertain_S).tolist(), strict=True))

    def _measure(self, chosen: Sequence[Removed], is_spent: Callable[[], bool], first: Sequence[Removed] = ()) -> bool:
        """One round; the first ones are measured in any case. False where no more may be measured.

        Args:
            chosen: the sets, the most promising first.
            is_spent: whether no more may be measured.
            first: those that are measured in any case.
        """
        cut_short = False
        before = min(self.known.values(), default=math.inf)
        others = [removed for removed in chosen if removed not in first]
        for removed in [*first, *_in_rounds(others)]:
            value = self._measured.get(removed)
            cut_short = value is None and removed not in first and is_spent()
            if cut_short:
                break
            self.known[removed] = self._cost.cost(removed, self.sample) if value is None else value
            self._measurements += _as_measurements({removed: self.known[removed]})
        self.waited = 0 if min(self.known.values(), default=math.inf) < before else self.waited + 1
        self._surrogate.fit(self._measurements)
        self._after_round()
        return not cut_short


def _in_rounds(chosen: Sequence[Removed]) -> Iterator[Removed]:
    """A few at a time, the most promising ones first, and among them those that begin alike: they share states."""
    for start in range(0, len(chosen), _ROUND):
        yield from sorted(chosen[start : start + _ROUND], key=sorted)


def _as_measurements(known: dict[Removed, float]) -> list[Measurement]:
    """Costs that refinement measured, as the regression reads them."""
    return [Measurement(removed, _REFINEMENT, log_of(cost), _NOISE) for removed, cost in known.items()]


def swaps(removed: Removed, units: Units, keep_probabilities_U: Tensor) -> set[Removed]:
    """Sets that meet the budget and differ by one swap of a removed for a kept unit.

    Where units differ in size, a swap that falls short goes on with the units that the gates keep least, and what is
    then one too many comes back.
    """
    kept = [unit for unit in range(len(units)) if unit not in removed]
    pairs = (((out,), (into,)) for out in removed for into in kept)
    return _all_swapped(removed, pairs, units, keep_probabilities_U)


def double_swaps(removed: Removed, units: Units, keep_probabilities_U: Tensor) -> set[Removed]:
    """Sets that meet the budget and differ by two swaps of units whose gates are in doubt."""
    doubt = (keep_probabilities_U - 0.5).abs().tolist()
    out = sorted(removed, key=lambda unit: doubt[unit])[:_DOUBTFUL]
    into = sorted((unit for unit in range(len(units)) if unit not in removed), key=lambda unit: doubt[unit])[:_DOUBTFUL]
    pairs = itertools.product(itertools.combinations(out, 2), itertools.combinations(into, 2))
    return _all_swapped(removed, pairs, units, keep_probabilities_U)


def _all_swapped(
    removed: Removed,
    pairs: Iterable[tuple[tuple[int, ...], tuple[int, ...]]],
    units: Units,
    keep_probabilities_U: Tensor,
) -> set[Removed]:
    least_kept = sorted(range(len(units)), key=keep_probabilities_U.tolist().__getitem__)
    found = (_swapped(removed, out, into, units, least_kept) for out, into in pairs)
    return {swapped for swapped in found if swapped is not None and swapped != removed}


def _swapped(
    removed: Removed, out: tuple[int, ...], into: tuple[int, ...], units: Units, least_kept: Sequence[int]
) -> Removed | None:
    """The set after a swap, completed or trimmed to the budget where units differ in size; None if not allowed."""
    swapped = (removed - set(out)) | set(into)
    if not units.is_allowed(swapped):
        return None
    if units.per_block == 1:
        return swapped
    # A unit smaller than what it replaces leaves the budget unmet, a larger one overshoots it.
    if units.missing(swapped) > 0:
        try:
            swapped = units.fill([unit for unit in least_kept if unit not in out], swapped)
        except UsageError:
            return None
    spare = sorted(swapped, key=lambda unit: units.sizes[unit])
    for unit in spare:
        if units.missing(swapped - {unit}) <= 0 and units.is_allowed(swapped - {unit}):
            swapped -= {unit}
    return swapped


#: The sample number of refinement's measurements; the gates' own are 0 and up.
_REFINEMENT = -1
#: Standard deviation of log costs there: all candidates are measured at the same positions.
_NOISE = 0.01

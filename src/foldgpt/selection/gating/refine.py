"""Refinement: measure the sets that look best, swap by swap, until what was allowed is spent.

The regression ranks what has not been measured: the sets that were drawn while the gates were learned, and all that
differ from the best one by a swap of a removed for a kept unit, or by two swaps of units whose gates were in doubt.
The best few are measured, the regression learns from them, and so on. What it gets wrong costs a measurement, not
the result: the answer is the best *measured* set.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

from torch import Tensor

from foldgpt.selection.cost import RemovalCost, Sample
from foldgpt.selection.gating.surrogate import Measurement, Surrogate
from foldgpt.selection.units import Removed, Units

#: Sets measured between two fits of the regression.
_ROUND = 4
#: Rounds without a better set after which the search ends.
_PATIENCE = 6
#: Units in doubt that two swaps at once are tried for, of the removed and of the kept ones.
_DOUBTFUL = 6


def refine(
    cost: RemovalCost,
    sample: Sample,
    start: Iterable[Removed],
    *,
    keep_probabilities_U: Tensor,
    surrogate: Surrogate,
    measurements: list[Measurement],
    known: dict[Removed, float],
    is_spent: Callable[[], bool],
    after_round: Callable[[], None],
) -> None:
    """Measure promising sets; the results are added to `known` and `measurements`.

    Args:
        cost: the measure.
        sample: where to measure.
        start: sets to begin with; the most promising come first.
        keep_probabilities_U: from the gates, fp64 [U].
        surrogate: ranks what was not measured; fitted to `measurements` after each round.
        measurements: of the gates' training, with other samples.
        known: set → cost on `sample`; empty unless the search is resumed.
        is_spent: whether no more may be measured.
        after_round: called after each round.
    """
    pool = set(start)
    waited = 0
    while waited < _PATIENCE:
        if known:
            best = min(known, key=lambda removed: known[removed])
            pool |= neighbours(best, cost.units, keep_probabilities_U)
        open_sets = sorted(pool - known.keys(), key=sorted)
        if not open_sets:
            return
        predicted = surrogate.predict(open_sets).tolist()
        ranked = sorted(range(len(open_sets)), key=lambda index: predicted[index])
        before = min(known.values(), default=math.inf)
        # Sets that begin alike, one after another: they share states.
        for removed in sorted((open_sets[index] for index in ranked[:_ROUND]), key=sorted):
            if known and is_spent():
                return
            known[removed] = cost.cost(removed, sample)
            measurements += measured_in_refinement({removed: known[removed]})
        surrogate.fit(measurements)
        waited = 0 if min(known.values()) < before else waited + 1
        after_round()


def measured_in_refinement(known: dict[Removed, float]) -> list[Measurement]:
    """Costs that refinement measured, as the regression reads them."""
    return [Measurement(removed, _REFINEMENT, math.log(max(c, 1e-12)), _NOISE) for removed, c in known.items()]


def neighbours(removed: Removed, units: Units, keep_probabilities_U: Tensor) -> set[Removed]:
    """Sets that meet the budget and differ by one swap, or by two of units whose gates are in doubt."""
    doubt = (keep_probabilities_U - 0.5).abs().tolist()
    out = sorted(removed, key=lambda unit: doubt[unit])
    into = sorted((unit for unit in range(len(units)) if unit not in removed), key=lambda unit: doubt[unit])
    swaps: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((a,), (b,)) for a in out for b in into]
    for pair in itertools.combinations(out[:_DOUBTFUL], 2):
        swaps += [(pair, other) for other in itertools.combinations(into[:_DOUBTFUL], 2)]
    found = (_swapped(removed, *swap, units) for swap in swaps)
    return {swapped for swapped in found if swapped is not None and swapped != removed}


def _swapped(removed: Removed, out: tuple[int, ...], into: tuple[int, ...], units: Units) -> Removed | None:
    """The set after a swap, completed or trimmed to the budget where units differ in size; None if not allowed."""
    swapped = (removed - set(out)) | set(into)
    if not units.is_allowed(swapped):
        return None
    if units.per_block == 1:
        return swapped
    # A unit smaller than what it replaces leaves the budget unmet, a larger one overshoots it.
    if units.missing(swapped) > 0:
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

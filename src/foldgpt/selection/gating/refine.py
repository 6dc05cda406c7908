"""Refinement: measure the sets that look best, swap by swap, until what was allowed is spent.

The regression ranks what has not been measured: the sets that were drawn while the gates were learned, and all that
differ from the best one by a swap of a removed for a kept unit, or by two swaps of units whose gates were in doubt.
It ranks them by the least cost that they may well have: what it expects, less its own uncertainty (the confidence bound
of Srinivas et al. 2010, arXiv 0912.3995). The best few are measured, the regression learns from them, and so on, until
no single swap of the best set may well be better than it. What the regression gets wrong costs a measurement, not the
result: the answer is the best *measured* set.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from foldgpt.errors import UsageError
from foldgpt.selection.cost import RemovalCost, Sample
from foldgpt.selection.gating.surrogate import Measurement, Surrogate
from foldgpt.selection.units import Removed, Units

#: Sets measured between two fits of the regression.
_ROUND = 4
#: Rounds without a better set after which the search ends, if no swap of the best set may well be better.
_PATIENCE = 6
#: Standard deviations below what is expected that a cost may well be.
_DOUBT = 1.0
#: Units in doubt that two swaps at once are tried for, of the removed and of the kept ones.
_DOUBTFUL = 6


def refine(
    cost: RemovalCost,
    sample: Sample,
    start: Iterable[Removed],
    *,
    own: Removed | None = None,
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
        own: what the gates alone would remove; measured in any case.
        keep_probabilities_U: from the gates, fp64 [U].
        surrogate: ranks what was not measured; fitted to `measurements` after each round.
        measurements: of the gates' training, with other samples.
        known: set → cost on `sample`; empty unless the search is resumed.
        is_spent: whether no more may be measured.
        after_round: called after each round.
    """
    pool = set(start)
    waited = 0
    while True:
        near: set[Removed] = set()
        if known:
            best = min(known, key=lambda removed: known[removed])
            near = swaps(best, cost.units, keep_probabilities_U)
            pool |= near | double_swaps(best, cost.units, keep_probabilities_U)
        open_sets = sorted(pool - known.keys(), key=sorted)
        if not open_sets:
            return
        expected_S, uncertain_S = (f(open_sets, _REFINEMENT) for f in (surrogate.predict, surrogate.uncertainty))
        # Before anything is known, what is most likely good comes first.
        bounds = (expected_S - (_DOUBT if known else 0.0) * uncertain_S).tolist()
        if waited >= _PATIENCE:
            least = _log(known[best])
            if not any(bound < least for removed, bound in zip(open_sets, bounds, strict=True) if removed in near):
                return
        ranked = sorted(range(len(open_sets)), key=lambda index: bounds[index])
        before = min(known.values(), default=math.inf)
        chosen = [open_sets[index] for index in ranked[:_ROUND]]
        # The first ones may be all that is paid for. Others are sorted: what begins alike shares states.
        first = [] if known else list(dict.fromkeys([chosen[0], own or chosen[0]]))
        for removed in [*first, *sorted(set(chosen).difference(first), key=sorted)]:
            if removed not in first and is_spent():
                return
            known[removed] = cost.cost(removed, sample)
            measurements += measured_in_refinement({removed: known[removed]})
        surrogate.fit(measurements)
        waited = 0 if min(known.values()) < before else waited + 1
        after_round()


def measured_in_refinement(known: dict[Removed, float]) -> list[Measurement]:
    """Costs that refinement measured, as the regression reads them."""
    return [Measurement(removed, _REFINEMENT, _log(cost), _NOISE) for removed, cost in known.items()]


def _log(cost: float) -> float:
    return math.log(max(cost, 1e-12))


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

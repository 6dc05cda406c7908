"""Refinement: what the regression knows, which sets are a swap away, and which of them are measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foldgpt.errors import UsageError
from foldgpt.selection import Units
from foldgpt.selection.gating.gates import spans
from foldgpt.selection.gating.refine import Refinement, double_swaps, swaps
from foldgpt.selection.gating.surrogate import Measurement, Surrogate


def test_runs_of_whole_blocks_are_looked_at_in_searches_of_sublayers() -> None:
    assert spans(Units.blocks(5, 2)) == {frozenset({start, start + 1}) for start in range(4)}
    units = Units(4, 2, (2, 3) * 4, 10, ("attention",) * 4)
    assert spans(units) == {frozenset(range(2 * start, 2 * start + 4)) for start in range(3)}
    assert spans(Units(4, 2, (2, 3) * 4, 20, ("attention",) * 4)) == set(), "one block must stay"


def test_the_surrogate_learns_that_blocks_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (0.2 + torch.rand(12, generator=generator)).tolist()

    def truth(removed: tuple[int, ...]) -> float:
        neighbours_gone = sum(1 for block in removed if block + 1 in removed)
        return float(torch.tensor(sum(scores[block] for block in removed) * 0.7**neighbours_gone).log())

    sets = list(itertools.combinations(range(12), 4))
    chosen = [sets[index] for index in torch.randperm(len(sets), generator=generator).tolist()]
    known, unseen = chosen[:120], chosen[120:]
    surrogate = Surrogate(scores, per_block=1)
    actual = torch.tensor([truth(s) for s in unseen], dtype=torch.float64)
    before = surrogate.predict([frozenset(s) for s in unseen]) - actual
    surrogate.fit([Measurement(frozenset(s), k % 3, truth(s) + 0.1 * (k % 3), 0.01) for k, s in enumerate(known)])
    after = surrogate.predict([frozenset(s) for s in unseen]) - actual
    assert float(after.std()) < 0.4 * float(before.std())


def test_the_surrogate_is_sure_of_what_was_measured_and_of_what_is_like_it() -> None:
    surrogate = Surrogate([0.3] * 12, per_block=1)
    measured, like, unlike = frozenset({2, 3, 4}), frozenset({2, 3, 5}), frozenset({9, 10, 11})
    before = surrogate.uncertainty([measured, like, unlike], 0)
    surrogate.fit([Measurement(measured, 0, -1.0, 0.01)])
    after = surrogate.uncertainty([measured, like, unlike], 0)
    assert after.shape == (3,) and after.dtype == torch.float64
    assert float(after[0]) < 0.02 < float(after[1]) < float(after[2])
    assert float(after[1]) < 0.7 * float(before[1])
    # On another sample its offset is not known either.
    assert float(surrogate.uncertainty([measured], 1)[0]) > 0.1


@pytest.mark.parametrize("per_block", [1, 2])
def test_what_neighbours_are_worth_at_one_depth_is_expected_at_another(per_block: int) -> None:
    surrogate = Surrogate([0.3] * 24 * per_block, per_block=per_block)
    blocks = [(0, 1, 2), (1, 2, 3), (0, 2, 4), (1, 3, 5), (0, 1, 3), (1, 3, 4)]
    # Of each kind of unit alike; half as many cuts cost half.
    together = [frozenset(per_block * block for block in found) for found in blocks]
    cuts = [1, 1, 3, 3, 2, 2]
    surrogate.fit([Measurement(found, 0, math.log(n), 0.01) for found, n in zip(together, cuts, strict=True)])
    far = [frozenset(per_block * block for block in found) for found in ((19, 20, 21), (19, 20, 22), (18, 20, 22))]
    expected = surrogate.predict(far, 0).tolist()
    assert expected == sorted(expected) and expected[2] - expected[0] > 0.5


def test_the_surrogate_is_as_wrong_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (0.2 + torch.rand(12, generator=generator)).tolist()
    sets = [frozenset(removed) for removed in itertools.combinations(range(12), 4)]
    surrogate = Surrogate(scores, per_block=1)
    features = surrogate._features(sets)
    surrogate.fit([Measurement(sets[0], 0, 0.0, 0.01)])
    covariance = surrogate._kernel(features, features) + 1e-8 * torch.eye(len(sets), dtype=torch.float64)
    errors = []
    for _ in range(8):
        # Costs drawn from what the surrogate assumes: a function of sets, and an offset for each sample.
        drawn = torch.randn(len(sets) + 2, generator=generator, dtype=torch.float64)
        truth = torch.linalg.cholesky(covariance) @ drawn[2:] + surrogate._expected(features)
        offsets = 0.3 * drawn[:2]
        chosen = torch.randperm(len(sets), generator=generator).tolist()
        surrogate.fit([Measurement(sets[k], k % 2, float(truth[k] + offsets[k % 2]), 0.01) for k in chosen[:60]])
        unseen, actual = [sets[k] for k in chosen[60:]], truth[chosen[60:]]
        for sample, offset in enumerate(offsets):
            errors.append((surrogate.predict(unseen, sample) - actual - offset) / surrogate.uncertainty(unseen, sample))
    assert 0.8 < float(torch.cat(errors).square().mean().sqrt()) < 1.25


def test_swaps_keep_the_budget() -> None:
    units = Units.blocks(8, 3)
    removed = frozenset({2, 3, 4})
    even = torch.full((8,), 0.5, dtype=torch.float64)
    found = swaps(removed, units, even)
    assert len(found) == 15 and all(len(swapped) == 3 and len(swapped & removed) == 2 for swapped in found)
    twice = double_swaps(removed, units, even)
    assert len(twice) == 30 and all(len(swapped) == 3 and len(swapped & removed) == 1 for swapped in twice)


def test_swaps_trade_large_units_for_several_small_ones() -> None:
    """Attention is a third of an MLP here, as in SmolLM2; the gates keep attention least."""
    units = Units(6, 2, (1, 3) * 6, 9, ("attention",) * 6)
    removed = frozenset({3, 5, 7})  # three MLPs
    keep = torch.tensor([0.9, 0.8, 0.1, 0.8, 0.2, 0.8, 0.3, 0.8, 0.4, 0.8, 0.5, 0.8], dtype=torch.float64)
    found = swaps(removed, units, keep)
    assert frozenset({5, 7, 2, 4, 6}) in found, "an MLP for the three attentions that the gates keep least"
    back = swaps(frozenset({2, 4, 5, 6, 7}), units, keep)
    assert removed in back, "and back, which a swap of one attention for an MLP would overshoot"
    for swapped in found | back:
        assert units.missing(swapped) <= 0 and units.is_allowed(swapped)
        # Nothing in it that the budget does not need.
        assert all(units.missing(swapped - {unit}) > 0 or not units.is_allowed(swapped - {unit}) for unit in swapped)


def test_an_attention_that_had_to_stay_goes_with_the_rest_of_its_block() -> None:
    # Two of three blocks' worth: the attention that comes first in the order may go only with its MLP.
    units = Units(3, 2, (4, 1) * 3, 10, ("sliding", "full", "full"))
    removed = units.fill([0, 2, 4, 1, 3, 5])
    assert units.missing(removed) <= 0 and units.is_allowed(removed)
    with pytest.raises(UsageError, match="the first one with each kind of attention must keep that"):
        Units(3, 2, (4, 1) * 3, 15, ("sliding", "full", "full")).fill(range(6))


def _refinement(
    units: Units,
    cost: Callable[[frozenset[int], Any], float],
    scores: list[float],
    surrogate: Surrogate | None = None,
    known: dict[frozenset[int], float] | None = None,
    waited: int = 0,
    measured: dict[frozenset[int], float] | None = None,
    measurements: Sequence[Measurement] = (),
) -> Refinement:
    """A refinement to which a function stands for the model."""
    return Refinement(
        SimpleNamespace(units=units, cost=cost),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        keep_probabilities_U=torch.full((len(units),), 0.5, dtype=torch.float64),
        surrogate=surrogate or Surrogate(scores, per_block=1),
        measurements=measurements,
        known=known or {},
        measured=measured or {},
        waited=waited,
        after_round=lambda: None,
    )


def test_what_learning_measured_on_the_same_windows_is_not_measured_again() -> None:
    units, asked = Units.blocks(6, 2), []

    def cost(removed: frozenset[int], sample: object = None) -> float:
        asked.append(removed)
        return sum(0.1 + 0.01 * block for block in removed)

    own, drawn = frozenset({4, 5}), frozenset({0, 1})
    refinement = _refinement(units, cost, [0.1] * 6, measured={drawn: 0.21})
    refinement.search([drawn], own, lambda: len(asked) > 5)
    assert refinement.known[drawn] == 0.21 and refinement.known[own] > 0.21 and own in asked
    assert drawn not in asked and len(asked) == len(set(asked)) == len(refinement.known) - 1


def test_a_resumed_refinement_waits_for_a_better_set_no_longer_than_one_that_was_not_stopped() -> None:
    units = Units.blocks(12, 3)

    def cost(removed: frozenset[int], sample: object = None) -> float:
        return sum(0.1 + 0.01 * block for block in removed)

    def searched(known: dict[frozenset[int], float], waited: int) -> Refinement:
        scores = [0.1 + 0.01 * block for block in range(12)]
        refinement = _refinement(units, cost, scores, known=known, waited=waited)
        best = frozenset(range(3))
        pool = [frozenset(found) for found in itertools.combinations(range(12), 3)]
        refinement.search(pool, best, is_spent=lambda: False)
        return refinement

    whole = searched({}, 0)
    assert len(whole.known) < 220
    assert list(searched(whole.known, whole.waited).known) == list(whole.known)
    assert len(searched(whole.known, 0).known) > len(whole.known)


def _measured_without_allowance(scores: list[float], own: frozenset[int]) -> list[frozenset[int]]:
    """What refinement measures of sets of one unit when nothing is left to spend, in order."""
    found = _refinement(Units.blocks(6, 1), lambda removed, sample: 1.0, scores)
    found.search([frozenset([unit]) for unit in range(6)], own, is_spent=lambda: True)
    return list(found.known)


def test_what_is_expected_to_be_best_is_measured_first() -> None:
    """It may be all that the allowance pays for; for one estimator nothing else is known before."""
    assert _measured_without_allowance([0.5, 0.4, 0.3, 0.2, 0.1, 0.6], own=frozenset([4])) == [frozenset([4])]


def test_what_the_gates_alone_would_remove_is_measured_whatever_the_regression_thinks() -> None:
    measured = _measured_without_allowance([0.1, 0.2, 0.3, 0.4, 0.5, 9.0], own=frozenset([5]))
    assert measured == [frozenset([0]), frozenset([5])]


@pytest.mark.parametrize("seed", range(4))
def test_refinement_goes_on_while_a_swap_may_well_be_better(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    units = Units.blocks(12, 4)
    scores = (0.2 + torch.rand(12, generator=generator)).tolist()
    coupled = torch.rand(12, 12, generator=generator, dtype=torch.float64)

    def truth(removed: frozenset[int], sample: object = None) -> float:
        pairs = itertools.combinations(sorted(removed), 2)
        return sum(scores[block] for block in removed) * float(torch.tensor([coupled[pair] for pair in pairs]).prod())

    surrogate = Surrogate(scores, per_block=1)
    refinement = _refinement(units, truth, scores, surrogate)
    known = refinement.known
    start = frozenset(units.fill(range(12)))
    refinement.search([start], start, is_spent=lambda: len(known) >= 400)
    best = min(known, key=lambda removed: known[removed])
    unmeasured = sorted(swaps(best, units, torch.full((12,), 0.5)) - known.keys(), key=sorted)
    assert len(known) < 400 and unmeasured
    bounds = surrogate.predict(unmeasured, -1) - surrogate.uncertainty(unmeasured, -1)
    assert float(bounds.min()) >= math.log(known[best])


def test_the_likeliest_runs_are_measured_at_the_beginning() -> None:
    """From scattered blocks a run is several swaps away, none of which is any better by itself."""
    units, scores = Units.blocks(12, 3), [0.1 + 0.02 * block for block in range(12)]
    run, start = frozenset({4, 5, 6}), frozenset({0, 1, 2})

    def cost(removed: frozenset[int], sample: object = None) -> float:
        return 0.05 if removed == run else sum(scores[block] for block in removed)

    def searched(runs: set[frozenset[int]]) -> dict[frozenset[int], float]:
        refinement = _refinement(units, cost, scores)
        refinement.search([start], start, is_spent=lambda: len(refinement.known) >= 10, runs=runs)
        return refinement.known

    assert run not in searched(set())
    known = searched(spans(units))
    assert min(known, key=lambda removed: known[removed]) == run


def test_a_short_allowance_is_spent_on_the_likeliest() -> None:
    """Late blocks are cheap, and sets are measured in order of depth only among the few that look best."""
    units, scores = Units.blocks(24, 6), [1.0 - 0.04 * block for block in range(24)]
    measured: list[frozenset[int]] = []

    def cost(removed: frozenset[int], sample: object = None) -> float:
        measured.append(removed)
        return 1.0

    refinement = _refinement(units, cost, scores)
    start = frozenset(units.fill(range(24)))
    refinement.search([start], start, is_spent=lambda: len(measured) >= 3, runs=spans(units))
    assert measured[1] == start, "the one that the gates alone would remove"
    assert len(measured) == 3 and all(min(removed) >= 14 for removed in (measured[0], measured[2]))


def test_what_refinement_measures_shares_no_offset_with_what_the_gates_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures on other windows, where all sets may cost more."""
    fitted: list[list[Measurement]] = []
    fit = Surrogate.fit
    monkeypatch.setattr(Surrogate, "fit", lambda self, found: fitted.append(list(found)) or fit(self, found))
    units, scores = Units.blocks(6, 1), [0.1 * (block + 1) for block in range(6)]
    drawn = [Measurement(frozenset([block]), block % 3, 0.0, 0.05) for block in range(6)]
    refinement = _refinement(units, lambda removed, sample: scores[min(removed)], scores, measurements=drawn)
    refinement.search([frozenset([0])], frozenset([3]), is_spent=lambda: False)
    assert fitted[-1][:6] == drawn and len(fitted[-1]) == 6 + len(refinement.known)
    (own,) = {found.sample for found in fitted[-1][6:]}
    assert own not in {found.sample for found in drawn}


def test_around_a_set_the_swaps_that_may_be_good_enough_are_measured() -> None:
    units = Units.blocks(8, 2)
    scores = [0.1 * (block + 1) for block in range(8)]
    refinement = _refinement(units, lambda removed, sample: sum(scores[block] for block in removed), scores)
    center = frozenset([0, 3])
    refinement.known[center] = 0.5
    refinement.around(center, lambda known: 2.0 * min(known.values()), is_spent=lambda: False)
    near = {removed for removed in refinement.known if removed != center}
    assert near <= swaps(center, units, torch.full((8,), 0.5))
    # The best is {0, 1}; twice its cost is 0.6, and {0, 7} costs 0.9.
    assert {frozenset([0, block]) for block in (1, 2, 4)} <= near and frozenset([3, 7]) not in near
    spent = _refinement(units, lambda removed, sample: 1.0, scores)
    spent.known[center] = 0.5
    spent.around(center, lambda known: 9.0, is_spent=lambda: True)
    assert list(spent.known) == [center]

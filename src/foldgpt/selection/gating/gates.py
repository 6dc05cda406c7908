"""Learned gates: find the blocks that can go, knowing how they depend on each other.

Each unit's removal is measured alone; gates start from there and are learned with the backbone frozen; the sets they
point to are then measured, and refined by swaps; sets that come out level are judged on further text, and the swaps of
what wins there are looked at as well. Of compensated sets what folding leaves of them decides. All stages share one
allowance of forward passes: about half of what greedy removal is expected to take for the same budget, or, where
removed blocks are compensated, all of it, unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from foldgpt.artifacts import with_infinity, without_infinity
from foldgpt.errors import UsageError, did_you_mean
from foldgpt.progress import bar
from foldgpt.selection.checkpoint import Checkpoint
from foldgpt.selection.cost import RemovalCost, Sample
from foldgpt.selection.gated_pass import gradient_equivalents
from foldgpt.selection.gating.allowance import Allowance
from foldgpt.selection.gating.estimator import Estimator
from foldgpt.selection.gating.finals import Final, Round
from foldgpt.selection.gating.folded_refinement import FoldedRefinement, FoldedSets
from foldgpt.selection.gating.further_text import MOST, FurtherText
from foldgpt.selection.gating.hard_concrete import HardConcrete
from foldgpt.selection.gating.refine import Refinement
from foldgpt.selection.gating.score_function import NOISE, SAMPLES, ScoreFunction
from foldgpt.selection.gating.smoothed import SmoothedL0
from foldgpt.selection.gating.stage_samples import StageSamples
from foldgpt.selection.gating.surrogate import Measurement, Surrogate, log_of
from foldgpt.selection.greedy import greedy_passes
from foldgpt.selection.measured import leave_one_out, ranked, selection_of
from foldgpt.selection.selection import Request, Selection
from foldgpt.selection.units import Removed, Units

_OPTIONS = {
    "estimator": "score",
    "steps": 200,
    "refine": True,
}
#: Shares of greedy's passes that a search may take. Of blocks, all of them find better sets only where these are
#: compensated (docs/lab-notebook.md). Of twice as many units greedy makes at least twice as many removals, so that it
#: takes four times as many passes; a search of sublayers has about those that greedy takes for blocks.
_EFFORT_OF_BLOCKS, _EFFORT_COMPENSATED, _EFFORT_OF_SUBLAYERS = 0.45, 1.0, 0.28
#: Where no more than this share of the blocks goes, greedy's passes are few, and a search has a little more of them.
_FEW, _EFFORT_OF_FEW = 1 / 8, 0.5
_ESTIMATORS = ("score", "concrete", "smoothed")
#: An allowance that nothing spends; far above it, arithmetic with it overflows.
_MOST_EFFORT = 1_000_000

#: Shares of the allowance after which leave-one-out scores and the learning of gates must be done. Where sets are
#: compensated, folding them takes more of what comes after it, and refinement has to have some as well.
_SCORES_UNTIL, _LEARNING_UNTIL, _LEARNING_UNTIL_COMPENSATED = 0.225, 0.54, 0.4
#: Share of the allowance that a glance at all runs of neighbouring blocks may take.
_GLANCE = 0.08
#: So many sets that refinement likes best, and as many as finals take, are measured on all windows.
_FINALISTS = 3


def gates(request: Request) -> Selection:
    """Learn gates and remove the blocks (or attentions and MLPs) that they close.

    Options: "estimator" ("score", "concrete" or "smoothed"), "steps" (at most so many), "effort" (the allowance of
    forward passes, as a share of what greedy removal would take), "refine" (whether to refine by swaps).

    Raises:
        UsageError: as `gates_options` says, or a budget that no set meets.
        FoldGPTError: a gate or a cost is not a number.
        ArtifactError: the checkpoint cannot be written.
    """
    options = gates_options(request)
    cost = request.need_cost("gates")
    if cost.units.target == 0:
        return selection_of("gates", cost, frozenset(), scores=None, order=(), report={"cost": 0.0})
    return _Search(request, cost, options).run()


def gates_options(request: Request) -> dict[str, Any]:
    """The options of `gates` over their defaults.

    Raises:
        UsageError: an unknown option or estimator, a value that an option cannot have, or an estimator for whole blocks
            where sublayers are asked for.
    """
    options = request.options_over("gates", {**_OPTIONS, "effort": _effort(request)})
    if options["estimator"] not in _ESTIMATORS:
        raise UsageError(
            f"unknown gate estimator {options['estimator']!r}.{did_you_mean(str(options['estimator']), _ESTIMATORS)}"
        )
    if type(options["steps"]) is not int or options["steps"] < 1:
        raise UsageError(f"the gates' steps must be a whole number from 1 on, not {options['steps']!r}")
    if type(options["effort"]) not in (int, float) or not 0 < options["effort"] <= _MOST_EFFORT:
        raise UsageError(
            f"the gates' effort must be a number above 0 and at most {_MOST_EFFORT:,}, not {options['effort']!r}"
        )
    if type(options["refine"]) is not bool:
        raise UsageError(f"the gates' refine must be true or false, not {options['refine']!r}")
    if request.sublayers and options["estimator"] != "score":
        raise UsageError(
            f"the gate estimator {options['estimator']!r} is for whole blocks; attention and MLP apart are for 'score'"
        )
    return options


def _effort(request: Request) -> float:
    """The allowance of a search, as a share of the passes of greedy removal, unless told otherwise."""
    if request.sublayers:
        return _EFFORT_OF_SUBLAYERS
    if request.compensate:
        return _EFFORT_COMPENSATED
    return _EFFORT_OF_FEW if request.num_remove <= _FEW * request.num_blocks else _EFFORT_OF_BLOCKS


class _Search:
    """One search: its stages, what they found so far, and the allowance they share."""

    def __init__(self, request: Request, cost: RemovalCost, options: dict[str, Any]) -> None:
        self._request = request
        self._cost = cost
        self._options = options
        self._seed = request.seed
        self._further = FurtherText(request, cost)
        self._folded = FoldedRefinement(request, cost)
        # Of a search with other defaults nothing is taken over.
        self._checkpoint = Checkpoint("gates", replace(request, options=options), cost)
        fresh: dict[str, Any] = {"samples": [], "set_up_again": 0.0, "waited": 0}
        fresh["folded"] = FoldedSets().to_json_dict()
        fresh |= {name: [] for name in ("scores", "trace", "runs", "known", "num_known", "judged", "stages")}
        self._progress: dict[str, Any] = {**fresh, **self._checkpoint.found}
        self._allowance = Allowance(cost, options["effort"], self._progress)
        self._samples = StageSamples(cost, learns_from_sets=options["estimator"] == "score")

    def run(self) -> Selection:
        """All stages."""
        scores = self._scores()
        estimator = self._learn(scores)
        probabilities_U = estimator.keep_probabilities()
        by_gate = ranked(probabilities_U.tolist())
        removed = self._cost.units.fill(by_gate)
        known: dict[Removed, float] = {}
        finalists: list[Final] = []
        if self._options["refine"]:
            known, finalists = self._refine(scores, estimator)
            removed = finalists[0].removed if finalists else _best(known)
        value = known[removed] if known else self._cost.cost(removed)
        order = sorted(removed, key=by_gate.index) + [unit for unit in by_gate if unit not in removed]
        return selection_of(
            "gates",
            self._cost,
            removed,
            scores=probabilities_U.tolist(),
            order=order,
            report={
                "cost": value,
                "estimator": self._options["estimator"],
                "steps": len(self._progress["trace"]),
                "trace": self._progress["trace"],
                "leave_one_out": without_infinity(scores),
                "by_gates_alone": sorted(self._cost.units.fill(by_gate)),
                "refined": [
                    {"removed": sorted(found), "cost": known[found]}
                    for found in sorted(known, key=lambda found: known[found])[:20]
                ],
                "finals": [
                    {"removed": sorted(final.removed), "cost": final.cost, "num_tokens": final.num_tokens}
                    for final in finalists
                ],
            },
        )

    # -------------------------------------------------------------------------------------------- stages

    def _scores(self) -> list[float]:
        """The cost of each unit alone, on as many windows as the allowance lets it see."""
        known = with_infinity(self._progress["scores"])
        if len(known) == len(self._cost.units):
            return known
        everything = self._cost.everything
        whole = self._cost.predicted_equivalents(len(self._cost.units), everything)
        batches = int(self._cost.num_batches * _SCORES_UNTIL * self._allowance.passes / whole)
        batches = max(1, min(batches, self._cost.num_batches))

        def keep(scores: list[float]) -> None:
            self._progress["scores"] = without_infinity(scores)
            self._save(now=len(scores) == len(self._cost.units))

        return leave_one_out(self._cost, self._cost.sample(0, batches), known=known, after_each=keep)

    def _learn(self, scores: Sequence[float]) -> Estimator:
        """Gates, learned until they are settled or their share of the allowance is spent."""
        estimator = self._estimator(scores, self._samples.learning)
        if "estimator" in self._progress:
            estimator.restore(self._progress["estimator"])
        trace = self._progress["trace"]
        one_more = self._price_of_step(estimator)
        with bar("learning gates", self._options["steps"]) as progress:
            progress.advance(len(trace))
            while len(trace) < self._options["steps"] and not estimator.has_settled():
                if self._allowance.spent + (one_more if trace else 0.0) > self._learning_until:
                    break
                value = estimator.step()
                keep = [round(p, 4) for p in estimator.keep_probabilities().tolist()]
                trace.append({"step": len(trace), "cost": value, "keep": keep})
                self._progress["estimator"] = estimator.state()
                self._save()
                progress.advance()
        return estimator

    def _estimator(self, scores: Sequence[float], samples: Sequence[Sample]) -> Estimator:
        if self._options["estimator"] == "score":
            return ScoreFunction(self._cost, samples, scores, seed=self._seed)
        if "num_steps" not in self._progress:
            step = sum(gradient_equivalents(self._cost, sample) for sample in samples) / len(samples)
            affordable = int((self._learning_until - self._allowance.spent) / step)
            # Kept: schedules run over all steps, those before an interruption included.
            self._progress["num_steps"] = max(1, min(self._options["steps"], affordable))
        num_steps: int = self._progress["num_steps"]
        if self._options["estimator"] == "concrete":
            return HardConcrete(self._cost, samples, scores, num_steps=num_steps, seed=self._seed)
        return SmoothedL0(self._cost, samples, scores, num_steps=num_steps)

    def _refine(self, scores: Sequence[float], estimator: Estimator) -> tuple[dict[Removed, float], list[Final]]:
        """Promising sets and their costs on all windows, and what came out of the last finals, if there were any."""
        units = self._cost.units
        drawn: list[Measurement] = list(getattr(estimator, "measurements", []))
        runs = spans(units)
        at_a_glance = self._at_a_glance(runs)
        probabilities_U = estimator.keep_probabilities()

        def keep(*, now: bool = False) -> None:
            self._progress["known"] = [[sorted(found), value] for found, value in refinement.known.items()]
            self._progress["waited"] = refinement.waited
            self._save(now=now)

        # Of a few windows all are one sample.
        learned_there = self._samples.learning[0] is self._samples.refinement
        refinement = Refinement(
            self._cost,
            self._samples.refinement,
            keep_probabilities_U=probabilities_U,
            surrogate=Surrogate(scores, units.per_block),
            measurements=[*drawn, *at_a_glance],
            known={frozenset(found): value for found, value in self._progress["known"]},
            measured={m.removed: math.exp(m.log_cost) for m in drawn} if learned_there else {},
            waited=self._progress["waited"],
            after_round=keep,
        )
        own = units.fill(ranked(probabilities_U.tolist()))
        start = {own, units.fill(ranked(scores)), *(measurement.removed for measurement in drawn)}
        # By what is the same after an interruption.
        for_folded = self._folded.reserve(self._allowance.passes, start)
        for_finals = self._further.reserve(self._allowance.passes)
        most = max(_FINALISTS, MOST if for_finals else 0)
        left = self._allowance.passes - for_folded - for_finals - self._samples.price_of_judging(most)

        search = partial(
            refinement.search, start, own, self._allowance.spent_beyond(left, self._samples.refinement), runs=runs
        )
        measured = self._measured(0, refinement, search, keep)
        if for_folded:
            return self._as_folding_leaves_them(refinement, {*start, *runs})
        return self._by_finals(refinement, measured, most, keep)

    def _as_folding_leaves_them(
        self, refinement: Refinement, pool: Collection[Removed]
    ) -> tuple[dict[Removed, float], list[Final]]:
        """Compensated sets, and what folding leaves of those that may well be the best."""
        folded = FoldedSets.from_json_dict(self._progress["folded"])

        def keep() -> None:
            self._progress["folded"] = folded.to_json_dict()
            self._save()

        price = self._samples.price_of_judging(1 + _FINALISTS)
        found = self._folded.search(refinement, pool, lambda: self._allowance.left - price, folded, keep)
        best = [final.removed for final in found[:1]]
        return self._judged(refinement.known, _FINALISTS, also=best), found

    def _by_finals(
        self, refinement: Refinement, measured: Mapping[Removed, float], most: int, keep: Callable[..., None]
    ) -> tuple[dict[Removed, float], list[Final]]:
        """What is level, judged on further text; and so with the swaps of what wins there."""
        centers = {_best(measured)}
        known = self._judged(measured, most)
        finalists = self._finals(0, known, ())
        limit = partial(self._further.level_cost, sample=self._samples.refinement)
        # What wins on further text may not be the set whose swaps were looked at.
        while finalists and (center := finalists[0].removed) not in centers:
            centers.add(center)
            left = self._allowance.passes - self._further.price(center) - self._samples.price_of_judging(most)
            number = len(centers) - 1
            look_around = partial(
                refinement.around, center, limit, self._allowance.spent_beyond(left, self._samples.refinement)
            )
            known |= self._judged(self._measured(number, refinement, look_around, keep), most)
            found = self._finals(number, known, [final.removed for final in finalists])
            if not found:
                break
            finalists = found
        return known, finalists

    def _at_a_glance(self, spans_of_blocks: Collection[Removed]) -> list[Measurement]:
        """All runs of neighbouring blocks on the first of the learning's samples, if that costs next to nothing.

        The regression has seen scattered blocks, and cannot tell which runs are the likeliest.
        """
        runs = sorted(spans_of_blocks, key=sorted)
        first = self._samples.learning[0]
        if self._cost.predicted_equivalents(len(runs), first) > _GLANCE * self._allowance.passes:
            return []
        known: list[float] = self._progress["runs"]
        for run in runs[len(known) :]:
            known.append(log_of(self._cost.cost(run, first)))
            self._save(now=len(known) == len(runs))
        return [Measurement(run, 0, log_cost, NOISE) for run, log_cost in zip(runs, known, strict=True)]

    def _measured(
        self, number: int, refinement: Refinement, measure: Callable[[], None], keep: Callable[..., None]
    ) -> dict[Removed, float]:
        """What one part of the refinement has measured, on its windows; it goes on where it was stopped."""
        ends: list[int] = self._progress["num_known"]
        if number == len(ends):
            measure()
            ends.append(len(refinement.known))
            keep(now=True)
        start = ends[number - 1] if number else 0
        return dict(list(refinement.known.items())[start : ends[number]])

    def _judged(self, known: Mapping[Removed, float], most: int, also: Sequence[Removed] = ()) -> dict[Removed, float]:
        """The best of some sets, and certain other ones, with their costs on all windows."""
        if self._samples.refines_on_everything:
            return dict(known)
        judged = {frozenset(found): value for found, value in self._progress["judged"]}
        best = [*also, *sorted(known, key=lambda found: known[found])[:most]]
        for found in sorted(set(best) - judged.keys(), key=sorted):
            judged[found] = self._cost.cost(found)
            self._progress["judged"] = [[sorted(removed), value] for removed, value in judged.items()]
            self._save()
        return {found: judged[found] for found in best}

    def _finals(self, number: int, known: Mapping[Removed, float], incumbents: Sequence[Removed]) -> list[Final]:
        """What is level by the search, judged on further text; the first finals are number 0."""
        stages = self._progress["stages"]
        earlier = [[Round.from_json_dict(kept) for kept in stage] for stage in stages[:number]]
        past = [Round.from_json_dict(kept) for stage in stages[number : number + 1] for kept in stage]

        def keep() -> None:
            stages[number:] = [[found.to_json_dict() for found in past]]
            self._save()

        return self._further.finals(
            known, lambda: self._allowance.left, past, keep, earlier=earlier, incumbents=incumbents
        )

    # ------------------------------------------------------------------------------------------- bookkeeping

    @property
    def _learning_until(self) -> float:
        """What may be spent when the gates have been learned."""
        has_finals = self._request.compensate and self._options["refine"]
        share = _LEARNING_UNTIL_COMPENSATED if has_finals else _LEARNING_UNTIL
        return share * self._allowance.passes

    def _price_of_step(self, estimator: Estimator) -> float:
        """What one more step of learning takes at most; nothing where the number of steps is planned."""
        if not isinstance(estimator, ScoreFunction):
            return 0.0
        return max(self._cost.predicted_equivalents(SAMPLES, sample) for sample in self._samples.learning)

    def _save(self, *, now: bool = False) -> None:
        self._progress |= self._allowance.progress()
        self._checkpoint.save(self._progress, now=now)


def gates_passes(request: Request, head: float) -> float:
    """What `gates` may spend; it often ends before."""
    return float(gates_options(request)["effort"]) * greedy_passes(request, head)


def _best(known: Mapping[Removed, float]) -> Removed:
    return min(known, key=lambda found: known[found])


def spans(units: Units) -> set[Removed]:
    """All runs of consecutive whole blocks that just meet the budget."""
    found: set[Removed] = set()
    for start in range(units.num_blocks):
        for stop in range(start + 1, units.num_blocks + 1):
            run = frozenset(range(start * units.per_block, stop * units.per_block))
            if units.missing(run) <= 0:
                if units.is_allowed(run):
                    found.add(run)
                break
    return found

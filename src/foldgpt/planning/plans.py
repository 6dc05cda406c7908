"""From a selection to a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from foldgpt.analysis import Analysis
from foldgpt.errors import PlanError, UsageError
from foldgpt.families import decoder_of
from foldgpt.folding import source_model_of
from foldgpt.plan import Compensation, FoldPlan, SourceModel
from foldgpt.planning.groups import check_rank, cut_of, groups_for, why_no_group
from foldgpt.planning.selecting import parameter_limit, planned_compensation, request_for
from foldgpt.progress import note
from foldgpt.replay import Replay
from foldgpt.selection import MEASURED, Selection, select
from foldgpt.selection.units import Units
from foldgpt.sharing import solve, with_best_donors
from foldgpt.workbench import Workbench


def make_plan(
    bench: Workbench, selection: Selection, analysis: Analysis | None, checkpoint: Path | None = None
) -> FoldPlan:
    """Decide what is removed and what is shared.

    What is removed is recorded under `origin` too: of a plan that is edited, what was measured is not claimed.

    Args:
        bench: the inputs.
        selection: what was chosen for removal.
        analysis: what the selection was read off, unless it was measured.
        checkpoint: where a long search for what is shared keeps its progress. It stays: whoever has saved the plan
            drops it.
    """
    recipe = bench.recipe
    source = bench.source
    decoder = decoder_of(source.model)
    check_rank(recipe, source.model)
    compensation = planned_compensation(bench)
    limit = parameter_limit(recipe, source.model)
    groups = () if limit is not None else groups_for(recipe, decoder, selection)
    removes_anything = selection.removed or selection.removed_attention or selection.removed_mlp
    reads_text = (
        limit is not None
        or (compensation is not None and removes_anything)
        or (groups and (recipe.share.fit or recipe.share.donor == "best"))
    )
    origin: dict[str, Any] = {"seed": recipe.seed}
    analysed = None if analysis is None else analysis.calibration
    # Whoever folds by the plan from elsewhere finds the text by it, whatever chose the blocks.
    if selection.method in MEASURED or (analysed is None and (reads_text or "cost" in selection.report)):
        origin["calibration"] = bench.calibration_identity.model_dump(mode="json")
    elif analysed is not None:
        origin["calibration"] = analysed.model_dump(mode="json")
        if (reads_text or "cost" in selection.report) and bench.calibration.fingerprint != analysed.fingerprint:
            origin["fitted_on"] = bench.calibration_identity.model_dump(mode="json")
    origin |= {
        "selector": selection.method,
        **({"options": dict(recipe.select.options)} if recipe.select.options else {}),
        "scores": None if selection.scores is None else list(selection.scores),
        "removal_order": list(selection.order),
        "report": dict(selection.report),
    }
    if limit is not None:
        return _as_chosen(_solved(bench, selection, limit, compensation, origin, analysis, checkpoint))
    if recipe.share.method != "none" and not groups:
        why = why_no_group(recipe)
        if not removes_anything:
            raise UsageError(f"{why}, and nothing is removed: the model would be as it is")
        note(f"nothing is shared: {why}")
    if recipe.share.donor == "best":
        groups = with_best_donors(Replay(source.model, bench.selection_ids), groups)
    plan = FoldPlan.create(
        _source_model(bench),
        **cut_of(recipe, selection, groups),
        compensation=compensation if removes_anything else None,
        fitting=bench.fitting if groups and recipe.share.fit else None,
        origin=origin,
    )
    return _as_chosen(plan)


def _as_chosen(plan: FoldPlan) -> FoldPlan:
    """A plan that says under `origin` what was chosen for removal."""
    return plan.model_copy(update={"origin": {**plan.origin, "selected": plan.removal}})


def _source_model(bench: Workbench) -> SourceModel:
    source = bench.source
    return source_model_of(source.model, bench.recipe.model, source.revision, bench.fingerprint)


def _solved(
    bench: Workbench,
    selection: Selection,
    limit: int,
    compensation: Compensation | None,
    origin: dict[str, Any],
    analysis: Analysis | None,
    checkpoint: Path | None,
) -> FoldPlan:
    """The best of several ways to bring the model down to a number of parameters.

    Args:
        bench: the inputs.
        selection: what would be removed if nothing were shared.
        limit: parameters of the whole model.
        compensation: what the plan says of compensation.
        origin: what the plan says of where it comes from; the candidates are added.
        analysis: what the selection was read off, unless it was measured.
        checkpoint: where it keeps its progress.
    """
    source = bench.source
    decoder = decoder_of(source.model)
    order = list(dict.fromkeys([*selection.order, *selection.least_needed()]))

    def removal(number: int) -> tuple[int, ...]:
        if number == 0:
            return ()
        if number == len(selection.removed):
            return selection.removed
        if selection.method not in MEASURED:
            # It costs nothing to ask again, and what angular removes is another run for each number.
            return select(selection.method, replace(request_for(bench, analysis, None), num_remove=number)).removed
        try:
            return tuple(sorted(Units.blocks(len(decoder.blocks), number, decoder).fill(order)))
        except UsageError as error:
            raise PlanError(f"cannot remove {number} blocks: {error}") from None

    solution = solve(
        source.model,
        _source_model(bench),
        bench.calibration.ids,
        limit,
        removal,
        compensation=compensation,
        fitting=bench.fitting,
        checkpoint=checkpoint,
    )
    plan = solution.best.plan
    return plan.model_copy(update={"origin": {**origin, "size": bench.recipe.share.size, **solution.to_json_dict()}})

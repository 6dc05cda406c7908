"""What is cut: from an analysis to a selection, and from a selection to a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from foldgpt.analysis import Analysis
from foldgpt.corpus.own_text import SELF
from foldgpt.errors import PlanError, UsageError
from foldgpt.families import Decoder, attention_kinds, decoder_of, first_of_each_kind, input_device
from foldgpt.folding import low_rank_leaves, predicted_parameters, same_kind, source_model_of
from foldgpt.formats import amount, what_goes
from foldgpt.plan import SUBLAYERS, Compensation, FoldPlan, Group, SourceModel
from foldgpt.progress import note
from foldgpt.progress_file import ProgressFile, computed_with
from foldgpt.recipe import Recipe
from foldgpt.replay import Replay
from foldgpt.selection import (
    MEASURED,
    Request,
    Selection,
    Share,
    number_for_target,
    number_for_wish,
    number_to_remove,
    parameters_of,
    select,
    share_for,
)
from foldgpt.selection.units import Units
from foldgpt.sharing import adjacent_groups, limit_of, solve, with_best_donors, zero_started_groups
from foldgpt.sizes import size
from foldgpt.targets import target
from foldgpt.workbench import Workbench

_TARGET_FORMAT = "foldgpt.target"


def make_selection(bench: Workbench, analysis: Analysis | None, checkpoint: Path | None = None) -> Selection:
    """Choose what is removed where nothing is shared.

    Args:
        bench: the inputs.
        analysis: the redundancy analysis; None only for selectors in `ANALYSIS_FREE`.
        checkpoint: where a long search keeps its progress. It stays: whoever has saved the selection drops it, by
            `drop_search`.
    """
    section = bench.recipe.select
    if section.method in MEASURED and not any(text.startswith(SELF) for text in bench.recipe.calibration.texts):
        # Before the model is loaded, unless that writes it: a text may not be there.
        _ = bench.calibration
    check_rank(bench.recipe, bench.source.model)
    request = _request(bench, analysis, checkpoint)
    # What others chose is measured where the text is read anyway, and the model need not be brought from disk for it.
    reads_text = bench.has_read_calibration or will_read_text(bench.recipe)
    if section.method in MEASURED or (reads_text and not bench.source.offloaded):
        request = replace(request, ids_WT=bench.selection_ids(), further_ids_WT=bench.further_selection_ids())
    if section.target is None:
        return select(section.method, request)
    met = _meet(bench, section.target, checkpoint)
    selection = select(section.method, replace(request, num_remove=met["num_remove"]))
    return replace(selection, report={**selection.report, "target": met})


def will_read_text(recipe: Recipe) -> bool:
    """Whether calibration text is read for the target, the size or what is shared, whatever chooses the blocks."""
    share = recipe.share
    return (
        share.size is not None
        or (share.method != "none" and (share.fit or share.donor == "best"))
        or (recipe.select.target is not None and target(recipe.select.target).what != "parameters")
    )


def _request(bench: Workbench, analysis: Analysis | None, checkpoint: Path | None) -> Request:
    """What is asked of a selector, but for the windows that some measure on."""
    recipe, section = bench.recipe, bench.recipe.select
    source = bench.source
    return Request(
        num_blocks=len(decoder_of(source.model).blocks),
        # A target is looked at below: to know what blocks take, they may have to be timed.
        num_remove=0 if section.target else num_removed(recipe, source.model),
        analysis=analysis,
        seed=recipe.seed,
        model=source.model,
        objective=section.objective,
        # A set is judged by what it costs as it will be folded.
        compensate=_compensation(bench) is not None,
        sublayers=section.sublayers,
        checkpoint=checkpoint,
        options=section.options,
    )


def _meet(bench: Workbench, written: str, checkpoint: Path | None) -> dict[str, Any]:
    """How many blocks a target means, and how that was found, as JSON values.

    Args:
        bench: the inputs.
        written: the target.
        checkpoint: of the search; beside it a measured time is kept, so that a search that goes on has the same end.

    Raises:
        UsageError: no number of blocks meets it, the source does already, or times of a model that does not fit in
            memory are asked for.
    """
    source, wanted = bench.source, target(written)
    if wanted.is_measured and source.offloaded:
        raise UsageError(
            f"select.target is {written}, and {bench.recipe.model} does not fit in memory: the time of bringing its "
            "weights would be measured. Give parameters or flops"
        )

    def identity() -> dict[str, Any]:
        return {**computed_with(source.model), "target": written, "windows": bench.calibration.fingerprint}

    place = _target_beside(checkpoint) if wanted.is_measured and checkpoint is not None else None
    kept = ProgressFile(place, _TARGET_FORMAT, identity, seconds_between=0)
    met = kept.load()
    if not met:
        share = share_for(wanted, source.model, lambda: bench.calibration.ids[:1].to(input_device(source.model)))
        limit = wanted.limit(share.total)
        number = number_for_wish(share, wanted, written)
        met = {"target": written, "what": share.what, "source": share.total, "limit": limit, "num_remove": number}
        kept.save(lambda: met, now=True)
    note(
        f"{written}: at most {amount(met['limit'], met['what'])} of {amount(met['source'], met['what'])}, so "
        f"{what_goes(met['num_remove'], sublayers=bench.recipe.select.sublayers)}"
    )
    return met


def _target_beside(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.target")


def num_removed(recipe: Recipe, model: PreTrainedModel, flops: Callable[[], Share] | None = None) -> int:
    """How many blocks a recipe asks the search for; what is shared beside them is not searched for.

    Args:
        recipe: the recipe.
        model: the source; it may be on the meta device.
        flops: gives what stands for a target in anything but parameters.

    Raises:
        UsageError: no number meets the target or the size, or the source does already.
    """
    section = recipe.select
    if section.target is not None:
        wanted = target(section.target)
        if wanted.what == "parameters":
            return number_for_wish(parameters_of(model), wanted, section.target)
        assert flops is not None, "whoever has nothing that stands for it does not ask"
        return number_for_wish(flops(), wanted, section.target)
    limit = _limit(recipe, model)
    if limit is not None:
        return number_for_target(parameters_of(model), limit)
    num_blocks = len(decoder_of(model).blocks)
    return number_to_remove(num_blocks, remove=section.remove, ratio=section.remove_ratio)


def drop_search(checkpoint: Path) -> None:
    """Remove what `make_selection` goes on from, once its selection is saved."""
    for path in (checkpoint, _target_beside(checkpoint)):
        path.unlink(missing_ok=True)


def _limit(recipe: Recipe, model: PreTrainedModel) -> int | None:
    """Parameters that the whole model may have, where the recipe gives a size."""
    wanted = recipe.share.size
    return None if wanted is None else limit_of(model, size(wanted))


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
    compensation = _compensation(bench)
    limit = _limit(recipe, source.model)
    groups = () if limit is not None else _groups(recipe, decoder, selection)
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
        why = _no_group(recipe)
        if not removes_anything:
            raise UsageError(f"{why}, and nothing is removed: the model would be as it is")
        note(f"nothing is shared: {why}")
    if recipe.share.donor == "best":
        groups = with_best_donors(Replay(source.model, bench.selection_ids()), groups)
    plan = FoldPlan.create(
        _source_model(bench),
        **_cut(recipe, selection, groups),
        compensation=compensation if removes_anything else None,
        fitting=bench.fitting if groups and recipe.share.fit else None,
        origin=origin,
    )
    return _as_chosen(plan)


def _as_chosen(plan: FoldPlan) -> FoldPlan:
    """A plan that says under `origin` what was chosen for removal."""
    return plan.model_copy(update={"origin": {**plan.origin, "selected": plan.removal}})


def check_rank(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse a rank that the matrices do not have, before anything is searched.

    Args:
        recipe: the recipe.
        model: the source; it may be on the meta device.

    Raises:
        UsageError: names the largest rank that there is.
    """
    share = recipe.share
    if not share.rank or share.method in ("none", "auto"):
        return
    decoder = decoder_of(model)
    largest = 0
    for index, block in enumerate(decoder.blocks):
        names = low_rank_leaves(decoder, index, share.sublayers)
        weights = [block.get_parameter(f"{name}.weight") for name in names]
        largest = max(largest, min((min(weight.shape) for weight in weights), default=0))
    # Where nothing that is shared is a linear layer there are no terms, whatever their rank.
    if 0 < largest < share.rank:
        raise UsageError(
            f"share.rank is {share.rank}, and the smallest matrix that is shared has {largest} rows or columns: give "
            "at most that"
        )


def _source_model(bench: Workbench) -> SourceModel:
    source = bench.source
    return source_model_of(source.model, bench.recipe.model, source.revision, bench.fingerprint)


def expected_parameters(recipe: Recipe, model: PreTrainedModel) -> int | None:
    """Parameters of the folded model, before anything is searched; None where they depend on what a search finds.

    They do not where a number of blocks goes, all of one size, and those that share are all of one kind as well.

    Args:
        recipe: what is cut.
        model: the source; it may be on the meta device.
    """
    decoder = decoder_of(model)
    num_blocks = len(decoder.blocks)
    section = recipe.share
    wanted = None if recipe.select.target is None else target(recipe.select.target)
    if wanted is not None and wanted.what != "parameters":
        return None
    sizes = {sum(parameter.numel() for parameter in block.parameters()) for block in decoder.blocks}
    if section.method == "auto" or recipe.select.sublayers or len(sizes) != 1:
        return None
    num_remove = num_removed(recipe, model)
    if section.method == "none":
        return sum(parameter.numel() for parameter in model.parameters()) - num_remove * sizes.pop()
    # The attention of the first kept block has to stay, so not every removed one may come back without its own.
    is_partial = set(section.sublayers) != set(SUBLAYERS)
    if is_partial or not all(same_kind(decoder, 0, index, SUBLAYERS) for index in range(num_blocks)):
        return None
    any_blocks = select("last", Request(num_blocks, num_remove))
    cut = _cut(recipe, any_blocks, _groups(recipe, decoder, any_blocks))
    return predicted_parameters(model, FoldPlan.create(source_model_of(model, name=recipe.model), **cut))


def _cut(recipe: Recipe, selection: Selection, groups: Sequence[Group]) -> dict[str, Any]:
    """What a plan says of removal and sharing.

    What starts at zero was selected for removal; it has a position all the same.
    """
    started = {block for group in groups for block in group.started_at_zero}
    absent = {
        sublayer: {*removed, *(started if sublayer not in recipe.share.sublayers else ())}
        for sublayer, removed in (("attention", selection.removed_attention), ("mlp", selection.removed_mlp))
    }
    return {
        "removed": set(selection.removed) - started,
        "removed_attention": absent["attention"],
        "removed_mlp": absent["mlp"],
        "groups": groups,
    }


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
            return select(selection.method, replace(_request(bench, analysis, None), num_remove=number)).removed
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


def _compensation(bench: Workbench) -> Compensation | None:
    """What the plan says of compensation; nothing for a model whose blocks cannot be compensated."""
    if bench.recipe.compensate.method == "none" or bench.why_uncompensated is not None:
        return None
    return bench.compensation


def _groups(recipe: Recipe, decoder: Decoder, selection: Selection) -> tuple[Group, ...]:
    """The groups that a recipe asks for, beside what was selected for removal; the first members are the donors."""
    section = recipe.share
    if section.method == "none":
        return ()
    sublayers = tuple(section.sublayers)
    lacking = {
        *(selection.removed_attention if "attention" in sublayers else ()),
        *(selection.removed_mlp if "mlp" in sublayers else ()),
    }
    kept = [index for index in range(len(decoder.blocks)) if index not in {*selection.removed, *lacking}]
    if section.start == "zero":
        whole = [index for index in kept if index not in {*selection.removed_attention, *selection.removed_mlp}]
        returning = selection.removed
        if "attention" not in sublayers:
            returning = _may_lose_attention(decoder, selection.removed)
        return zero_started_groups(decoder, whole, returning, sublayers=sublayers, rank=section.rank)
    return adjacent_groups(
        decoder,
        kept,
        size=section.group_size,
        sublayers=sublayers,
        donor="first" if section.donor == "best" else section.donor,
        rank=section.rank,
        scales=section.scales,
    )


def _no_group(recipe: Recipe) -> str:
    """Why there is nothing that shares weights."""
    section = recipe.share
    if section.start == "zero":
        return "no removed block may come back beside a kept one of its kind (share.start zero)"
    return f"no {section.group_size} neighbours of one kind are kept beside each other (share.group_size)"


def _may_lose_attention(decoder: Decoder, removed: Collection[int]) -> tuple[int, ...]:
    """Of removed blocks those that may come back without their attention.

    A block that would then be the first one with its kind of attention may not: the KV cache's length is read there.
    """
    num_blocks = len(decoder.blocks)
    kinds = attention_kinds(decoder.config)
    first = first_of_each_kind(kinds, (index for index in range(num_blocks) if index not in removed))
    returning = tuple(index for index in removed if index > first.get(kinds[index], num_blocks))
    for index in sorted(set(removed) - set(returning)):
        note(f"block {index} stays removed: without attention it cannot be the first kept block with {kinds[index]}")
    return returning

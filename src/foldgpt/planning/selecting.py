"""From an analysis to a selection: what is removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from foldgpt.analysis import Analysis
from foldgpt.corpus.own_text import SELF
from foldgpt.errors import UsageError
from foldgpt.families import decoder_of, input_device
from foldgpt.formats import amount, what_goes
from foldgpt.plan import Compensation
from foldgpt.planning.groups import check_rank
from foldgpt.progress import note
from foldgpt.progress_file import ProgressFile, computed_with
from foldgpt.recipe import Recipe
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
from foldgpt.sharing import limit_of
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
    request, met = request_for(bench, analysis, checkpoint), None
    if section.target is not None:
        met = _meet(bench, section.target, checkpoint)
        request = replace(request, num_remove=met["num_remove"])
    # What others chose is measured where the text is read anyway, and the model need not be brought from disk for it.
    reads_text = bench.has_read_calibration or will_read_text(bench.recipe)
    if section.method in MEASURED or (reads_text and not bench.source.offloaded):
        request = replace(request, ids_WT=bench.selection_ids, further_ids_WT=bench.further_selection_ids)
    selection = select(section.method, request)
    if met is None:
        return selection
    return replace(selection, report={**selection.report, "target": met})


def will_read_text(recipe: Recipe) -> bool:
    """Whether calibration text is read for the target, the size or what is shared, whatever chooses the blocks."""
    share = recipe.share
    return (
        share.size is not None
        or (share.method != "none" and (share.fit or share.donor == "best"))
        or (recipe.select.target is not None and target(recipe.select.target).what != "parameters")
    )


def request_for(bench: Workbench, analysis: Analysis | None, checkpoint: Path | None) -> Request:
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
        copies=section.copies,
        objective=section.objective,
        # A set is judged by what it costs as it will be folded.
        compensate=planned_compensation(bench) is not None,
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
    limit = parameter_limit(recipe, model)
    if limit is not None:
        return number_for_target(parameters_of(model), limit)
    num_blocks = len(decoder_of(model).blocks)
    return number_to_remove(num_blocks, remove=section.remove, ratio=section.remove_ratio)


def drop_search(checkpoint: Path) -> None:
    """Remove what `make_selection` goes on from, once its selection is saved."""
    for path in (checkpoint, _target_beside(checkpoint)):
        path.unlink(missing_ok=True)


def parameter_limit(recipe: Recipe, model: PreTrainedModel) -> int | None:
    """Parameters that the whole model may have, where the recipe gives a size."""
    wanted = recipe.share.size
    return None if wanted is None else limit_of(model, size(wanted))


def planned_compensation(bench: Workbench) -> Compensation | None:
    """What the plan says of compensation; nothing for a model whose blocks cannot be compensated."""
    if bench.recipe.compensate.method == "none" or bench.why_uncompensated is not None:
        return None
    return bench.compensation

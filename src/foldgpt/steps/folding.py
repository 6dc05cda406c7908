"""The step of a run that folds a model by its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foldgpt.compensation import COMPENSATION, Compensated, compensate_
from foldgpt.corpus import OwnText, Windows, calibration_windows
from foldgpt.errors import FoldGPTError, PlanError, SourceError
from foldgpt.folding import (
    GroupFit,
    Verification,
    check_foldable,
    fold_,
    predicted_parameters,
    save_folded,
    source_model_of,
)
from foldgpt.history import known_history
from foldgpt.plan import CalibrationText, Compensation, FoldPlan
from foldgpt.progress import note
from foldgpt.sharing import SHARING, fit_sharing, sharing_replay
from foldgpt.workbench import Workbench


def make_folded(bench: Workbench, plan: FoldPlan, folder: Path, *, replace: bool = False) -> Verification:
    """Fold the recipe's model by a plan and save it, verified."""
    source = bench.take_source()
    check_foldable(source.model, plan)
    if plan.source.fingerprint not in (None, source.fingerprint):
        note(
            f"the plan was made for other weights ({plan.source.model}) than those of {bench.recipe.model}: the blocks "
            "it removes may not be the ones that this model can do without"
        )
        # What was measured for it is not of this model, and its source is another.
        name, made_for = bench.recipe.model, plan.source.model_dump(mode="json")
        own_source = source_model_of(source.model, name, source.revision, source.fingerprint)
        plan = plan.model_copy(update={"source": own_source, "origin": {**plan.origin, "made_for": made_for}})
    expected = predicted_parameters(source.model, plan)
    notes = known_history(bench.place).notes
    fits: Mapping[int, GroupFit] = {}
    own = OwnText(lambda: source.model, source.tokenizer, bench.fingerprint)
    # What is fitted aims at the source, so that is recorded before compensation changes it.
    recorded = None
    if plan.fitting is not None:
        # Weights that a fit has to make cannot be made without it.
        needed = any(group.donor == "least_squares" for group in plan.groups)
        without = "" if needed else ", or set its fitting to null"
        windows = _windows_of(plan.fitting, plan, source.tokenizer, own, without)
        recorded = sharing_replay(source.model, windows.ids, plan)
    if plan.compensation is not None:
        compensated = _compensate_(source.model, plan, plan.compensation, source.tokenizer, own)
        notes[COMPENSATION] = compensated.to_json_dict()
    if recorded is not None:
        note("fitting shared weights and private terms")
        fitted = fit_sharing(source.model, plan, recorded.ids_WT, replay=recorded)
        notes[SHARING] = fitted.to_json_dict()
        fits = fitted.fits
    fold_(source.model, plan, fits)
    note("saving and verifying the folded model")
    return save_folded(
        source.model,
        plan,
        folder,
        tokenizer=source.tokenizer,
        expected_parameters=expected,
        notes=notes,
        replace=replace,
        dtype=bench.save_dtype(bench.place),
    )


def _compensate_(model: Any, plan: FoldPlan, compensation: Compensation, tokenizer: Any, own: OwnText) -> Compensated:
    """Let kept blocks take over what the removed ones did, and those that start at zero, as the plan says."""
    windows = _windows_of(compensation, plan, tokenizer, own, ", or set its compensation to null")
    note("compensating for the removed blocks")
    return compensate_(
        model,
        plan.at_start,
        windows.ids,
        features=compensation.features,
        ridge=compensation.ridge,
        rounds=compensation.rounds,
    )


def _windows_of(text: CalibrationText, plan: FoldPlan, tokenizer: Any, own: OwnText, without: str = "") -> Windows:
    """The windows that a plan says something is fitted on.

    Args:
        text: what the plan says. A text that is not there is looked for where it was when the plan was made.
        plan: the plan.
        tokenizer: the model's.
        own: the model's own text.
        without: how to do without, as the end of a sentence, where that can be done.

    Raises:
        PlanError: the text is not what it was when the plan was made.
    """

    def read(texts: Sequence[str]) -> Windows:
        return calibration_windows(
            texts, tokenizer, context=text.context, num_tokens=text.num_tokens, seed=text.seed, own=own
        )

    texts: Sequence[str] = text.texts
    try:
        windows = read(texts)
    except SourceError as error:
        calibration = plan.origin.get("fitted_on", plan.origin.get("calibration"))
        elsewhere = calibration.get("specs") if isinstance(calibration, Mapping) else None
        if not isinstance(elsewhere, list) or list(text.texts) == elsewhere:
            raise
        try:
            windows = read(texts := [str(each) for each in elsewhere])
        except FoldGPTError:
            raise error from None
    if windows.fingerprint != text.fingerprint:
        raise PlanError(
            f"the calibration text of the plan ({', '.join(texts)}) is not what it was when the plan was made. "
            f"Make the plan again{without}."
        )
    return windows

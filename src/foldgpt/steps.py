"""The steps of a run, one function each: from analysis to evaluation, and the pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foldgpt.analysis import Analysis, SourceIdentity, analyze
from foldgpt.artifacts import from_home, read_json
from foldgpt.checks import (
    check_applies,
    check_machine,
    check_names,
    check_tested_contexts,
    check_tests,
    check_training_tokens,
)
from foldgpt.compensation import COMPENSATION, Compensated, compensate_
from foldgpt.corpus import OwnText, Windows, absolute, calibration_windows, reused_texts
from foldgpt.errors import ArtifactError, FoldGPTError, PlanError, SourceError, UsageError
from foldgpt.evaluation import Evaluation, Measured, Subject, evaluate
from foldgpt.folding import (
    GroupFit,
    Verification,
    check_foldable,
    fold_,
    predicted_parameters,
    save_folded,
)
from foldgpt.history import known_history
from foldgpt.plan import CalibrationText, Compensation, FoldPlan
from foldgpt.progress import note
from foldgpt.recovery import (
    RecoveryResult,
    check_apart,
    check_plan_suits,
    check_trainable,
    recover,
    remove_work,
    work_beside,
)
from foldgpt.recovery_result import RECOVERY
from foldgpt.run_folder import ANALYSIS, PLAN
from foldgpt.selection.units import closed_units, unit_names
from foldgpt.sharing import (
    SHARING,
    fit_sharing,
    sharing_replay,
)
from foldgpt.sources import resolve
from foldgpt.workbench import Workbench

#: Text of several kinds, by which tokenizers are told apart.
_PROBE = "The 2nd fold (of 30) costs $1.50; naïve café, 東京, Привет!\n\n    x = a[0] ** 2  # it's — “so”"


def make_analysis(bench: Workbench, checkpoint: Path | None = None) -> Analysis:
    """Measure the redundancy of the recipe's model on its calibration text.

    Args:
        bench: the inputs.
        checkpoint: where a long sweep keeps its progress. It stays: whoever has saved the analysis drops it.
    """
    recipe = bench.recipe
    windows = bench.calibration
    source = bench.source
    return analyze(
        source.model,
        windows.ids,  # type: ignore[arg-type]
        checkpoint=checkpoint,
        source=SourceIdentity(spec=recipe.model, revision=source.revision, fingerprint=bench.fingerprint),
        calibration=bench.calibration_identity,
    )


def make_folded(bench: Workbench, plan: FoldPlan, folder: Path, *, replace: bool = False) -> Verification:
    """Fold the recipe's model by a plan and save it, verified."""
    source = bench.take_source()
    check_foldable(source.model, plan)
    if plan.source.fingerprint not in (None, source.fingerprint):
        note(
            f"the plan was made for other weights ({plan.source.model}) than those of {bench.recipe.model}: the blocks "
            "it removes may not be the ones that this model can do without"
        )
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
        calibration = plan.origin.get("calibration")
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


def make_recovered(
    bench: Workbench, folded: Path, out: Path, *, replace: bool = False, keep: bool = False
) -> RecoveryResult:
    """Train a folded model against the recipe's, and save it, verified.

    Args:
        bench: the inputs; its model is the teacher, where a loss compares with one.
        folded: the folded model; it holds its plan.
        out: where the recovered one is saved.
        replace: replace an existing `out`.
        keep: leave what the same call goes on from, until `drop_recovery_work`.

    Raises:
        UsageError: too few tokens for one step, or the two have different tokenizers.
        FoldGPTError: the folded model does not fit in memory or cannot be trained, or the recovery failed.
    """
    check_training_tokens(bench)
    recipe, section = bench.recipe, bench.recipe.recover
    if not (folded / "plan.json").is_file():
        why = "holds no plan.json" if folded.is_dir() else "is no folder"
        raise UsageError(f"{folded} {why}, so it is no model that `foldgpt fold` wrote: there is nothing to recover")
    plan = FoldPlan.load(folded)
    # Before the text is read, and before the source writes one (`self:`).
    place = resolve(str(folded))
    if bench.recovery_settings.needs_teacher:
        check_applies(bench, plan)
    check_plan_suits(plan, bench.recovery_settings)
    check_apart(out, teacher_cache=_teacher_cache(bench))
    check_names(bench)
    check_machine(bench)
    train, held_out = bench.training_windows(out)
    if not bench.recovery_settings.needs_teacher:
        bench.let_go_of_source()
    student = bench.load(place, str(folded))
    if student.offloaded:
        raise FoldGPTError(
            f"{folded} does not fit in the memory that is free (or allowed by max_memory_gb); it cannot be trained "
            "from elsewhere"
        )
    if not _same_ids(bench.tokenizer, student.tokenizer):
        raise UsageError(
            f"{folded} has another tokenizer than {recipe.model}, so it cannot learn from its predictions. "
            f"Give the model that it was folded from ({plan.source.model}) as teacher."
        )
    check_trainable(student.model)
    teacher = bench.source.model if bench.recovery_settings.needs_teacher else None
    if teacher is not None and bench.source.offloaded:
        raise FoldGPTError(
            f"{recipe.model} does not fit in the memory that is free (or allowed by max_memory_gb) beside {folded}; "
            "recovery needs both. Load them in 16 bits (dtype), or take a larger machine"
        )
    # What folding said of its fits holds for this model too.
    notes = {name: read_json(folded / name) for name in (COMPENSATION, SHARING) if (folded / name).is_file()}
    # The plan goes with it.
    notes |= known_history(folded, with_plan=False).notes
    result = recover(
        student.model,
        teacher,
        plan,
        train,
        held_out,
        bench.recovery_settings,
        out,
        tokenizer=student.tokenizer,
        notes=notes,
        teacher_cache=_teacher_cache(bench),
        report_to=section.report_to,
        replace=replace,
        keep_work=keep,
        save_dtype=bench.save_dtype(folded),
        text={
            "texts": [absolute(text) for text in recipe.training_texts],
            "context": section.context,
            "num_held_out": section.held_out_tokens,
            "separate_documents": section.separate_documents,
            "seed": recipe.seed,
        },
    )
    if not keep:
        drop_recovery_work(bench, out)
    return result


def _teacher_cache(bench: Workbench) -> Path | None:
    """Where the teacher's states are kept, if they are; what the rows of a comparison have in common keeps them."""
    named = bench.recipe.recover.teacher_cache
    if named:
        return from_home(named)
    return None if bench.common is None else bench.common / "teacher"


def check_recovery(bench: Workbench, out: Path) -> None:
    """What `make_recovered` would refuse, before the search and not behind it: of models and texts as they are.

    Args:
        bench: the inputs.
        out: where the recovered model will be.

    Raises:
        UnsupportedModelError: the model is quantised or in float16, and so will the folded one be.
        FoldGPTError: a text cannot be read or is too short, or the context is longer than the model's.
    """
    if bench.common is None:  # the rows of a comparison have a place each, and this one is of them all
        check_apart(out, teacher_cache=_teacher_cache(bench))
    check_trainable(bench.source.model)
    bench.training_windows(out)


def drop_recovery_work(bench: Workbench, out: Path) -> None:
    """Remove what a recovery goes on from: its checkpoints, and its windows where no other recovery has them as well.

    Args:
        bench: its inputs.
        out: where the recovered model is.
    """
    remove_work(work_beside(out))
    if bench.common is None:
        shutil.rmtree(bench.training_folder(out), ignore_errors=True)


def make_source_evaluation(bench: Workbench) -> Evaluation:
    """Measure the recipe's model by itself, but for its speed: that means something only beside another's."""
    return evaluate(
        Subject("source", bench.source.model, bench.place, bench.source.tokenizer),
        **_tests(bench),
        speed=False,
        memory=bench.recipe.evaluate.memory,
        num_generations=_num_generations(bench),
    )


def make_evaluation_before_recovery(bench: Workbench, folded: Path) -> Evaluation:
    """Measure what a folded model predicts before it is trained: what the training is worth is seen beside it."""
    model = bench.load(folded, str(folded))
    return evaluate(Subject("folded", model.model, folded, model.tokenizer), **_tests(bench), speed=False, memory=False)


def _tests(bench: Workbench) -> dict[str, Any]:
    """What `evaluate` measures predictions on, whichever model it is."""
    return {
        "windows": bench.test,
        "text": next(iter(bench.tests), None),
        "further_windows": bench.further_tests,
        "tasks": bench.tasks,
        "seed": bench.recipe.seed,
    }


def _num_generations(bench: Workbench) -> int:
    return bench.recipe.evaluate.generations if bench.test is not None else 0


def make_evaluation(
    bench: Workbench,
    folded: str | Path,
    *,
    compare: bool = True,
    source: Measured | None = None,
    before_recovery: Measured | None = None,
) -> Evaluation:
    """Measure a model, beside the recipe's unless that is the very one.

    Args:
        bench: the inputs; its model is the baseline.
        folded: the model to measure, usually a saved folded one.
        compare: measure the baseline too, and give ratios.
        source: what `make_source_evaluation` measured of the baseline; it is not measured again.
        before_recovery: what `make_evaluation_before_recovery` measured.
    """
    recipe, section = bench.recipe, bench.recipe.evaluate
    # The model itself, measured alone, may be of a revision of its own.
    place = bench.place if not compare and str(folded) == recipe.model else resolve(str(folded))
    check_tests(bench)
    if compare:
        check_tested_contexts(Workbench(recipe.model_copy(update={"model": str(place), "revision": None})))
    measured = bench.load(place, str(folded))
    reused = reused_texts(section.texts, known_history(place).uses)
    if bench.test is not None:
        _check_comparable(bench.tokenizer, measured.tokenizer, bench.recipe.model, str(folded))
    speed = section.speed
    if speed and (measured.offloaded or (compare and bench.source.offloaded)):
        note("without speed: there is not enough memory for both models, and bringing weights would be timed as well")
        speed = False
    baseline = None
    if compare and (source is None or speed):
        baseline = Subject("source", bench.source.model, bench.place, bench.source.tokenizer)
    return evaluate(
        Subject(_what_is(place), measured.model, place, measured.tokenizer),
        baseline,
        **_tests(bench),
        speed=speed,
        memory=section.memory,
        num_generations=_num_generations(bench),
        known=source,
        reused=reused,
        before_recovery=before_recovery,
    )


def _what_is(place: Path) -> str:
    """What tables call the model of a folder."""
    return "recovered" if (place / RECOVERY).is_file() else "folded" if (place / PLAN).is_file() else "model"


def _same_ids(tokenizer: Any, other: Any) -> bool:
    """Whether two tokenizers number words alike; if not, one model's windows mean nothing to the other."""
    ids, others = (each(_PROBE, add_special_tokens=False)["input_ids"] for each in (tokenizer, other))
    return bool(ids == others)


def _check_comparable(tokenizer: Any, other: Any, name: str, other_name: str) -> None:
    """Refuse to measure models side by side whose tokenizers number words differently.

    Raises:
        UsageError: they do; perplexities per token could not be compared either.
    """
    if not _same_ids(tokenizer, other):
        raise UsageError(
            f"{other_name} has another tokenizer than {name}, so perplexities and generations on the same tokens "
            "cannot be compared. Measure each by itself, without a baseline."
        )


def read_analysis(path: Path) -> Analysis:
    """Read an analysis made before.

    Args:
        path: the file, or a run folder that holds it.

    Raises:
        ArtifactError: it is not an analysis.
    """
    file = path / ANALYSIS if path.is_dir() else path
    try:
        return Analysis.from_json_dict(read_json(file, "analysis"))
    except ArtifactError as error:
        raise ArtifactError(str(error) if str(file) in str(error) else f"{file}: {error}") from None


def check_analysis(analysis: Analysis, bench: Workbench, place: Path) -> None:
    """Refuse an analysis of another model.

    Args:
        analysis: what `read_analysis` gave.
        bench: whose model it must be of.
        place: where it lies, for the error message.

    Raises:
        ArtifactError: it is of another model.
    """
    if analysis.source is not None and analysis.source.fingerprint != bench.fingerprint:
        raise ArtifactError(
            f"{place} is an analysis of another model ({analysis.source.spec}), not of {bench.recipe.model}"
        )


def draw(analysis: Analysis | None, plan: FoldPlan | None, folder: Path) -> list[Path]:
    """Draw what there is into a folder, as PNG and SVG; returns the PNGs."""
    from foldgpt.figures import draw_gates, draw_plan, draw_redundancy, draw_similarity  # matplotlib takes a second

    drawn: list[Path] = []
    if analysis is not None:
        drawn.append(draw_redundancy(analysis, folder / "redundancy")[0])
        drawn.append(draw_similarity(analysis, folder / "similarity")[0])
    if plan is not None:
        bi = None if analysis is None else analysis.bi
        drawn.append(draw_plan(plan, folder / "plan", bi=bi)[0])
        trace = plan.origin.get("report", {}).get("trace")
        if trace and plan.origin.get("selector") == "gates":
            num_units, num_blocks = len(trace[0]["keep"]), plan.source.num_blocks
            names = unit_names(num_units, num_blocks)
            what = "block" if num_units == num_blocks else "sublayer"
            drawn.append(draw_gates(trace, closed_units(plan, num_units), folder / "gates", names, what)[0])
    return drawn

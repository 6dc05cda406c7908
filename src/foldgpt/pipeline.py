"""The whole story: from a model and some text to a smaller, verified and measured model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldgpt.analysis import Analysis
from foldgpt.artifacts import hash_of, read_json, write_json
from foldgpt.checks import check_inputs, check_machine, check_plan, say_what_is_idle
from foldgpt.environment import describe_environment
from foldgpt.evaluation import Evaluation
from foldgpt.plan import FoldPlan
from foldgpt.planning import drop_search, make_plan, make_selection
from foldgpt.recipe import Recipe
from foldgpt.recovery import check_plan_suits
from foldgpt.report import CARD, REPORT, build_report, write_model_card
from foldgpt.run_folder import (
    ANALYSIS,
    ANALYSIS_CHECKPOINT,
    BEFORE_RECOVERY,
    ENVIRONMENT,
    EVALUATION,
    FIGURES,
    FOLDED,
    PLAN,
    RECOVERED,
    SEARCH_CHECKPOINT,
    SELECTION,
    SHARING_CHECKPOINT,
    SOURCE,
    RunFolder,
    open_run,
)
from foldgpt.selection import MEASURED, Selection, number_to_remove
from foldgpt.steps import (
    check_recovery,
    draw,
    drop_recovery_work,
    make_analysis,
    make_evaluation,
    make_evaluation_before_recovery,
    make_folded,
    make_recovered,
    make_source_evaluation,
)
from foldgpt.workbench import Workbench


@dataclass(frozen=True)
class Result:
    """What a run made, as read back from its folder."""

    path: Path
    """The run folder."""
    model: Path
    """The folded model, recovered if the recipe asks for it."""
    analysis: Analysis
    plan: FoldPlan
    evaluation: Evaluation

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.path / REPORT

    @property
    def figures(self) -> list[Path]:
        """The pictures, as PNG; an SVG of the same name lies beside each."""
        return sorted((self.path / FIGURES).glob("*.png"))


def run(recipe: Recipe, out: str | Path, *, overwrite: bool = False) -> Result:
    """Run a recipe: analyse, plan, fold, verify, measure, draw.

    Each stage writes its artefact into the run folder when it is complete. A run that was stopped goes on where
    it was, and a stage whose inputs have not changed is not run again.

    Args:
        recipe: what to do.
        out: the run folder.
        overwrite: take over a folder that holds a run of another recipe.

    Raises:
        FoldGPTError: one of its kinds, with a message that names what is wrong; finished stages are kept.
    """
    bench = Workbench(recipe)
    say_what_is_idle(recipe)
    with open_run(out, recipe, overwrite=overwrite) as folder:
        return carry_out(folder, bench)


def carry_out(folder: RunFolder, bench: Workbench, *, before_recovery: bool = True) -> Result:
    """Run the recipe of a workbench in an open run folder; see `run`.

    Args:
        folder: the run folder.
        bench: the inputs.
        before_recovery: where the recipe trains, measure the folded model as well.
    """
    check_plan(bench)
    if not folder.is_finished:
        # What stands may be looked at on any machine.
        check_machine(bench)
    check_inputs(bench)
    if bench.recipe.recover.num_tokens and not is_recovered(folder, bench):
        check_recovery(bench, folder.path / RECOVERED)
    analysis, plan = make_up_plan(folder, bench)
    if bench.recipe.recover.num_tokens:
        check_plan_suits(plan, bench.recovery_settings)
    _fold_stage(folder, bench, plan)
    source = _source_stage(folder, bench)
    before = _before_recovery_stage(folder, bench) if before_recovery else None
    final = _recovery_stage(folder, bench)
    evaluation = _evaluation_stage(folder, bench, final, source, before)
    _figures_stage(folder, analysis, plan)
    _report_stage(folder, bench, final, evaluation)
    return Result(folder.path, folder.path / final, analysis, plan, evaluation)


def make_up_plan(folder: RunFolder, bench: Workbench) -> tuple[Analysis, FoldPlan]:
    """The first half of a run: what is redundant, and what is to be cut."""
    analysis = _analysis_stage(folder, bench)
    return analysis, _plan_stage(folder, bench, analysis, _selection_stage(folder, bench, analysis))


def _analysis_stage(folder: RunFolder, bench: Workbench) -> Analysis:
    path = folder.path / ANALYSIS
    checkpoint = folder.path / ANALYSIS_CHECKPOINT
    analysis = folder.stage(
        "analysis",
        {"model": bench.fingerprint, "windows": bench.calibration.fingerprint, **bench.numerics},
        [ANALYSIS],
        lambda: write_json(path, make_analysis(bench, checkpoint).to_json_dict()),
        lambda: Analysis.from_json_dict(read_json(path, "analysis")),
    )
    # Only now: a stage that the ledger does not know of is made again.
    checkpoint.unlink(missing_ok=True)
    return analysis


def _selection_stage(folder: RunFolder, bench: Workbench, analysis: Analysis) -> Selection:
    """The search, apart from what is shared: another way to share does not repeat it."""
    path = folder.path / SELECTION
    recipe = bench.recipe
    checkpoint = folder.path / SEARCH_CHECKPOINT
    inputs = {
        "analysis": _measures(analysis),
        "fingerprint": bench.fingerprint,
        "windows": bench.calibration.fingerprint,
        "select": _asked(bench),
        "compensate": recipe.compensate.method,
        "size": recipe.share.size,
        "seed": recipe.seed,
    }
    selection = folder.stage(
        "selection",
        inputs,
        [SELECTION],
        lambda: write_json(path, make_selection(bench, analysis, checkpoint).to_json_dict()),
        lambda: Selection.from_json_dict(read_json(path, "selection")),
    )
    # Only now, as that of the analysis.
    drop_search(checkpoint)
    return selection


def _asked(bench: Workbench) -> dict[str, Any]:
    """What is asked of the selector, however it is written: another way to say the same repeats no search."""
    section, num_blocks = bench.recipe.select, bench.text_config.num_hidden_layers
    asked = section.model_dump(mode="json")
    if section.target is None:
        number = number_to_remove(num_blocks, remove=section.remove, ratio=section.remove_ratio)
        asked |= {"remove": number, "remove_ratio": None}
    # What others chose stands whatever it was measured on, which its report says.
    measures = section.method in MEASURED
    return asked | {
        "num_tokens": bench.recipe.search_tokens if measures else None,
        "copies": section.copies if measures else None,
    }


def _plan_stage(folder: RunFolder, bench: Workbench, analysis: Analysis, selection: Selection) -> FoldPlan:
    path = folder.path / PLAN
    checkpoint = folder.path / SHARING_CHECKPOINT
    recipe = bench.recipe
    inputs = {
        "selection": hash_of(selection.to_json_dict()),
        "analysis": _measures(analysis),
        "fingerprint": bench.fingerprint,
        "windows": bench.calibration.fingerprint,
        # Folding reads them from where the plan says they are.
        "texts": list(recipe.calibration.texts),
        "compensate": recipe.compensate.model_dump(mode="json"),
        "share": recipe.share.model_dump(mode="json"),
        # The windows on which the best donors are measured.
        "num_tokens": recipe.search_tokens if recipe.share.donor == "best" else None,
        "model": recipe.model,
        "seed": recipe.seed,
    }
    plan = folder.stage(
        "plan",
        inputs,
        [PLAN],
        lambda: make_plan(bench, selection, analysis, checkpoint).save(path),
        lambda: FoldPlan.load(path),
    )
    # Only now, as that of the analysis.
    checkpoint.unlink(missing_ok=True)
    return plan


def _measures(analysis: Analysis) -> str:
    """Identity of an analysis without the time it took and where its texts lie."""
    values = {name: value for name, value in analysis.to_json_dict().items() if name != "seconds"}
    if analysis.calibration is not None:
        values["calibration"] = analysis.calibration.model_dump(mode="json", exclude={"specs"})
    return hash_of(values)


def _fold_stage(folder: RunFolder, bench: Workbench, plan: FoldPlan) -> None:
    path = folder.path / FOLDED
    inputs = {
        "model": bench.fingerprint,
        "tokenizer": bench.companions,
        "plan": hash_of(plan.to_json_dict()),
        "save_dtype": bench.recipe.save_dtype,
        **bench.numerics,
    }
    folder.stage("fold", inputs, [FOLDED], lambda: make_folded(bench, plan, path, replace=True), lambda: None)


def _recovery_stage(folder: RunFolder, bench: Workbench) -> str:
    """Train the folded model if the recipe asks for it; returns the name of the folder of the final model."""
    out = folder.path / RECOVERED
    if not bench.recipe.recover.num_tokens:
        folder.drop("recovery")
        drop_recovery_work(bench, out)
        return FOLDED
    folder.stage(
        "recovery",
        _recovery_inputs(folder, bench),
        [RECOVERED],
        lambda: make_recovered(bench, folder.path / FOLDED, out, replace=True, keep=True),
        lambda: None,
    )
    # Only now, as that of the analysis.
    drop_recovery_work(bench, out)
    return RECOVERED


def is_recovered(folder: RunFolder, bench: Workbench) -> bool:
    """Whether the recovery stands for the folded model that is there, and so for the text that it trains on."""
    return folder.inputs_of("fold") is not None and folder.stands(
        "recovery", _recovery_inputs(folder, bench), [RECOVERED]
    )


#: Of the section `recover`, what changes nothing or is taken as it is meant.
_HOW_IT_IS_WRITTEN = {"teacher_cache", "report_to", "texts", "settings", "minutes"}


def _recovery_inputs(folder: RunFolder, bench: Workbench) -> dict[str, Any]:
    recipe = bench.recipe
    return {
        "model": bench.fingerprint,
        "folded": folder.key_of("fold"),
        "tokenizer": bench.companions,
        "texts": bench.recovery_texts,
        # Who is told changes nothing in the result, and what is kept beside nothing but its rounding; no more does it
        # matter how the settings are written.
        "recover": recipe.recover.model_dump(mode="json", exclude=_HOW_IT_IS_WRITTEN),
        "settings": {**bench.recovery_settings.identity(), "minutes": bench.recovery_settings.minutes},
        "seed": recipe.seed,
        "save_dtype": recipe.save_dtype,
        **bench.numerics,
    }


def _source_stage(folder: RunFolder, bench: Workbench) -> Evaluation:
    """The source by itself: it does not change with the plan."""
    path = folder.path / SOURCE
    return folder.stage(
        "source",
        _measuring(bench, without=("speed",)),
        [SOURCE],
        lambda: write_json(path, make_source_evaluation(bench).to_dict()),
        lambda: Evaluation.load(path),
    )


def _before_recovery_stage(folder: RunFolder, bench: Workbench) -> Evaluation | None:
    """What the folded model predicts before it is trained; None where it is not, or nothing is measured."""
    path = folder.path / BEFORE_RECOVERY
    section = bench.recipe.evaluate
    if not bench.recipe.recover.num_tokens or not (section.texts or section.tasks):
        folder.drop("before recovery")
        return None
    return folder.stage(
        "before recovery",
        {**_measuring(bench, without=("speed", "memory", "generations")), "folded": folder.key_of("fold")},
        [BEFORE_RECOVERY],
        lambda: write_json(path, make_evaluation_before_recovery(bench, folder.path / FOLDED).to_dict()),
        lambda: Evaluation.load(path),
    )


def _evaluation_stage(
    folder: RunFolder, bench: Workbench, final: str, source: Evaluation, before: Evaluation | None
) -> Evaluation:
    path = folder.path / EVALUATION

    def make() -> None:
        evaluation = make_evaluation(
            bench,
            folder.path / final,
            source=source.folded,
            before_recovery=None if before is None else before.folded,
        )
        write_json(path, evaluation.to_dict())
        # With the measurements: a later call on another machine does not make them its own.
        write_json(folder.path / ENVIRONMENT, describe_environment())

    inputs = {
        **_measuring(bench),
        "source": folder.key_of("source"),
        "folded": folder.key_of("fold" if final == FOLDED else "recovery"),
        "before recovery": None if before is None else folder.key_of("before recovery"),
    }
    return folder.stage(
        "evaluation",
        inputs,
        [EVALUATION, ENVIRONMENT],
        make,
        lambda: Evaluation.load(path),
    )


def _measuring(bench: Workbench, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """What decides how a model is measured, and beside which.

    Args:
        bench: the inputs.
        without: keys of `evaluate` that say nothing of this measurement.
    """
    return {
        "model": bench.fingerprint,
        "tokenizer": bench.companions,
        "windows": [windows.fingerprint for windows in bench.tests.values()],
        "evaluate": bench.recipe.evaluate.model_dump(mode="json", exclude=set(without)),
        "tasks": None if bench.tasks is None else bench.tasks.fingerprint,
        "seed": bench.recipe.seed,
        **bench.numerics,
    }


def _report_stage(folder: RunFolder, bench: Workbench, final: str, evaluation: Evaluation) -> None:
    """The page of the run, and the card of the model."""

    recipe = bench.recipe

    def make() -> None:
        write_model_card(folder.path / final, evaluation=evaluation, source=bench.place)
        build_report(folder.path)

    inputs = {
        "plan": folder.key_of("plan"),
        "evaluation": folder.key_of("evaluation"),
        # The page shows it, with what changes no other stage.
        "recipe": recipe.model_dump(mode="json"),
    }
    folder.stage("report", inputs, [REPORT, f"{final}/{CARD}"], make, lambda: None)


def _figures_stage(folder: RunFolder, analysis: Analysis, plan: FoldPlan) -> None:
    folder.stage(
        "figures",
        {"analysis": _measures(analysis), "plan": hash_of(plan.to_json_dict())},
        [FIGURES],
        lambda: draw(analysis, plan, folder.path / FIGURES),
        lambda: None,
    )

"""The whole story: from a model and some text to a smaller, verified and measured model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from foldgpt.analysis import Analysis, CalibrationIdentity, SourceIdentity, analyze
from foldgpt.artifacts import hash_of, read_json, write_json
from foldgpt.compensation import Compensated, compensate_, why_not
from foldgpt.corpus import Windows, calibration_windows, evaluation_windows
from foldgpt.environment import describe_environment
from foldgpt.errors import ArtifactError, FoldGPTError, PlanError, UsageError, did_you_mean
from foldgpt.evaluation import Evaluation, Subject, Suite, evaluate, load_suite
from foldgpt.families import Decoder, decoder_of
from foldgpt.folding import Verification, fold_, predicted_parameters, save_folded, source_model_of
from foldgpt.plan import Compensation, FoldPlan
from foldgpt.progress import note
from foldgpt.recipe import Recipe
from foldgpt.recovery import RecoveryResult, RecoverySettings, packed_windows, recover
from foldgpt.report import REPORT, build_report, write_model_card
from foldgpt.run_folder import RunFolder, open_run
from foldgpt.selection import MEASURED, SELECTORS, Request, number_to_remove, select
from foldgpt.sharing import adjacent_groups
from foldgpt.sources import Source, load_source, load_tokenizer, model_fingerprint, resolve

ANALYSIS, PLAN, EVALUATION = "analysis.json", "plan.json", "evaluation.json"
FOLDED, RECOVERED = "folded", "recovered"
ENVIRONMENT, FIGURES = "environment.json", "figures"


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
    with open_run(out, recipe, overwrite=overwrite) as folder:
        write_json(folder.path / ENVIRONMENT, describe_environment())
        analysis = _analysis_stage(folder, bench)
        plan = _plan_stage(folder, bench, analysis)
        _fold_stage(folder, bench, plan)
        final = _recovery_stage(folder, bench)
        evaluation = _evaluation_stage(folder, bench, final)
        _figures_stage(folder, analysis, plan)
        _report_stage(folder, bench, final, evaluation)
        return Result(folder.path, folder.path / final, analysis, plan, evaluation)


class Workbench:
    """The inputs of a recipe, each made when a stage first needs it."""

    def __init__(self, recipe: Recipe) -> None:
        """Take a recipe; a name in it that only the code can check is checked now, before anything is loaded.

        Raises:
            UsageError: the selector or a setting of the recovery does not exist.
        """
        method = recipe.select.method
        if method not in SELECTORS:
            raise UsageError(f"unknown selector {method!r}.{did_you_mean(method, SELECTORS)}")
        self.recipe = recipe
        self.recovery_settings = _recovery_settings(recipe.recover.settings)

    @cached_property
    def place(self) -> Path:
        """The model's files on this machine."""
        return resolve(self.recipe.model, revision=self.recipe.revision)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the model's weights and config."""
        return model_fingerprint(self.place)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(str(self.place), trust_remote_code=self.recipe.trust_remote_code)

    @cached_property
    def calibration(self) -> Windows:
        """Windows on which redundancy is measured."""
        section = self.recipe.calibration
        return calibration_windows(
            section.texts,
            self.tokenizer,
            context=section.context,
            num_tokens=section.num_tokens,
            seed=self.recipe.seed,
        )

    @cached_property
    def calibration_identity(self) -> CalibrationIdentity:
        """What is recorded of the calibration text."""
        return CalibrationIdentity(protocol=self.calibration.protocol, fingerprint=self.calibration.fingerprint)

    @property
    def compensation(self) -> Compensation:
        """What a plan records, so that folding can compensate on the calibration text."""
        section = self.recipe.calibration
        return Compensation(
            texts=tuple(section.texts),
            context=section.context,
            num_tokens=section.num_tokens,
            seed=self.recipe.seed,
            fingerprint=self.calibration.fingerprint,
        )

    def selection_ids(self) -> Tensor:
        """Calibration windows for selectors that measure, [W, T]: the first ones; they are in random order."""
        num_windows = max(1, self.recipe.select.num_tokens // self.recipe.calibration.context)
        return self.calibration.ids[:num_windows]

    @cached_property
    def test(self) -> Windows | None:
        """Windows on which perplexity is measured; None if the recipe asks for none."""
        section = self.recipe.evaluate
        if not section.texts:
            return None
        return evaluation_windows(
            section.texts,
            self.tokenizer,
            context=section.context,
            stride=section.stride,
            max_windows=section.max_windows,
        )

    @cached_property
    def tasks(self) -> Suite | None:
        """Multiple-choice tasks; None if the recipe asks for none."""
        section = self.recipe.evaluate
        if not section.tasks:
            return None
        return load_suite(section.tasks, data_dir=section.data_dir, limit=section.limit)

    @cached_property
    def source(self) -> Source:
        """The loaded model, untouched."""
        recipe = self.recipe
        note(f"loading {recipe.model}")
        return load_source(
            str(self.place),
            dtype=recipe.dtype,
            device=recipe.device,
            max_memory_gb=recipe.max_memory_gb,
            trust_remote_code=recipe.trust_remote_code,
        )

    def take_source(self) -> Source:
        """Hand the loaded model over to be changed in place; whoever needs the source again loads it anew.

        Raises:
            FoldGPTError: the model does not fit in memory.
        """
        source = self.source
        if source.offloaded:
            raise FoldGPTError(
                f"{self.recipe.model} does not fit in the memory that is free (or allowed by max_memory_gb). Analysis "
                "runs from disk, but folding needs the whole model in memory."
            )
        del self.source
        return source

    @property
    def numerics(self) -> dict[str, Any]:
        """What, beside model and text, changes the numbers a model computes."""
        return {"dtype": self.recipe.dtype, "device": self.recipe.device}


def _recovery_settings(values: Mapping[str, Any]) -> RecoverySettings:
    known = {field.name for field in fields(RecoverySettings)}
    for name in values:
        if name not in known:
            raise UsageError(f"recovery has no setting {name!r}.{did_you_mean(name, known)}")
    return RecoverySettings(**values)


def make_analysis(bench: Workbench, checkpoint: Path | None = None) -> Analysis:
    """Measure the redundancy of the recipe's model on its calibration text."""
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


def make_plan(bench: Workbench, analysis: Analysis | None, checkpoint: Path | None = None) -> FoldPlan:
    """Decide what is removed and shared.

    Args:
        bench: the inputs.
        analysis: the redundancy analysis; None only for selectors in `ANALYSIS_FREE`.
        checkpoint: where a long search keeps its progress.
    """
    recipe, section = bench.recipe, bench.recipe.select
    source = bench.source
    decoder = decoder_of(source.model)
    num_blocks = len(decoder.blocks)
    compensation = _compensation(bench)
    request = Request(
        num_blocks=num_blocks,
        num_remove=number_to_remove(num_blocks, remove=section.remove, ratio=section.remove_ratio),
        analysis=analysis,
        seed=recipe.seed,
        objective=section.objective,
        # A set is judged by what it costs as it will be folded.
        compensate=compensation is not None and not section.sublayers,
        sublayers=section.sublayers,
        checkpoint=checkpoint,
        options=section.options,
    )
    origin: dict[str, Any] = {"seed": recipe.seed}
    if section.method in MEASURED:
        ids_WT = bench.selection_ids()
        request = replace(request, model=source.model, ids_WT=ids_WT)
        origin["calibration"] = bench.calibration_identity.model_dump(mode="json")
    elif analysis is not None and analysis.calibration is not None:
        origin["calibration"] = analysis.calibration.model_dump(mode="json")
    selection = select(section.method, request)
    origin |= {
        "selector": selection.method,
        "scores": None if selection.scores is None else list(selection.scores),
        "removal_order": list(selection.order),
        "report": dict(selection.report),
    }
    removes_anything = selection.removed or selection.removed_attention or selection.removed_mlp
    return FoldPlan.create(
        source_model_of(source.model, name=recipe.model, revision=source.revision),
        removed=selection.removed,
        removed_attention=selection.removed_attention,
        removed_mlp=selection.removed_mlp,
        groups=_groups(recipe, decoder, selection.removed),
        compensation=compensation if removes_anything else None,
        origin=origin,
    )


def _compensation(bench: Workbench) -> Compensation | None:
    """What the plan says of compensation; nothing for a model whose blocks cannot be compensated."""
    if bench.recipe.compensate.method == "none":
        return None
    reason = why_not(bench.source.model)
    if reason is not None:
        note(f"without compensation: {reason}")
        return None
    return bench.compensation


def _groups(recipe: Recipe, decoder: Decoder, removed: tuple[int, ...]) -> Any:
    if recipe.share.method == "none":
        return ()
    kept = [index for index in range(len(decoder.blocks)) if index not in removed]
    return adjacent_groups(
        decoder,
        kept,
        size=recipe.share.group_size,
        sublayers=tuple(recipe.share.sublayers),
        donor=recipe.share.donor,
    )


def make_folded(bench: Workbench, plan: FoldPlan, folder: Path, *, replace: bool = False) -> Verification:
    """Fold the recipe's model by a plan and save it, verified."""
    source = bench.take_source()
    expected = predicted_parameters(source.model, plan)
    notes: dict[str, Any] = {}
    if plan.compensation is not None:
        compensated = _compensate_(source.model, plan, plan.compensation, source.tokenizer)
        notes["compensation.json"] = compensated.to_json_dict()
    fold_(source.model, plan)
    note("saving and verifying the folded model")
    return save_folded(
        source.model,
        plan,
        folder,
        tokenizer=source.tokenizer,
        expected_parameters=expected,
        notes=notes,
        replace=replace,
    )


def _compensate_(model: Any, plan: FoldPlan, compensation: Compensation, tokenizer: Any) -> Compensated:
    """Let kept blocks take over what the removed ones did, as the plan says."""
    windows = calibration_windows(
        compensation.texts,
        tokenizer,
        context=compensation.context,
        num_tokens=compensation.num_tokens,
        seed=compensation.seed,
    )
    if windows.fingerprint != compensation.fingerprint:
        raise PlanError(
            f"the calibration text of the plan ({', '.join(compensation.texts)}) is not what it was when the plan was "
            "made. Make the plan again, or set its compensation to null."
        )
    note("compensating for the removed blocks")
    return compensate_(
        model,
        plan,
        windows.ids,
        features=compensation.features,
        ridge=compensation.ridge,
        rounds=compensation.rounds,
    )


def make_recovered(bench: Workbench, folded: Path, out: Path, *, replace: bool = False) -> RecoveryResult:
    """Train a folded model against the recipe's, and save it, verified.

    Args:
        bench: the inputs; its model is the teacher.
        folded: the folded model; it holds its plan.
        out: where the recovered one is saved.
        replace: replace an existing `out`.
    """
    recipe, section = bench.recipe, bench.recipe.recover
    plan = FoldPlan.load(folded)
    note(f"loading {folded}")
    student = load_source(
        str(folded), dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code
    )
    windows = out.parent / f".{out.name}.windows"
    train, held_out = packed_windows(
        section.texts or recipe.calibration.texts,
        bench.tokenizer,
        windows,
        context=section.context,
        num_tokens=section.num_tokens,
        num_held_out=section.held_out_tokens,
        seed=recipe.seed,
    )
    result = recover(
        student.model,
        bench.source.model,
        plan,
        train,
        held_out,
        bench.recovery_settings,
        out,
        tokenizer=student.tokenizer,
        replace=replace,
    )
    shutil.rmtree(windows, ignore_errors=True)
    return result


def make_evaluation(bench: Workbench, folded: str | Path, *, compare: bool = True) -> Evaluation:
    """Measure a model, beside the recipe's unless that is the very one.

    Args:
        bench: the inputs; its model is the baseline.
        folded: the model to measure, usually a saved folded one.
        compare: measure the baseline too, and give ratios.
    """
    recipe, section = bench.recipe, bench.recipe.evaluate
    windows, tasks = bench.test, bench.tasks
    place = resolve(str(folded))
    note(f"loading {folded}")
    measured = load_source(
        str(place), dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code
    )
    baseline = Subject("source", bench.source.model, bench.place, bench.source.tokenizer) if compare else None
    return evaluate(
        Subject("folded" if compare else "model", measured.model, place, measured.tokenizer),
        baseline,
        windows=windows,
        speed=section.speed,
        memory=section.memory,
        tasks=tasks,
        num_generations=section.generations if windows is not None else 0,
        seed=recipe.seed,
    )


def read_analysis(path: Path, bench: Workbench) -> Analysis:
    """Read an analysis made before, and refuse one of another model.

    Args:
        path: the file, or a run folder that holds it.
        bench: whose model it must be of.

    Raises:
        ArtifactError: it is not an analysis, or one of another model.
    """
    path = path / ANALYSIS if path.is_dir() else path
    analysis = Analysis.from_json_dict(read_json(path, "analysis"))
    if analysis.source is not None and analysis.source.fingerprint != bench.fingerprint:
        raise ArtifactError(
            f"{path} is an analysis of another model ({analysis.source.spec}), not of {bench.recipe.model}"
        )
    return analysis


def _analysis_stage(folder: RunFolder, bench: Workbench) -> Analysis:
    path = folder.path / ANALYSIS
    return folder.stage(
        "analysis",
        {"model": bench.fingerprint, "windows": bench.calibration.fingerprint, **bench.numerics},
        [ANALYSIS],
        lambda: write_json(path, make_analysis(bench, folder.path / ".analysis-checkpoint.json").to_json_dict()),
        lambda: Analysis.from_json_dict(read_json(path, "analysis")),
    )


def _plan_stage(folder: RunFolder, bench: Workbench, analysis: Analysis) -> FoldPlan:
    path = folder.path / PLAN
    recipe = bench.recipe
    checkpoint = folder.path / ".search-checkpoint.json"
    inputs = {
        "analysis": _measures(analysis),
        "fingerprint": bench.fingerprint,
        "windows": bench.calibration.fingerprint,
        "select": recipe.select.model_dump(mode="json"),
        "compensate": recipe.compensate.model_dump(mode="json"),
        "share": recipe.share.model_dump(mode="json"),
        "model": recipe.model,
        "seed": recipe.seed,
    }
    return folder.stage(
        "plan",
        inputs,
        [PLAN],
        lambda: make_plan(bench, analysis, checkpoint).save(path),
        lambda: FoldPlan.load(path),
    )


def _measures(analysis: Analysis) -> str:
    """Identity of an analysis without the time it took."""
    return hash_of({name: value for name, value in analysis.to_json_dict().items() if name != "seconds"})


def _fold_stage(folder: RunFolder, bench: Workbench, plan: FoldPlan) -> None:
    path = folder.path / FOLDED
    inputs = {"model": bench.fingerprint, "plan": hash_of(plan.to_json_dict()), **bench.numerics}
    folder.stage("fold", inputs, [FOLDED], lambda: make_folded(bench, plan, path, replace=True), lambda: None)


def _recovery_stage(folder: RunFolder, bench: Workbench) -> str:
    """Train the folded model if the recipe asks for it; returns the name of the folder of the final model."""
    recipe = bench.recipe
    if not recipe.recover.num_tokens:
        return FOLDED
    inputs = {
        "model": bench.fingerprint,
        "folded": folder.key_of("fold"),
        "texts": recipe.recover.texts or recipe.calibration.texts,
        "recover": recipe.recover.model_dump(mode="json"),
        "seed": recipe.seed,
        **bench.numerics,
    }
    out = folder.path / RECOVERED
    folder.stage(
        "recovery",
        inputs,
        [RECOVERED],
        lambda: make_recovered(bench, folder.path / FOLDED, out, replace=True),
        lambda: None,
    )
    return RECOVERED


def _evaluation_stage(folder: RunFolder, bench: Workbench, final: str) -> Evaluation:
    path = folder.path / EVALUATION
    inputs = {
        "model": bench.fingerprint,
        "folded": folder.key_of("fold" if final == FOLDED else "recovery"),
        "windows": None if bench.test is None else bench.test.fingerprint,
        "evaluate": bench.recipe.evaluate.model_dump(mode="json"),
        "tasks": None if bench.tasks is None else bench.tasks.fingerprint,
        "seed": bench.recipe.seed,
        **bench.numerics,
    }
    return folder.stage(
        "evaluation",
        inputs,
        [EVALUATION],
        lambda: write_json(path, make_evaluation(bench, folder.path / final).to_dict()),
        lambda: Evaluation.load(path),
    )


def _report_stage(folder: RunFolder, bench: Workbench, final: str, evaluation: Evaluation) -> None:
    """The page of the run, and the card of the model."""

    def make() -> None:
        source = bench.place if bench.place.is_dir() else None
        write_model_card(folder.path / final, evaluation=evaluation, source=source)
        build_report(folder.path)

    inputs = {"plan": folder.key_of("plan"), "evaluation": folder.key_of("evaluation")}
    folder.stage("report", inputs, [REPORT], make, lambda: None)


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
            drawn.append(draw_gates(trace, _removed_units(plan), folder / "gates")[0])
    return drawn


def _removed_units(plan: FoldPlan) -> list[int]:
    """The removed units of a plan as the selectors number them: blocks, or each block's attention and MLP."""
    if not (plan.removed_attention or plan.removed_mlp):
        return list(plan.removed)
    attention = sorted({*plan.removed, *plan.removed_attention})
    mlp = sorted({*plan.removed, *plan.removed_mlp})
    return sorted([2 * block for block in attention] + [2 * block + 1 for block in mlp])


def _figures_stage(folder: RunFolder, analysis: Analysis, plan: FoldPlan) -> None:
    folder.stage(
        "figures",
        {"analysis": _measures(analysis), "plan": hash_of(plan.to_json_dict())},
        [FIGURES],
        lambda: draw(analysis, plan, folder.path / FIGURES),
        lambda: None,
    )

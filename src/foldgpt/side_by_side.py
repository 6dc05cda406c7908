"""Several methods on one model, each a run of its own, and one table of them all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from foldgpt.artifacts import read_json
from foldgpt.checks import check_inputs, check_machine, check_plan, say_what_is_idle
from foldgpt.comparison import Comparison, Finished, Row, Training, agreement_of, rows_of_recipe
from foldgpt.errors import ArtifactError, FoldGPTError, UsageError
from foldgpt.evaluation import Evaluation
from foldgpt.families import decoder_of
from foldgpt.folding import predicted_parameters
from foldgpt.formats import millions
from foldgpt.pipeline import carry_out, is_recovered, make_up_plan
from foldgpt.planning import expected_parameters
from foldgpt.progress import note
from foldgpt.recipe import Compare, Recipe
from foldgpt.report import write_comparison
from foldgpt.run_folder import AGREEMENT, ENVIRONMENT, ROWS, RunFolder, open_run
from foldgpt.selection import ANALYSIS_FREE
from foldgpt.steps import check_recovery
from foldgpt.tables import protocol_lines, reuse_lines, storage_lines_of_rows
from foldgpt.workbench import Workbench

#: Training windows and what the teacher says of them; removed once all rows stand.
_COMMON = ".common"
#: Stages that a method consists of; the others measure and draw.
_METHOD_STAGES = ("selection", "plan", "fold", "recovery")


def compare(recipe: Recipe, out: str | Path, *, overwrite: bool = False) -> Comparison:
    """Run every row of a recipe's comparison, and put them side by side.

    Each row is a run in a folder of its own below `out`/rows. What rows have in common is made once: the analysis,
    the source's measurements, a search for all rows that select alike, a folded model for its rows without and
    with recovery, the training windows and the teacher's states. A comparison that was stopped goes on where it was.

    All plans are made first. Rows whose blocks would hold more or fewer parameters than the reference row's are
    refused, unless the recipe says to mark them, before anything is folded or trained.

    Args:
        recipe: its `compare` section says which rows there are.
        out: the folder of the comparison; comparison.json, .csv, .md and .html are written there.
        overwrite: take over the folder of another comparison, once nothing is wrong with this one; what its rows made
            is kept where the inputs are the same.

    Raises:
        UsageError: the section is wrong, budgets are unequal, or a row's recovery has tokens for less than one step.
        ArtifactError: the folder holds another comparison, a run or something else, is in use, or cannot be written.
        FoldGPTError: a row failed; the message names it, and what is finished is kept.
    """
    rows = rows_of_recipe(recipe)
    bench = Workbench(recipe, common=Path(out) / _COMMON)
    say_what_is_idle(recipe)
    for row in rows:
        # Names that only the code can check are checked before anything is loaded.
        with named(row):
            Workbench(row.recipe)
    with open_run(out, recipe, overwrite=overwrite, comparison=True) as folder:
        check_machine(bench)
        check_inputs(bench)
        is_trained = True
        for row in rows:
            bench = bench.for_method(row.recipe)
            with named(row):
                check_plan(bench)
                is_trained = is_trained and (not row.recovered or _is_recovered(folder.path, row, bench))
        check_expected_budgets(rows, bench.source.model, recipe.compare)
        if not is_trained:
            bench = bench.for_method(recipe)
            check_recovery(bench, folder.path)
        # Before a row is: what its stages make is no longer what the comparison of before says.
        folder.hand_over()
        bench = _check_budgets(rows, folder.path, bench, recipe)
        finished = []
        for number, row in enumerate(rows, 1):
            note(f"row {number} of {len(rows)}: {row.title}")
            bench = bench.for_method(row.recipe)
            with named(row), _open_row(folder.path, row) as run:
                # The row without recovery is what the folded model does.
                result = carry_out(run, bench, before_recovery=False)
                seconds = _seconds(run, row.recipe)
            place = f"{ROWS}/{row.folder}"
            training = Training.load(result.model) if row.recovered else None
            finished.append(Finished(row.name, row.recovered, place, result.plan, result.evaluation, seconds, training))
        environments = {row.title: read_json(folder.path / ROWS / row.folder / ENVIRONMENT) for row in rows}
        environment = max(environments.values(), key=lambda each: str(each["date"]))
        comparison = Comparison.of(
            finished,
            recipe.compare,
            model=recipe.model,
            seed=recipe.seed,
            recovery_tokens=recipe.recover.num_tokens,
            protocol=[
                *_protocol([each.evaluation for each in finished]),
                *_reused([each.evaluation for each in finished]),
                *_elsewhere(environments, environment),
            ],
            environment=environment,
        )
        agreement = agreement_of(comparison)
        if agreement is not None:
            from foldgpt.figures import draw_agreement  # matplotlib takes a second

            draw_agreement(agreement, folder.path / AGREEMENT)
        write_comparison(comparison, folder.path)
        shutil.rmtree(folder.path / _COMMON, ignore_errors=True)
        return comparison


def _protocol(evaluations: Sequence[Evaluation]) -> list[str]:
    """How the rows were measured, with the source's values."""
    source = evaluations[0].baseline
    assert source is not None
    lines = protocol_lines(Evaluation(source, None, None), own="row").plain.splitlines()
    return [*lines, *storage_lines_of_rows(source, [evaluation.folded for evaluation in evaluations])]


def _reused(evaluations: Sequence[Evaluation]) -> list[str]:
    """Which texts some rows were calibrated or trained on as well, all rows together."""
    uses: dict[str, dict[str, None]] = {}
    for evaluation in evaluations:
        for text, names in (evaluation.folded.reused or {}).items():
            uses.setdefault(text, {}).update(dict.fromkeys(names))
    return reuse_lines({text: list(names) for text, names in uses.items()}, "these models")


def _elsewhere(environments: Mapping[str, Mapping[str, Any]], shown: Mapping[str, Any]) -> list[str]:
    """What to say where some rows were measured on another machine or with other versions than is shown."""
    alike = ("cpu", "gpu", "torch_threads", "torch", "transformers")
    others = [
        f"{name} ({each['cpu']}, {each['torch_threads']} threads, torch {each['torch']})"
        for name, each in environments.items()
        if any(each.get(key) != shown.get(key) for key in alike)
    ]
    return [f"Measured elsewhere, so that speeds do not compare: {', '.join(others)}."] if others else []


def _check_budgets(rows: Sequence[Row], folder: Path, bench: Workbench, recipe: Recipe) -> Workbench:
    """Make all plans and compare what they leave of the blocks; returns a workbench with what was made on the way."""
    sizes: dict[str, int] = {}
    for row in rows:
        if row.name in sizes:
            continue
        bench = bench.for_method(row.recipe)
        with named(row), _open_row(folder, row) as run:
            _, plan = make_up_plan(run, bench)
            model = bench.source.model
            sizes[row.name] = predicted_parameters(model, plan) - _outside_blocks(model)
    _check_equal(sizes, recipe.compare)
    return bench


def check_expected_budgets(rows: Sequence[Row], model: PreTrainedModel, section: Compare) -> None:
    """Compare what rows will leave of the blocks, of those of which that is known before they have a plan.

    Plans may take hours of search.

    Args:
        rows: the rows.
        model: the source; it may be on the meta device.
        section: which row is the reference, and whether others are refused.

    Raises:
        UsageError: budgets are unequal.
    """
    sizes: dict[str, int] = {}
    for row in rows:
        if row.name in sizes:
            continue
        with named(row):
            parameters = expected_parameters(row.recipe, model)
        if parameters is not None:
            sizes[row.name] = parameters - _outside_blocks(model)
    _check_equal(sizes, section)


def _check_equal(sizes: Mapping[str, int], section: Compare) -> None:
    """Refuse rows that are larger or smaller than the reference, unless they are to be marked.

    Args:
        sizes: name of each row whose size is known → parameters in its blocks.
        section: which row is the reference, and what to do.
    """
    if section.unequal_budgets != "refuse" or section.reference not in sizes:
        return
    reference = sizes[section.reference]
    gaps = {name: size / reference - 1 for name, size in sizes.items()}
    unequal = {name: gap for name, gap in gaps.items() if abs(gap) > section.budget_tolerance}
    if unequal:
        listed = "; ".join(f"{name} {100 * gap:+.1f} %" for name, gap in unequal.items())
        raise UsageError(
            f"unequal budgets: compared with {section.reference}, whose blocks hold {millions(reference)} parameters: "
            f"{listed}. Change how much these rows remove or share, raise compare.budget_tolerance, or mark such rows "
            "with unequal_budgets: flag."
        )


def _outside_blocks(model: PreTrainedModel) -> int:
    """Unique parameters that are in no block."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - sum(parameter.numel() for parameter in decoder_of(model).blocks.parameters())


def _seconds(run: RunFolder, recipe: Recipe) -> float:
    """How long the method took: what it reads, its search, folding and recovery.

    A stage loads the model if none before it did, so loading is part of it where it was made first.
    """
    stages = [name for name in _METHOD_STAGES if name in run.seconds]
    if recipe.select.method not in ANALYSIS_FREE:
        stages.append("analysis")
    return sum(run.seconds[name] for name in stages)


def _open_row(folder: Path, row: Row) -> AbstractContextManager[RunFolder]:
    # The comparison is locked, so nobody else works in its rows; a row of another recipe is an older version of it.
    return open_run(folder / ROWS / row.folder, row.recipe, overwrite=True, beside=folder / ROWS)


def _is_recovered(folder: Path, row: Row, bench: Workbench) -> bool:
    try:
        return is_recovered(RunFolder(folder / ROWS / row.folder), bench)
    except ArtifactError:
        # A damaged ledger: the row begins anew.
        return False


@contextmanager
def named(row: Row) -> Iterator[None]:
    """Let an error say which row it is of."""
    try:
        yield
    except FoldGPTError as error:
        raise type(error)(f"row {row.title!r}: {error}") from error

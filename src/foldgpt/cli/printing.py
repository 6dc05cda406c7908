"""Results on standard output: tables, paths, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldgpt.cli.standard_output import results, say

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from foldgpt.analysis import Analysis
    from foldgpt.comparison import Comparison
    from foldgpt.evaluation import Evaluation
    from foldgpt.plan import FoldPlan
    from foldgpt.recovery_result import RecoveryResult


#: Columns of redirected output, which has no width of its own, for running text.
_REDIRECTED = 120


def _console(width: int | None = None) -> Console:
    """A console that prints names as they are: brackets and colons in them are no markup."""
    from rich.console import Console

    return Console(width=width, file=results(), markup=False, emoji=False)


def _width() -> int:
    """Columns that a line may have."""
    console = _console()
    return console.width if console.is_terminal else _REDIRECTED


def print_shown(shown: RenderableType) -> None:
    """Print what rich can draw; a table whole, and in a terminal that is too narrow as several."""
    from rich.table import Table

    from foldgpt.cli.terminal import natural_width, split_to_width

    width = _width()
    if not isinstance(shown, Table):
        _console(width).print(shown)
        return
    for table in split_to_width(shown, width) if _console().is_terminal else [shown]:
        # Never less than the table needs: rich would leave out digits, a terminal breaks lines.
        _console(max(width, natural_width(table))).print(table)


def print_strip(plan: FoldPlan) -> None:
    """Print a plan as a strip of blocks."""
    from foldgpt.strip import plan_strip

    print_shown(plan_strip(plan, _width()))


def print_plan(plan: FoldPlan) -> None:
    """Print a plan as a strip of blocks, where it comes from, and what it was chosen among for a size."""
    from foldgpt.plan_lines import candidates_of, candidates_table, plan_lines

    print_strip(plan)
    print_shown(plan_lines(plan))
    if candidates_of(plan):
        print_shown(candidates_table(plan))


def print_fits(folder: Path) -> None:
    """Print what compensation and fits did to the model in a folder, or in the folder of a run, if anything."""
    from foldgpt.report.fits import compensation_of, sharing_of
    from foldgpt.run_folder import FOLDED
    from foldgpt.tables import compensation_line, sharing_line

    for record_of, line in ((compensation_of, compensation_line), (sharing_of, sharing_line)):
        record = record_of(folder) or record_of(folder / FOLDED)
        if record is not None:
            print_shown(line(record))


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the figures of a model, its tasks if there are any, and how all was measured."""
    from foldgpt.tables import comparison_table, protocol_lines, task_table

    print_shown(comparison_table(evaluation))
    if evaluation.folded.tasks:
        print_shown(task_table(evaluation))
    print_shown(protocol_lines(evaluation))


def print_target(plan: FoldPlan, evaluation: Evaluation) -> None:
    """Print whether what was measured is what the plan was to meet, where it was made for a target."""
    from foldgpt.tables import target_lines

    for line in target_lines(plan, evaluation):
        print_shown(line)


def print_generations(evaluation: Evaluation) -> None:
    """Print what the models wrote, if they were asked to."""
    from foldgpt.tables import generation_lines

    if evaluation.folded.generations:
        print_shown(generation_lines(evaluation))


def print_analysis(analysis: Analysis) -> None:
    """Print how redundant each block is, and what that was measured on."""
    from foldgpt.tables import analysis_lines, analysis_table

    print_shown(analysis_table(analysis))
    print_shown(analysis_lines(analysis))


def print_recovery(result: RecoveryResult) -> None:
    """Print what a recovery did."""
    from foldgpt.tables import recovery_lines

    print_shown(recovery_lines(result))


def print_comparison(comparison: Comparison, *, as_json: bool) -> None:
    """Print the tables of a comparison and how they were measured, or all of it as JSON."""
    from foldgpt.comparison import (
        agreement_of,
        agreement_table,
        difference_table,
        method_table,
        notes_of,
        task_accuracy_table,
    )

    if as_json:
        print_json(comparison.to_dict())
        return
    agreement = agreement_of(comparison)
    tables = [method_table(comparison), difference_table(comparison), task_accuracy_table(comparison)]
    for table in tables if agreement is None else [*tables, agreement_table(agreement)]:
        if table.row_count:
            print_shown(table)
    for line in notes_of(comparison):
        say(line)


def print_paths(paths: list[Path]) -> None:
    """Print what was written, a line each."""
    for path in paths:
        say(str(path))


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    json.dump(value, results(), indent=2, ensure_ascii=False)
    results().write("\n")

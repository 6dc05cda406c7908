"""What lies in a file or folder, read and printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldgpt.cli.printing import (
    print_analysis,
    print_comparison,
    print_evaluation,
    print_fits,
    print_generations,
    print_json,
    print_plan,
    print_recovery,
    print_target,
)
from foldgpt.cli.standard_output import say

if TYPE_CHECKING:
    from foldgpt.analysis import Analysis
    from foldgpt.comparison import Comparison
    from foldgpt.evaluation import Evaluation
    from foldgpt.plan import FoldPlan
    from foldgpt.recovery_result import RecoveryResult

    Written = FoldPlan | Analysis | Evaluation | RecoveryResult | Comparison

#: What can be shown of a file, and how.
_PRINTED: dict[str, Callable[[Any], None]] = {
    "plan": print_plan,
    "analysis": print_analysis,
    "recovery": print_recovery,
    "evaluation": print_evaluation,
}


def show_path(path: Path, *, as_json: bool = False) -> None:
    """Print what a file holds, or the folder of a model, a run or a comparison.

    Raises:
        ArtifactError: there is nothing to show, or it cannot be read.
        PlanError: a plan is not valid.
    """
    found: dict[str, Any] = dict(map(_read, _files_of(path) if path.is_dir() else [path]))
    if "comparison" in found:
        print_comparison(found["comparison"], as_json=as_json)
        return
    if as_json:
        print_json({name: _as_json(name, value) for name, value in found.items()})
        return
    for name, value in found.items():
        _PRINTED[name](value)
        if name == "plan" and path.is_dir():
            print_fits(path)
        if name == "evaluation" and "plan" in found:
            print_target(found["plan"], value)
        if name == "evaluation" and not path.is_dir():
            # Long, and on the page of a run.
            print_generations(value)
    if path.is_dir():
        _say_if_unfinished(path)


def _say_if_unfinished(folder: Path) -> None:
    """Say of a run that was stopped how far it is, and how it goes on: what is there may look like all of it."""
    from foldgpt.run_folder import LEDGER, RECIPE, RunFolder

    if not ((folder / LEDGER).is_file() and (folder / RECIPE).is_file()):
        return
    run = RunFolder(folder)
    if not run.is_finished:
        made = ", ".join(run.seconds) or "none"
        say(f"This run is not finished (stages that are done: {made}). To go on: {run.to_go_on}")


def _as_json(name: str, value: Any) -> Any:
    return value.to_dict() if name == "evaluation" else value.to_json_dict()


def _files_of(folder: Path) -> list[Path]:
    """What is shown of a comparison, a run, a folded or recovered model, or of what is there of them, in this order.

    Raises:
        ArtifactError: nothing of that is there.
    """
    from foldgpt.comparison import COMPARISON
    from foldgpt.errors import ArtifactError
    from foldgpt.recovery_result import RECOVERY
    from foldgpt.run_folder import ANALYSIS, EVALUATION, PLAN, RECOVERED, command_to_go_on

    if (folder / COMPARISON).is_file():
        return [folder / COMPARISON]
    # The analysis is a long table, and where there is a plan it is on the page of the run.
    first = folder / PLAN if (folder / PLAN).is_file() else folder / ANALYSIS
    files = [first, folder / RECOVERY, folder / RECOVERED / RECOVERY, folder / EVALUATION]
    found = [file for file in files if file.is_file()]
    if not found:
        command = command_to_go_on(folder)
        if command is not None:
            raise ArtifactError(f"nothing that {folder} is to hold is finished yet. To go on: {command}")
        raise ArtifactError(
            f"{folder} holds no plan.json, analysis.json, evaluation.json or {COMPARISON}: it is no run, folded model "
            "or comparison"
        )
    return found


def _read(file: Path) -> tuple[str, Written]:
    """What a file holds, by its format, and the name of that in `_PRINTED`.

    Raises:
        ArtifactError: it is missing, is damaged, or holds something else.
        PlanError: it says that it is a plan, or does not say what it is, and it is no plan.
    """
    from foldgpt.artifacts import read_json
    from foldgpt.errors import ArtifactError
    from foldgpt.plan import FoldPlan
    from foldgpt.recovery_result import RECOVERY, RecoveryResult

    value = read_json(file)
    # To show what says that it is a plan, nothing is imported that takes seconds.
    if isinstance(value, dict) and value.get("format") != "foldgpt.plan":
        from foldgpt.comparison import COMPARISON, COMPARISON_FORMAT, Comparison

        # Under any name: they are copied to be kept.
        if value.get("format") == COMPARISON_FORMAT or file.name == COMPARISON:
            return "comparison", Comparison.load(file)
    if file.name == RECOVERY:
        return "recovery", RecoveryResult.load(file.parent)
    # A plan may be written by hand, and need not say its format; records beside a model have none.
    given = value.get("format", "foldgpt.plan") if isinstance(value, dict) else "foldgpt.plan"
    if isinstance(value, dict) and not {"format", "source", "removed", "groups"} & value.keys():
        raise ArtifactError(f"{file} cannot be shown: it does not say what it is, and it is no plan")
    if given == "foldgpt.plan":
        return "plan", FoldPlan.from_json_dict(value, str(file))
    if given == "foldgpt.evaluation":
        from foldgpt.evaluation import Evaluation

        return "evaluation", Evaluation.from_dict(value, str(file))
    if given == "foldgpt.analysis":
        from foldgpt.analysis import Analysis

        try:
            return "analysis", Analysis.from_json_dict(value)
        except ArtifactError as error:
            raise ArtifactError(f"{file}: {error}") from error
    raise ArtifactError(
        f"{file} cannot be shown: its 'format' is {given!r}, and what can be are a plan, an analysis, an evaluation, "
        f"the {RECOVERY} of a recovered model and comparisons"
    )

"""What a run folder holds, read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldgpt.analysis import Analysis
from foldgpt.artifacts import read_json
from foldgpt.errors import ArtifactError
from foldgpt.evaluation import Evaluation
from foldgpt.plan import FoldPlan
from foldgpt.recovery_result import RecoveryResult, read_recovery
from foldgpt.report.fits import was_compensated


@dataclass(frozen=True)
class Run:
    """The artefacts of a run; None for those that are not there (yet)."""

    plan: FoldPlan
    analysis: Analysis | None
    evaluation: Evaluation | None
    recovery: RecoveryResult | None
    """What `recovery.json` in the recovered model says."""
    compensated: bool
    """Whether the folded model carries what was fitted to make up for the cuts; False where that is not known."""
    environment: dict[str, Any] | None
    recipe: str | None
    """The recipe as it stands in its file, YAML."""

    @property
    def date(self) -> str | None:
        """The day of the run, YYYY-MM-DD."""
        return None if self.environment is None else str(self.environment.get("date") or "")[:10] or None


def read_run(folder: Path) -> Run:
    """Read the artefacts of a run folder.

    Raises:
        ArtifactError: there is no such folder, it holds no plan, an artefact cannot be read, or plan and analysis
            are of different models.
        PlanError: the plan is not valid.
    """
    if not folder.is_dir():
        raise ArtifactError(f"run folder not found: {folder}")
    if not (folder / "plan.json").is_file():
        raise ArtifactError(f"{folder} holds no plan.json: it is not the folder of a run that got as far as a plan.")

    def path_of(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    analysis, evaluation = path_of("analysis.json"), path_of("evaluation.json")
    environment, recipe = path_of("environment.json"), path_of("recipe.yaml")
    try:
        recipe_text = None if recipe is None else recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read the recipe {recipe}: {error}") from error
    plan = FoldPlan.load(folder / "plan.json")
    run = Run(
        plan=plan,
        analysis=None if analysis is None else Analysis.from_json_dict(read_json(analysis, "analysis")),
        evaluation=None if evaluation is None else Evaluation.load(evaluation),
        recovery=read_recovery(folder / "recovered"),
        compensated=was_compensated(folder / "folded", plan),
        environment=None if environment is None else read_json(environment, "description of the environment"),
        recipe=recipe_text,
    )
    if run.analysis is not None and run.analysis.num_blocks != run.plan.source.num_blocks:
        raise ArtifactError(
            f"{folder} holds an analysis of {run.analysis.num_blocks} blocks and a plan for a model of "
            f"{run.plan.source.num_blocks}: they are not of one run."
        )
    if run.environment is not None and not isinstance(run.environment, dict):
        raise ArtifactError(f"{environment} is not a description of an environment")
    return run

"""report.html: a whole run on one page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from foldgpt.artifacts import write_text
from foldgpt.errors import ArtifactError
from foldgpt.evaluation import Evaluation
from foldgpt.formats import millions
from foldgpt.plan import FoldPlan, Group
from foldgpt.recovery_result import RecoveryResult
from foldgpt.report.headline import headlines, short_name
from foldgpt.report.rows import rows_of
from foldgpt.report.run import Run, read_run
from foldgpt.report.templating import templates
from foldgpt.report.training import training_curves
from foldgpt.selection.units import closed_units, unit_names
from foldgpt.strip import fates_of, group_letter
from foldgpt.tables import comparison_table, protocol_lines, target_lines, task_table

REPORT = "report.html"

#: A screen has no more columns than this to show the steps of a path in.
_MAX_STEPS = 300
#: Most blocks in one line of the strip, on a screen and on a phone.
_WIDE, _NARROW = 40, 15
#: Digits after the point: more than a reader can use, fewer than a float has.
_DIGITS = 5


def build_report(run_folder: str | Path) -> Path:
    """Write `report.html` into a run folder, from the artefacts that are there.

    The page holds all it needs: styles, script, data. It loads nothing, and forbids itself to.

    Args:
        run_folder: holds plan.json, and as far as the run got analysis.json, evaluation.json, environment.json and
            recipe.yaml.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: there is no such folder or no plan in it, or it holds a model; an artefact cannot be read, or the
            page not written.
        PlanError: the plan is not valid.
    """
    folder = Path(run_folder)
    if (folder / "config.json").is_file():
        raise ArtifactError(f"{folder} holds a model, not a run: the page is built in the folder of its run")
    run = read_run(folder)
    path = folder / REPORT
    write_text(path, _render(run))
    return path


def _render(run: Run) -> str:
    plan, evaluation = run.plan, run.evaluation
    return (
        templates(html=True)
        .get_template("report.html")
        .render(
            run=run,
            plan=plan,
            evaluation=evaluation,
            name=short_name(plan.source.model),
            headlines=headlines(plan, evaluation, compensated=run.compensated),
            strips=_strips(plan),
            wide=_columns(plan.source.num_blocks, _WIDE),
            narrow=_columns(plan.source.num_blocks, _NARROW),
            letter=group_letter,
            gates=_gates(plan) is not None,
            comparison=None if evaluation is None else rows_of(comparison_table(evaluation)),
            tasks=None if evaluation is None else rows_of(task_table(evaluation)),
            generations=[] if evaluation is None else _generations(evaluation),
            protocol=[] if evaluation is None else _protocol(plan, evaluation),
            calibration=_calibration(run),
            training=None if run.recovery is None else _training(run.recovery),
            data=_json_for_script(_chart_data(run)),
        )
    )


def _protocol(plan: FoldPlan, evaluation: Evaluation) -> list[str]:
    """How the figures were measured, and whether they are what the plan was to meet."""
    return [*target_lines(plan, evaluation), *protocol_lines(evaluation).plain.splitlines()]


def _strips(plan: FoldPlan) -> dict[str, list[dict[str, Any]]]:
    """The cells of each strip: index, what becomes of the block, and how to say it."""
    strips = {}
    for label, fates in fates_of(plan).items():
        cells = []
        for block, fate in enumerate(fates):
            if isinstance(fate, int):
                said = _said_of_sharing(plan.groups[fate], block)
                cells.append({"block": block, "kind": "shared", "group": fate, "said": said})
            else:
                cells.append({"block": block, "kind": fate, "group": None, "said": fate})
        strips[label] = cells
    return strips


def _said_of_sharing(group: Group, block: int) -> str:
    """What a member of a group has in common with whom."""
    if block in group.started_at_zero:
        return f"removed, but for its position, which borrows the weights of {group.giver} and started at zero"
    others = [str(other) for other in group.blocks if other != block]
    if group.start == "zero":
        return f"lends its weights to the position{'s' if len(others) > 1 else ''} of {', '.join(others)}"
    return f"shares weights with {', '.join(others)}"


def _columns(num_blocks: int, most: int) -> int:
    """Blocks in one line, so that all lines but the last are equally long."""
    return math.ceil(num_blocks / math.ceil(num_blocks / most))


def _generations(evaluation: Evaluation) -> list[dict[str, Any]]:
    """What each model wrote after each prompt, side by side."""
    models = [model for model in evaluation.models if model.generations]
    prompts = [generation.prompt for generation in evaluation.folded.generations or []]
    return [
        {
            "prompt": prompt,
            "texts": [(model.name, model.generations[number].text) for model in models if model.generations],
        }
        for number, prompt in enumerate(prompts)
    ]


def _calibration(run: Run) -> str | None:
    """On what the analysis was made."""
    if run.analysis is None:
        return None
    texts = []
    if run.analysis.calibration is not None:
        texts = list(run.analysis.calibration.protocol.get("texts", []))
    on = f" of {' + '.join(texts)}" if texts else ""
    return f"Similarities are means over {run.analysis.num_tokens:,} tokens in {run.analysis.num_windows} windows{on}."


def _training(recovery: RecoveryResult) -> str:
    """What the recovery did, in a sentence or two."""
    before, after = recovery.before["loss"], recovery.after["loss"]
    saved = f"the state after step {recovery.best_step:,} of {recovery.num_steps:,} is the one that was saved"
    if not recovery.best_step:
        saved = "nothing was better than the start, and the model is as it was"
    trained = millions(recovery.num_trained)
    return (
        f"{recovery.num_tokens:,} tokens in {recovery.seconds:,.0f} s, {trained} trained parameters, merged at "
        f"the end. The held-out loss went from {before:.4f} to {after:.4f}; {saved}."
    )


def _chart_data(run: Run) -> dict[str, Any]:
    """What the script draws."""
    plan, analysis = run.plan, run.analysis
    data: dict[str, Any] = {
        "numBlocks": plan.source.num_blocks,
        "removed": list(plan.removed),
        "gates": _gates(plan),
        "training": None if run.recovery is None else training_curves(run.recovery),
        "curves": None,
        "cosine": None,
    }
    if analysis is not None:
        curves = {"block": analysis.bi}
        if analysis.attention is not None:
            curves["attention"] = analysis.attention.bi
        if analysis.mlp is not None:
            curves["MLP"] = analysis.mlp.bi
        data["curves"] = [{"name": name, "values": _rounded(values)} for name, values in curves.items()]
        data["cosine"] = [_rounded(row) for row in analysis.cosine]
    return data


def _gates(plan: FoldPlan) -> dict[str, Any] | None:
    """The paths of learned gates: steps, and for each unit its name, its fate and its probability at each step."""
    report = plan.origin.get("report")
    trace = report.get("trace") if isinstance(report, Mapping) else None
    if plan.origin.get("selector") != "gates" or not _is_path(trace, plan.source.num_blocks):
        return None
    stride = math.ceil(len(trace) / _MAX_STEPS)
    # The last step is what the decision was made from: it must not fall between two strides.
    shown = [*trace[:-1:stride], trace[-1]]
    num_units, num_blocks = len(trace[-1]["keep"]), plan.source.num_blocks
    names = unit_names(num_units, num_blocks)
    names = [f"block {name}" for name in names] if num_units == num_blocks else names
    gone = closed_units(plan, num_units)
    removed = [unit in gone for unit in range(num_units)]
    return {
        "steps": [entry["step"] for entry in shown],
        "units": [
            {"name": names[unit], "removed": removed[unit], "keep": _rounded([entry["keep"][unit] for entry in shown])}
            for unit in range(num_units)
        ],
    }


def _is_path(trace: Any, num_blocks: int) -> TypeGuard[list[dict[str, Any]]]:
    """Whether this is what the selector reports; a plan's origin is free-form and may have been edited."""
    if not isinstance(trace, list) or not trace or not all(isinstance(entry, Mapping) for entry in trace):
        return False
    keeps = [entry.get("keep") for entry in trace]
    return all("step" in entry for entry in trace) and all(
        isinstance(keep, list) and len(keep) in (num_blocks, 2 * num_blocks) and len(keep) == len(keeps[0] or [])
        for keep in keeps
    )


def _rounded(values: list[float]) -> list[float]:
    return [round(value, _DIGITS) for value in values]


def _json_for_script(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")

"""The command line: `show`, of runs, files, comparisons, and what it cannot show."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import report_inputs
from cli_case import foldgpt
from comparison_inputs import comparison
from foldgpt import pipeline
from foldgpt.artifacts import read_json, write_json
from foldgpt.recipe import Recipe
from foldgpt.run_folder import open_run
from run_inputs import tiny_recipe, tiny_source, tiny_text


def test_show_prints_all_there_is_of_a_run(tmp_path: Path) -> None:
    run = report_inputs.write_run(tmp_path / "run")
    shown = foldgpt("show", run).stdout
    places = [shown.index(part) for part in ("12 → 10 blocks", "loss 1.0000 → 0.4000", "perplexity")]
    assert places == sorted(places)
    assert "Once upon a time" not in shown
    assert list(json.loads(foldgpt("show", run, "--json").stdout)) == ["plan", "recovery", "evaluation"]
    # What a run leaves to its page is shown of its file.
    assert "BI" not in shown and "BI" in foldgpt("show", run / "analysis.json").stdout
    assert "Once upon a time" in foldgpt("show", run / "evaluation.json").stdout
    assert "recovery on held-out windows" in foldgpt("show", run / "recovered" / "recovery.json").stdout
    value = json.loads(foldgpt("show", run / "analysis.json", "--json").stdout)
    assert value == {"analysis": report_inputs.analysis().to_json_dict()}


def test_of_a_run_that_was_stopped_it_is_said_how_it_goes_on(tmp_path: Path) -> None:
    """What is there may look like all of it."""
    recipe = Recipe.from_dict(tiny_recipe(tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")))
    run = tmp_path / "run"
    pipeline.run(recipe, run)
    assert "not finished" not in foldgpt("show", run).stdout
    ledger = read_json(run / "run.json")
    for stage in ("source", "evaluation", "figures", "report"):
        del ledger["stages"][stage]
    write_json(run / "run.json", ledger)
    shown = " ".join(foldgpt("show", run).stdout.split())
    assert "This run is not finished (stages that are done: analysis, selection, plan, fold)." in shown
    assert f"To go on: foldgpt run {run / 'recipe.yaml'} --out {run}" in shown


@pytest.mark.parametrize("verb", ["show", "report"])
def test_of_what_was_stopped_before_its_first_result_it_is_said_how_it_goes_on(tmp_path: Path, verb: str) -> None:
    recipe = Recipe.from_dict(tiny_recipe(tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")))
    for name, made, command, more in (
        ("r un", ".analysis-checkpoint.json", "run", ""),
        ("comparison", "rows/bi/recipe.yaml", "compare", ""),
        ("either", None, "run", ", or compare in place of run"),
    ):
        folder = tmp_path / name
        with open_run(folder, recipe):
            if made is not None:
                recipe.save(folder / made)
        told = foldgpt(verb, folder)
        assert told.exit_code == 1
        asked = shlex.join(["foldgpt", command, str(folder / "recipe.yaml"), "--out", str(folder)])
        assert told.stderr.rstrip().endswith(f"To go on: {asked}{more}")


def test_run_and_show_print_what_compensation_did(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(tiny_recipe(tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")))
    recipe.save(tmp_path / "recipe.yaml")
    made = foldgpt("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--quiet")
    assert made.exit_code == 0, made.output
    for shown in (made.stdout, foldgpt("show", tmp_path / "run").stdout):
        assert "compensation: KL to the source" in shown
        assert "was also used for calibration: its perplexity is no test of folded" in " ".join(shown.split())


def test_no_page_is_built_in_the_folder_of_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "folded"
    report_inputs.plan().save(folder / "plan.json")
    write_json(folder / "config.json", {})
    refused = foldgpt("report", folder)
    assert refused.exit_code == 1 and "holds a model, not a run" in refused.stderr
    assert not (folder / "report.html").exists()


def test_a_plan_is_shown_at_once(tmp_path: Path) -> None:
    """PyTorch and transformers take seconds to import."""
    plan = report_inputs.write_run(tmp_path / "run") / "plan.json"
    code = f"""
import sys
from foldgpt.cli import app
app(["show", {str(plan)!r}], standalone_mode=False)
print([name for name in ("torch", "transformers", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "12 → 10 blocks" in done.stdout and done.stdout.endswith("[]\n")


@pytest.mark.parametrize("candidates", [5, [{"kl": None}], [], "none"])
def test_what_somebody_wrote_into_the_origin_of_a_plan_is_left_out(candidates: Any, tmp_path: Path) -> None:
    plan = report_inputs.plan()
    plan = plan.model_copy(update={"origin": {**plan.origin, "candidates": candidates}})
    plan.save(tmp_path / "plan.json")
    shown = foldgpt("show", tmp_path / "plan.json")
    assert shown.exit_code == 0 and "12 → 10 blocks" in shown.stdout and "candidate" not in shown.stdout


def test_output_that_knows_few_characters_is_no_failure(tmp_path: Path) -> None:
    """As redirected on Windows: blocks are drawn by characters that cp1252 does not have."""
    report_inputs.plan().save(tmp_path / "plan.json")
    done = subprocess.run(
        [sys.executable, "-m", "foldgpt.cli", "show", str(tmp_path / "plan.json")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert b"12 ? 10 blocks" in done.stdout


def test_show_finds_a_comparison_by_its_file_too_whatever_that_is_called(tmp_path: Path) -> None:
    write_json(tmp_path / "comparison.json", comparison().to_dict())
    write_json(tmp_path / "of-tuesday.json", comparison().to_dict())
    by_folder, by_file, renamed = (
        foldgpt("show", path) for path in (tmp_path, tmp_path / "comparison.json", tmp_path / "of-tuesday.json")
    )
    assert "gates + sharing" in by_file.stdout and by_file.stdout == by_folder.stdout == renamed.stdout


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("selection.json", {"format": "foldgpt.selection"}, "cannot be shown: its 'format' is 'foldgpt.selection'"),
        ("compensation.json", {"kept": True, "kl_before": 1.0}, "cannot be shown: it does not say what it is"),
        ("analysis.json", {"format": "foldgpt.analysis", "version": 7}, "analysis.json: analysis of version 7"),
        ("list.json", [1], "list.json: "),
        ("recovery.json", {"format": "foldgpt.plan"}, "recovery.json is not the record of a recovery"),
    ],
)
def test_show_says_which_file_it_cannot_show(tmp_path: Path, name: str, value: Any, message: str) -> None:
    write_json(tmp_path / name, value)
    made = foldgpt("show", tmp_path / name)
    assert made.exit_code in (1, 2) and message in made.stderr and str(tmp_path) in made.stderr


def test_show_of_a_folder_with_nothing_to_show_says_what_it_looked_for(tmp_path: Path) -> None:
    made = foldgpt("show", tmp_path)
    assert made.exit_code == 1
    for name in ("plan.json", "analysis.json", "evaluation.json", "comparison.json"):
        assert name in made.stderr

"""Inputs of a whole run that need no network: a tiny model in a folder and a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import forked
from foldgpt import planning, steps
from foldgpt.plan import FoldPlan
from foldgpt.recipe import Recipe
from foldgpt.workbench import Workbench
from models import tiny_model
from tiny import tiny_tokenizer

#: Stage of a run → its function in `foldgpt.pipeline`.
MAKERS = {
    "analysis": "make_analysis",
    "selection": "make_selection",
    "plan": "make_plan",
    "fold": "make_folded",
    "source": "make_source_evaluation",
    "before recovery": "make_evaluation_before_recovery",
    "recovery": "make_recovered",
    "evaluation": "make_evaluation",
    "figures": "draw",
    "report": "build_report",
}
#: Those of a run without recovery, in order.
STAGES = ["analysis", "selection", "plan", "fold", "source", "evaluation", "figures", "report"]
#: What takes longer than all else in a run of a tiny model.
NOT_MEASURED = {"speed": False, "memory": False, "generations": 0}
WORDS = ("the", "residual", "stream", "passes", "every", "block", "and", "few", "of", "them", "change", "it", "much")


def tiny_source(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Save a tiny random model with its tokenizer, as a source would be found on disk."""
    tiny_model(family, **changes).save_pretrained(folder)
    tiny_tokenizer(128).save_pretrained(folder)
    return folder


def tiny_text(path: Path, num_words: int = 4000) -> Path:
    """Write a text of some words in a fixed disorder."""
    path.write_text(" ".join(WORDS[(i * i + 3 * i) % len(WORDS)] for i in range(num_words)) + "\n", encoding="utf-8")
    return path


def tiny_recipe(model: Path, text: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of a whole run that takes a second or two."""
    return {
        "model": str(model),
        "calibration": {"texts": [str(text)], "context": 32, "num_tokens": 256},
        "select": {"method": "bi", "remove": 2},
        "evaluate": {"texts": [str(text)], "context": 32, "max_windows": 4, **NOT_MEASURED},
        **changes,
    }


def killed(recipe: Recipe, out: Path, script: str) -> None:
    """Run a recipe in a process of its own that kills itself.

    Args:
        recipe: the recipe.
        out: its folder, made beside the recipe.
        script: Python that replaces something by `kill` and runs `recipe` into `out`.
    """
    recipe.save(out.parent / "recipe.yaml")
    code = (
        "import os, signal, sys\nfrom foldgpt.recipe import Recipe\n"
        "kill = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"recipe, out = Recipe.load(sys.argv[1]), sys.argv[2]\n{script}\n"
    )
    given = (str(out.parent / "recipe.yaml"), str(out))
    forked.assert_killed(forked.start(out.parent / "said.txt", forked.run_script, code, *given))


def planned(bench: Workbench) -> FoldPlan:
    """The plan of a recipe, from the beginning."""
    analysis = steps.make_analysis(bench)
    return planning.make_plan(bench, planning.make_selection(bench, analysis), analysis)

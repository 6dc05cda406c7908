"""Inputs of a whole run that need no network: a tiny model in a folder and a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foldgpt import steps
from foldgpt.plan import FoldPlan
from foldgpt.workbench import Workbench
from models import tiny_model
from tiny import tiny_tokenizer

STAGES = ["analysis", "selection", "plan", "fold", "source", "evaluation", "figures", "report"]
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
        "evaluate": {"texts": [str(text)], "context": 32, "max_windows": 4, "speed": False, "memory": False},
        **changes,
    }


def planned(bench: Workbench) -> FoldPlan:
    """The plan of a recipe, from the beginning."""
    analysis = steps.make_analysis(bench)
    return steps.make_plan(bench, steps.make_selection(bench, analysis), analysis)

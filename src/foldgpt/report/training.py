"""What the recovery logged, as curves over tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foldgpt.artifacts import read_json
from foldgpt.errors import ArtifactError

#: A screen has no more columns than this to show steps in.
_MAX_STEPS = 300
#: Losses on held-out windows that are worth a line: the one that is minimised, and what it means for predictions.
_HELD_OUT = {"loss": "held-out loss", "kl": "held-out KL"}


def read_recovery(folder: Path) -> dict[str, Any] | None:
    """What a run's recovery did; None if it has none.

    Raises:
        ArtifactError: the file cannot be read, or is not what a recovery writes.
    """
    path = folder / "recovered" / "recovery.json"
    if not path.is_file():
        return None
    recovery = read_json(path, "record of the recovery")
    if not isinstance(recovery, dict) or not isinstance(recovery.get("history"), list):
        raise ArtifactError(f"{path} is not the record of a recovery")
    return recovery


def training_curves(recovery: Mapping[str, Any]) -> dict[str, Any] | None:
    """Curves over tokens: losses on held-out windows where they were measured, and the training loss of each step.

    Returns:
        "tokens", where the held-out windows were measured, 0 first; "lines", name and values of each loss there;
        "steps", tokens and training loss; "best", the number of the measurement whose state was saved. None if there
        is nothing to draw.
    """
    num_steps = recovery.get("num_steps") or 0
    if not num_steps:
        return None
    per_step = recovery["num_tokens"] / num_steps
    measured = [entry for entry in recovery["history"] if "eval_loss" in entry]
    steps = [entry for entry in recovery["history"] if "loss" in entry and math.isfinite(entry["loss"])]
    # A run that ends at a measured step may log it twice.
    by_step = {entry["step"]: entry for entry in measured}
    names = [name for name in _HELD_OUT if name in recovery["before"]]
    if set(names) == {"loss", "kl"} and recovery["before"]["loss"] == recovery["before"]["kl"]:
        names = ["kl"]
    lines = [
        {
            "name": _HELD_OUT[name],
            "values": _rounded([recovery["before"][name], *(entry[f"eval_{name}"] for entry in by_step.values())]),
        }
        for name in names
    ]
    stride = max(1, math.ceil(len(steps) / _MAX_STEPS))
    shown = steps[::stride]
    order = [0, *by_step]
    return {
        "tokens": [round(step * per_step) for step in order],
        "lines": lines,
        "steps": {
            "tokens": [round(entry["step"] * per_step) for entry in shown],
            "values": _rounded([entry["loss"] for entry in shown]),
        },
        "best": order.index(recovery["best_step"]) if recovery["best_step"] in order else None,
    }


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]

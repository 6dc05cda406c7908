"""What the recovery logged, as curves over tokens."""

from __future__ import annotations

import math
from typing import Any

from foldgpt.formats import millions, text_name
from foldgpt.plan import SourceModel
from foldgpt.recovery_result import RecoveryResult
from foldgpt.report.headline import short_name

#: A screen has no more columns than this to show steps in.
_MAX_STEPS = 300
#: Losses on held-out windows that are worth a line: the one that is minimised, and what it means for predictions.
_HELD_OUT = ("loss", "kl")


def training_in_words(recovery: RecoveryResult, source: SourceModel) -> str:
    """What the recovery did to a checkpoint, in a sentence.

    Args:
        recovery: the record of it.
        source: what the checkpoint was folded from; another teacher is named.
    """
    texts = recovery.text.get("texts", [])
    names = " + ".join(map(text_name, texts))
    on = f"{recovery.num_tokens:,} tokens{f' of {names}' if names else ''}"
    if not recovery.best_step:
        return f"Training on {on} made nothing better, so the weights are as they were when it was folded."
    by = f" by the predictions of {short_name(str(recovery.teacher['model']))}" if _is_other(recovery, source) else ""
    trained = f"After it was folded, {millions(recovery.num_trained)} parameters were trained on {on}{by}, and merged"
    if recovery.best_step == recovery.num_steps:
        return f"{trained}."
    return (
        f"{trained}; the state after {recovery.num_tokens_kept:,} of them did best on held-out text, and is this one."
    )


def _is_other(recovery: RecoveryResult, source: SourceModel) -> bool:
    """Whether it is known that the teacher was not the source."""
    fingerprint = recovery.teacher.get("fingerprint")
    return (
        "model" in recovery.teacher
        and None not in (fingerprint, source.fingerprint)
        and (fingerprint != source.fingerprint)
    )


def training_curves(recovery: RecoveryResult) -> dict[str, Any] | None:
    """Curves over tokens: losses on held-out windows where they were measured, and the training loss of each step.

    Returns:
        "tokens", where the held-out windows were measured, 0 first; "lines", name and values of each loss there;
        "steps", tokens and training loss; "best", the number of the measurement whose state was saved. None if there
        is nothing to draw.
    """
    num_steps = recovery.num_steps
    if not num_steps:
        return None
    per_step = recovery.num_tokens / num_steps
    measured = [entry for entry in recovery.history if "eval_loss" in entry]
    steps = [entry for entry in recovery.history if "loss" in entry and math.isfinite(entry["loss"])]
    # A run that ends at a measured step may log it twice.
    by_step = {entry["step"]: entry for entry in measured}
    names = [
        name
        for name in _HELD_OUT
        if name in recovery.before and all(f"eval_{name}" in entry for entry in by_step.values())
    ]
    if set(names) == {"loss", "kl"} and recovery.before["loss"] == recovery.before["kl"]:
        names = ["kl"]
    lines = [
        {
            "name": "held-out loss" if name == "loss" else f"held-out {recovery.divergence}",
            "values": _rounded([recovery.before[name], *(entry[f"eval_{name}"] for entry in by_step.values())]),
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
        "best": order.index(recovery.best_step) if recovery.best_step in order else None,
    }


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]

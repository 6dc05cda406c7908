"""The loggers of transformers that a training reports to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
    is_azureml_available,
    is_flytekit_available,
)

from foldgpt.errors import UsageError, did_you_mean


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that could not be used; transformers finds out only when the training begins.

    Args:
        names: as transformers names them; "all" and "none" stand by themselves.

    Raises:
        UsageError: one is unknown or not installed.
    """
    if list(names) in (["all"], ["none"]):
        return
    installed = set(get_available_reporting_integrations())
    # It leaves out one, and the other where it would log the same as a third.
    installed |= {"flyte"} if is_flytekit_available() else set()
    installed |= {"azure_ml"} if is_azureml_available() else set()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UsageError(f"unknown logger {name!r} in report_to.{did_you_mean(name, INTEGRATION_TO_CALLBACK)}")
        if name not in installed:
            there = ", ".join(sorted(installed)) or "none"
            raise UsageError(f"the logger {name!r} of report_to is not installed; installed: {there}")


def keep_logs_(callbacks: Iterable[object], folder: Path) -> None:
    """Let TensorBoard write into a folder that stays; its own is in that of the checkpoints.

    Args:
        callbacks: of the trainer; changed in place where no other folder was asked for.
        folder: where it shall write.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)

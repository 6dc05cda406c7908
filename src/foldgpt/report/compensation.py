"""Whether a checkpoint carries the compensation that its plan asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foldgpt.artifacts import read_json
from foldgpt.compensation import COMPENSATION
from foldgpt.errors import ArtifactError
from foldgpt.plan import FoldPlan

_KEYS = {"kept", "kl_before", "kl_after", "num_held_out"}


def was_compensated(folder: Path, plan: FoldPlan) -> bool:
    """Whether what was fitted was merged; folding leaves it out where predictions on held-out text got worse.

    Args:
        folder: a folded or recovered checkpoint.
        plan: the checkpoint's.

    Returns:
        False also where it is not known: nothing is claimed that no file says.

    Raises:
        ArtifactError: as `record_of` says.
    """
    record = None if plan.compensation is None else record_of(folder)
    return record is not None and bool(record["kept"])


def record_of(folder: Path) -> dict[str, Any] | None:
    """What folding wrote of the compensation, if there is such a file.

    Raises:
        ArtifactError: it cannot be read, or is not what folding writes.
    """
    path = folder / COMPENSATION
    if not path.is_file():
        return None
    record = read_json(path, "record of the compensation")
    if not isinstance(record, dict) or not record.keys() >= _KEYS or not isinstance(record["kept"], bool):
        raise ArtifactError(f"{path} is not the record of a compensation")
    return record

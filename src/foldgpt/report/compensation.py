"""Whether a checkpoint carries the compensation that its plan asks for."""

from __future__ import annotations

from pathlib import Path

from foldgpt.artifacts import read_json
from foldgpt.compensation import COMPENSATION
from foldgpt.errors import ArtifactError
from foldgpt.plan import FoldPlan


def was_compensated(folder: Path, plan: FoldPlan) -> bool:
    """Whether what was fitted was merged; folding leaves it out where predictions on held-out text got worse.

    Args:
        folder: a folded or recovered checkpoint.
        plan: the checkpoint's.

    Returns:
        False also where it is not known: nothing is claimed that no file says.

    Raises:
        ArtifactError: the record cannot be read, or is not what folding writes.
    """
    if plan.compensation is None:
        return False
    path = folder / COMPENSATION
    if not path.is_file():
        return False
    record = read_json(path, "record of the compensation")
    if not isinstance(record, dict) or not isinstance(record.get("kept"), bool):
        raise ArtifactError(f"{path} is not the record of a compensation")
    return bool(record["kept"])

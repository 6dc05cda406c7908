"""What was fitted for the model in a folder, by the records that folding writes beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foldgpt.artifacts import read_json
from foldgpt.compensation import COMPENSATION
from foldgpt.errors import ArtifactError
from foldgpt.plan import FoldPlan
from foldgpt.sharing import SHARING


def was_compensated(folder: Path, plan: FoldPlan) -> bool:
    """Whether what was fitted was merged; folding leaves it out where predictions on held-out text got worse.

    Args:
        folder: a folded or recovered checkpoint.
        plan: the checkpoint's.

    Returns:
        False also where it is not known: nothing is claimed that no file says.

    Raises:
        ArtifactError: as `compensation_of` says.
    """
    record = None if plan.compensation is None else compensation_of(folder)
    return record is not None and bool(record["kept"])


def compensation_of(folder: Path) -> dict[str, Any] | None:
    """What folding wrote of the compensation, if there is such a file.

    Raises:
        ArtifactError: it cannot be read, or is not what folding writes.
    """
    record = _record(folder / COMPENSATION, "compensation", {"kl_before", "kl_after"}, {"kept"})
    if record is not None and not isinstance(record["kept"], bool):
        raise ArtifactError(f"{folder / COMPENSATION} is not the record of a compensation")
    return record


def sharing_of(folder: Path) -> dict[str, Any] | None:
    """What folding wrote of the fits of shared weights and private terms, if there is such a file.

    Raises:
        ArtifactError: it cannot be read, or is not what folding writes.
    """
    record = _record(folder / SHARING, "fit of what is shared", {"kl"}, {"members"})
    members = [] if record is None else record["members"]
    if not isinstance(members, list) or not all(
        isinstance(member, dict) and isinstance(member.get("kept"), bool) for member in members
    ):
        raise ArtifactError(f"{folder / SHARING} is not the record of a fit of what is shared")
    return record


def _record(path: Path, what: str, divergences: set[str], others: set[str]) -> dict[str, Any] | None:
    """What a file holds: numbers, null for what is not finite, the tokens that they were measured on, and others."""
    if not path.is_file():
        return None
    record = read_json(path, f"record of the {what}")
    if (
        not isinstance(record, dict)
        or not record.keys() >= {*divergences, *others}
        or not isinstance(record.get("num_held_out"), int)
        or not all(record[name] is None or isinstance(record[name], (int, float)) for name in divergences)
    ):
        raise ArtifactError(f"{path} is not the record of a {what}")
    return record

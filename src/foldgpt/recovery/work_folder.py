"""The folder of an unfinished recovery: its checkpoints, and what it is a recovery of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from foldgpt.artifacts import read_json, write_json
from foldgpt.errors import ArtifactError
from foldgpt.recovery.trainer import COMPLETE

_IDENTITY = "identity.json"


def prepare(folder: Path, identity: dict[str, Any]) -> None:
    """Take a folder for a recovery, or take up the one that was stopped there.

    Checkpoints that a killed process left half-written are removed.

    Raises:
        ArtifactError: it holds another recovery, or cannot be written.
    """
    if (folder / _IDENTITY).is_file():
        there = read_json(folder / _IDENTITY, "identity of the recovery")
        if there != identity:
            changed = [name for name in identity if there.get(name) != identity[name]]
            raise ArtifactError(
                f"{folder} holds an unfinished recovery with other inputs ({', '.join(changed)}). "
                "Remove the folder to begin anew, or use the inputs it was begun with."
            )
    else:
        write_json(folder / _IDENTITY, identity)
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    found = [checkpoint for checkpoint in folder.glob("checkpoint-*") if (checkpoint / COMPLETE).is_file()]
    return max(found, key=lambda checkpoint: int(checkpoint.name.partition("-")[2]), default=None)

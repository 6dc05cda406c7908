"""The folder of an unfinished recovery: its checkpoints, and what it is a recovery of."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from foldgpt.artifacts import read_json, remove, remove_all_leftovers, remove_leftovers, write_json
from foldgpt.errors import ArtifactError, UsageError
from foldgpt.progress import note
from foldgpt.recovery.trainer import COMPLETE

_IDENTITY = "identity.json"


def check_apart(out: Path, **folders: str | Path | None) -> None:
    """Refuse folders that lie where the recovered model is to be: with them in it, it could not be saved.

    Nor may it or another lie in `work`, which is removed in the end.

    Args:
        out: where it will be.
        folders: name of an argument → the folder that it gives.

    Raises:
        UsageError: one lies there.
    """
    for name, folder in folders.items():
        if folder is not None and Path(folder).resolve().is_relative_to(out.resolve()):
            raise UsageError(
                f"{name} is {folder}, and {out} is where the recovered model will be: choose another folder"
            )
    work = folders.get("work")
    if work is None:
        return
    for folder in (out, *(folder for name, folder in folders.items() if name != "work")):
        if folder is not None and Path(folder).resolve().is_relative_to(Path(work).resolve()):
            raise UsageError(f"{folder} lies in work, {work}, which is removed in the end: choose another folder")


def prepare(folder: Path, identity: dict[str, Any], *, replace: bool = False) -> None:
    """Take a folder for a recovery, or take up the one that was stopped there.

    Checkpoints that a killed process left half-written are removed.

    Args:
        folder: the folder; made if it does not exist. Nothing else may be in it.
        identity: all that decides the result.
        replace: drop another recovery that was stopped there.

    Raises:
        ArtifactError: it holds another recovery that has a checkpoint, or other files, or cannot be written.
    """
    _check_ours(folder)
    if (folder / _IDENTITY).is_file():
        there = read_json(folder / _IDENTITY, "identity of the recovery")
        if there != identity and latest_checkpoint(folder) is None:
            # It was refused, or ran out of memory in its first step: nothing is lost.
            remove(folder)
        elif there != identity:
            changed = ", ".join(name for name in identity if there.get(name) != identity[name])
            if not replace:
                raise ArtifactError(
                    f"{folder} holds an unfinished recovery with other inputs ({changed}). Pass --overwrite, or remove "
                    "the folder, to begin anew; or use the inputs it was begun with."
                )
            note(f"dropping an unfinished recovery with other inputs ({changed})")
            remove(folder)
    if not (folder / _IDENTITY).is_file():
        write_json(folder / _IDENTITY, identity)
    remove_all_leftovers(folder)
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)


def _check_ours(folder: Path) -> None:
    """Whose files are in the folder: checkpoints are removed from it, and in the end the folder itself."""
    try:
        if folder.is_dir():
            remove_leftovers(folder / _IDENTITY)
        is_foreign = folder.is_file() or (
            folder.is_dir() and any(folder.iterdir()) and not (folder / _IDENTITY).is_file()
        )
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
    if is_foreign:
        raise ArtifactError(
            f"{folder} holds something else than an unfinished recovery, and work is a folder that is removed in the "
            "end. Choose a new or an empty one."
        )


def work_beside(out: Path) -> Path:
    """Where a recovery keeps its checkpoints if no other folder is named."""
    return out.parent / f".{out.name}.recovery"


def remove_work(folder: Path) -> None:
    """Remove the folder. What tells whose it is goes last, so that one who is killed here can be called again."""
    with contextlib.suppress(OSError):  # the recovered model is there, and that is what was asked for
        for entry in list(folder.iterdir()):
            if entry.name != _IDENTITY:
                remove(entry)
        shutil.rmtree(folder)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    found = [checkpoint for checkpoint in folder.glob("checkpoint-*") if (checkpoint / COMPLETE).is_file()]
    return max(found, key=lambda checkpoint: int(checkpoint.name.partition("-")[2]), default=None)

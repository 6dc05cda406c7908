"""What a killed process left beside an output that it was writing or replacing."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

STAGING_MARK = ".foldgpt-partial-"
#: What `tempfile` puts after the prefix it is given.
_RANDOM_SUFFIX = re.compile(r"[a-z0-9_]{8}")
#: What is to be replaced waits under this name.
ASIDE = "old"
#: And what is on its way out under this one.
REMOVED = "removed"


def put_back(path: str | Path) -> None:
    """Bring back a folder that a killed process had moved aside to replace it, if nothing took its place."""
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    if path.parent.is_dir() and not os.path.lexists(path):
        for leftover in _leftovers(path):
            if (leftover / ASIDE).is_dir():
                with suppress(OSError):
                    (leftover / ASIDE).rename(path)
                return


def remove(path: str | Path) -> None:
    """Remove a file or a folder, if it is there; a folder is gone all at once, whenever the process is killed."""
    path = Path(path)
    if path.is_dir():
        retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{STAGING_MARK}{path.name}-"))
        path.rename(retired / REMOVED)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove what a killed process left beside `path` while it was writing it, and nothing else."""
    put_back(path)
    for leftover in _leftovers(Path(path)):
        _discard(leftover)


def remove_all_leftovers(folder: str | Path) -> None:
    """Remove what killed processes left anywhere in a folder. Nobody else may be writing in it."""
    for leftover in list(Path(folder).rglob(f"{STAGING_MARK}*")):
        put_back(_meant_for(leftover) or leftover)
        _discard(leftover)


def _leftovers(path: Path) -> list[Path]:
    return [entry for entry in path.parent.iterdir() if _meant_for(entry) == path]


def _meant_for(leftover: Path) -> Path | None:
    """The place beside which something was staged or set aside; None for what is neither."""
    # Exactly: the staging folder of `run-2` begins as one of `run` does.
    name, _, suffix = leftover.name.removeprefix(STAGING_MARK).rpartition("-")
    is_one = leftover.name.startswith(STAGING_MARK) and name and _RANDOM_SUFFIX.fullmatch(suffix)
    return leftover.with_name(name) if is_one else None


def _discard(leftover: Path) -> None:
    path = _meant_for(leftover)
    if path is not None and (leftover / ASIDE).is_dir() and not os.path.lexists(path):
        return  # it could not be put back, and is all there is
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)

"""Whether an output may be written at a place, asked before anything is computed for it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from foldgpt.artifacts.leftovers import put_back
from foldgpt.errors import ArtifactError


def check_free(path: str | Path, *, replace: bool = False) -> None:
    """Look whether an output may be written at `path`, before anything is computed for it. Nothing is created.

    An empty folder is free.

    Raises:
        ArtifactError: `path` holds something that would be overwritten, or cannot be read or written.
    """
    path = Path(path)
    try:
        is_folder = path.is_dir()
        is_taken = path.is_file() or (is_folder and any(path.iterdir()))
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    if is_taken and not replace:
        raise ArtifactError(f"{path} already exists. Choose another place, or pass --overwrite to replace it.")
    _check_writable(path, path if is_folder else path.parent)


def check_free_file(path: str | Path, *, replace: bool = False) -> None:
    """`check_free` for an output that is a file: a folder there is in the way, be it empty or to be replaced."""
    path = Path(path)
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder, and a file is to be written there. Choose another place.")
    check_free(path, replace=replace)


def check_free_folder(path: str | Path, *, replace: bool = False) -> None:
    """`check_free` for an output that is a folder, moved there as a whole.

    A file is in the way in any case, and so is a folder that cannot be moved away: the current one, or a mounted one.
    A folder that a killed process was about to replace is brought back first.
    """
    path = Path(path)
    put_back(path)
    check_free(path, replace=replace)
    _check_is_folder(path)
    if path.is_dir():  # else its parent has been looked at
        there = path.resolve()
        fixed = "the current folder" if there == Path.cwd() else "a mounted folder" if os.path.ismount(there) else None
        if fixed is not None:
            raise ArtifactError(f"{path} is {fixed}, which cannot be replaced as a whole. Choose a folder in it.")
        _check_writable(path, there.parent)


def check_writable_folder(path: str | Path) -> None:
    """Look whether files may be written into a folder, there or not, beside what it holds.

    Raises:
        ArtifactError: it is a file, or cannot be written.
    """
    path = Path(path)
    _check_is_folder(path)
    _check_writable(path, path)


def from_home(path: str | Path) -> Path:
    """A path with ~ as the home folder; ~NAME of a user who does not exist stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _check_is_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file, and a folder is to be written there. Choose another place.")


def _check_writable(path: Path, folder: Path) -> None:
    """Look whether `folder`, or where it would be made, can be written.

    Raises:
        ArtifactError: it cannot; the message names `path`.
    """
    # The nearest one that is there: a check leaves no empty folders behind.
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error

"""Files and folders that appear whole or not at all, and are written by one process at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from foldgpt.artifacts.leftovers import ASIDE, REMOVED, STAGING_MARK, remove_leftovers
from foldgpt.artifacts.places import check_free_folder
from foldgpt.errors import ArtifactError


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) atomically, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new, never a part.

    Raises:
        ArtifactError: the folder cannot be created or written, or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{STAGING_MARK}{path.name}-")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _open_to_others(temporary)
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def staged_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Write a file that is too large for `write_text` beside its place, and move it there when the block ends.

    Args:
        path: the final file; its folder exists.

    Yields:
        The file to write into. It is removed if the block raises; what a kill leaves, `remove_leftovers` knows.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{STAGING_MARK}{path.name}-", delete=False) as file:
        staging = Path(file.name)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            _open_to_others(staging)
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)


@contextmanager
def staged_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Build a folder beside its final place and move it there only when the block ends without error.

    Args:
        path: the final folder; a link stands for the folder that it leads to.
        replace: replace an existing folder; otherwise an existing one is an error. A file always is.

    Yields:
        The staging folder to write into. It is removed if the block raises.

    Raises:
        ArtifactError: the place is taken, cannot be written, or the disk is full.
    """
    path = Path(path)
    check_free_folder(path, replace=replace)
    path = path.resolve() if path.is_symlink() else path
    with no_empty_folders_above(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
            staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{STAGING_MARK}{path.name}-"))
            umask = os.umask(0)
            os.umask(umask)
            staging.chmod(0o777 & ~umask)
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            yield staging
            _move_into_place(staging, path)
        except OSError as error:
            raise _cannot_write(path, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def workspace_beside(path: str | Path) -> Iterator[Path]:
    """A folder for what is needed on the way to an output file, on the file system on which that will lie.

    Args:
        path: the final file.

    Yields:
        The folder. It is removed in the end; what a kill leaves, the next call removes.

    Raises:
        ArtifactError: it cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{STAGING_MARK}{path.name}-") as name:
            yield Path(name)
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextmanager
def no_empty_folders_above(path: str | Path) -> Iterator[None]:
    """Remove in the end the folders above an output that were made meanwhile and hold nothing: it was not written."""
    missing = [folder for folder in Path(path).parents if not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            with suppress(OSError):  # it holds something
                folder.rmdir()


@contextmanager
def alone(path: str | Path, *, wait: bool = True) -> Iterator[None]:
    """Keep other processes off a file or a folder: what one has so far looks like a killed one's leftovers.

    Args:
        path: the file or folder. What lies beside it for the time is `path` with `.lock` behind it.
        wait: wait for another process that is writing it.

    Raises:
        ArtifactError: another process is, and it was not to be waited for; or nothing can be written there.
    """
    path = Path(path)
    lock = path.with_name(f"{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        held.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise ArtifactError(f"another process is writing {path}; wait for it, or choose another place") from None
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield
    finally:
        # While it is held: who has opened it in the meantime sees that it is gone, and opens another.
        with suppress(OSError):  # a file that is open, on Windows
            lock.unlink()
        held.release()


def take_over(there: str | Path, here: str | Path, *, leave: frozenset[str] = frozenset()) -> None:
    """Make `here` hold what the file or folder `there` holds, atomically.

    The files of a folder are linked where the file system can, so that weights take no room twice: artefacts are
    replaced, never written into, so two names may lead to one file.

    Args:
        there: what exists.
        here: the new place; what is there is replaced.
        leave: names of files in a folder that are not taken.

    Raises:
        ArtifactError: the place cannot be written.
    """
    there, here = Path(there), Path(here)
    if there.is_file():
        write_bytes(here, there.read_bytes())
        return
    with staged_folder(here, replace=True) as staging:
        for file in there.rglob("*"):
            if file.is_file() and file.name not in leave:
                target = staging / file.relative_to(there)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(file, target)


def _cannot_write(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"cannot write {path}: {error.strerror or error}. Nothing was left behind.")


def _open_to_others(temporary: Path) -> None:
    """Temporary files are private; an artefact gets the permissions any other new file would."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)


def _move_into_place(staging: Path, path: Path) -> None:
    """Rename `staging` to `path`; an existing folder is moved aside first and dropped after."""
    if not path.exists():
        staging.rename(path)
        return
    retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{STAGING_MARK}{path.name}-"))
    try:
        path.rename(retired / ASIDE)
        try:
            staging.rename(path)
        except BaseException:
            try:
                (retired / ASIDE).rename(path)
            except OSError as error:
                raise ArtifactError(
                    f"cannot write {path}: {error.strerror or error}. What was there is kept in {retired / ASIDE}."
                ) from error
            raise
    finally:
        if path.exists():  # else what is aside is all there is
            with suppress(OSError):  # it is not to come back, in parts, where this is killed
                (retired / ASIDE).rename(retired / REMOVED)
            shutil.rmtree(retired, ignore_errors=True)


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another device, or a file system without links
        shutil.copy2(file, target)

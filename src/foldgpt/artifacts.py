"""Files that appear whole or not at all, and the hashes that say whether their inputs changed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from foldgpt.errors import ArtifactError, first_line

_STAGING_MARK = ".foldgpt-partial-"
#: What `tempfile` puts after the prefix it is given.
_RANDOM_SUFFIX = re.compile(r"[a-z0-9_]{8}")
#: What is to be replaced waits under this name.
_ASIDE = "old"
#: And what is on its way out under this one.
_REMOVED = "removed"


def _cannot_write(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"cannot write {path}: {error.strerror or error}. Nothing was left behind.")


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
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_STAGING_MARK}{path.name}-")
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


def _open_to_others(temporary: Path) -> None:
    """Temporary files are private; an artefact gets the permissions any other new file would."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def without_infinity(value: Any) -> Any:
    """A JSON value with None in place of what JSON has no number for: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_infinity(item) for key, item in value.items()}
    return [without_infinity(item) for item in value] if isinstance(value, (list, tuple)) else value


def with_infinity(values: Sequence[float | None]) -> list[float]:
    """Costs as they were before `without_infinity`, which leaves None where something cannot be had at any cost."""
    return [math.inf if value is None else value for value in values]


def read_json(path: str | Path, what: str = "file") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what the file is, for the error message ("plan", "analysis").

    Raises:
        ArtifactError: missing, unreadable, or not JSON, or a key stands twice in one object, of which Python would
            take the last without a word; the message names the line or the key.
    """
    path = Path(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
        if twice is not None:
            raise ArtifactError(f"{twice!r} stands twice in one object of the {what} {path}: leave one of them")
        return dict(pairs)

    try:
        # Some editors put a mark in front of UTF-8.
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except FileNotFoundError:
        raise ArtifactError(f"{what} not found: {path}") from None
    except OSError as error:
        raise ArtifactError(f"cannot read the {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"the {what} {path} is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ArtifactError(
            f"the {what} {path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (RecursionError, ValueError) as error:  # brackets in brackets without end; a number of thousands of digits
        raise ArtifactError(f"the {what} {path} is no JSON that can be read: {first_line(error)}") from error


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
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{_STAGING_MARK}{path.name}-", delete=False) as file:
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
            staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_STAGING_MARK}{path.name}-"))
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
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{_STAGING_MARK}{path.name}-") as name:
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


def _move_into_place(staging: Path, path: Path) -> None:
    """Rename `staging` to `path`; an existing folder is moved aside first and dropped after."""
    if not path.exists():
        staging.rename(path)
        return
    retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_STAGING_MARK}{path.name}-"))
    try:
        path.rename(retired / _ASIDE)
        try:
            staging.rename(path)
        except BaseException:
            try:
                (retired / _ASIDE).rename(path)
            except OSError as error:
                raise ArtifactError(
                    f"cannot write {path}: {error.strerror or error}. What was there is kept in {retired / _ASIDE}."
                ) from error
            raise
    finally:
        if path.exists():  # else what is aside is all there is
            with suppress(OSError):  # it is not to come back, in parts, where this is killed
                (retired / _ASIDE).rename(retired / _REMOVED)
            shutil.rmtree(retired, ignore_errors=True)


def put_back(path: str | Path) -> None:
    """Bring back a folder that a killed process had moved aside to replace it, if nothing took its place."""
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    if path.parent.is_dir() and not os.path.lexists(path):
        for leftover in _leftovers(path):
            if (leftover / _ASIDE).is_dir():
                with suppress(OSError):
                    (leftover / _ASIDE).rename(path)
                return


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


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another device, or a file system without links
        shutil.copy2(file, target)


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


def remove(path: str | Path) -> None:
    """Remove a file or a folder, if it is there; a folder is gone all at once, whenever the process is killed."""
    path = Path(path)
    if path.is_dir():
        retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_STAGING_MARK}{path.name}-"))
        path.rename(retired / _REMOVED)
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
    for leftover in list(Path(folder).rglob(f"{_STAGING_MARK}*")):
        put_back(_meant_for(leftover) or leftover)
        _discard(leftover)


def _leftovers(path: Path) -> list[Path]:
    return [entry for entry in path.parent.iterdir() if _meant_for(entry) == path]


def _meant_for(leftover: Path) -> Path | None:
    """The place beside which something was staged or set aside; None for what is neither."""
    # Exactly: the staging folder of `run-2` begins as one of `run` does.
    name, _, suffix = leftover.name.removeprefix(_STAGING_MARK).rpartition("-")
    is_one = leftover.name.startswith(_STAGING_MARK) and name and _RANDOM_SUFFIX.fullmatch(suffix)
    return leftover.with_name(name) if is_one else None


def _discard(leftover: Path) -> None:
    path = _meant_for(leftover)
    if path is not None and (leftover / _ASIDE).is_dir() and not os.path.lexists(path):
        return  # it could not be put back, and is all there is
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def hash_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable value, independent of key order and white space."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def is_whole(path: str | Path, num_bytes: int) -> bool:
    """Whether a file is there with all its bytes: a copy may have been cut short."""
    path = Path(path)
    return path.is_file() and path.stat().st_size == num_bytes


def hash_of_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

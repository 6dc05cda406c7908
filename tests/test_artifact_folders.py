"""Folders appear whole or not at all: whatever fails, and wherever the process is killed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from artifact_case import killed, names, needs_sigkill
from foldgpt.artifacts import (
    alone,
    check_free,
    check_free_file,
    check_free_folder,
    remove_all_leftovers,
    remove_leftovers,
    staged_folder,
    write_text,
)
from foldgpt.errors import ArtifactError


def write_folder(path: Path, text: str, **options: Any) -> None:
    with staged_folder(path, **options) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text(text)
        final = path / "sub" / "file"
        assert not final.exists() or final.read_text() != text, "not there before it is whole"


def test_folders_above_one_that_was_not_written_are_not_left(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError), staged_folder(tmp_path / "there" / "new" / "folder"):
        raise ValueError("not this one")
    assert names(tmp_path) == ["there"] and names(tmp_path / "there") == []
    # Nor is what others put there meanwhile removed.
    with pytest.raises(ValueError), staged_folder(tmp_path / "there" / "new" / "folder"):
        write_text(tmp_path / "there" / "new" / "file", "mine")
        raise ValueError("not this one")
    assert names(tmp_path / "there" / "new") == ["file"]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "folder"
    write_folder(path, "new")
    assert (path / "sub" / "file").read_text() == "new"
    assert names(path.parent) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, ArtifactError])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged_folder(tmp_path / "folder") as staging:
        (staging / "half").write_text("")
        raise error
    assert names(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*folder: No space left on device\. Nothing was left"),
        staged_folder(tmp_path / "folder"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_a_really_full_disk_leaves_nothing(small_disk: Path) -> None:
    write_folder(small_disk / "old", "old")
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*folder: No space left on device"),
        staged_folder(small_disk / "folder") as staging,
    ):
        (staging / "large").write_bytes(bytes(1_000_000))
    assert names(small_disk) == ["old"]


def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write_folder(path, "old")
    with pytest.raises(ArtifactError, match=r"folder already exists\. Choose another place, or pass --overwrite"):
        write_folder(path, "new")
    assert (path / "sub" / "file").read_text() == "old"
    (path / "stale").write_text("")
    write_folder(path, "new", replace=True)
    assert names(path) == ["sub"], "replaced, not merged"
    assert names(tmp_path) == ["folder"]


def test_a_failed_replacement_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    write_folder(path, "old")
    with pytest.raises(ValueError), staged_folder(path, replace=True):
        raise ValueError
    assert (path / "sub" / "file").read_text() == "old"

    rename = Path.rename

    def rename_once(self: Path, target: Path) -> Path:
        if target == path and self.name != "old":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(ArtifactError, match="Input/output error"):
        write_folder(path, "new", replace=True)
    monkeypatch.undo()
    assert (path / "sub" / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_where_nothing_can_be_moved_any_more_the_old_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    write_folder(path, "old")
    rename = Path.rename

    def rename_away(self: Path, target: Path) -> Path:
        if target == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_away)
    with pytest.raises(ArtifactError, match="What was there is kept in") as raised:
        write_folder(path, "new", replace=True)
    kept = Path(str(raised.value).partition("kept in ")[2].removesuffix("."))
    assert (kept / "sub" / "file").read_text() == "old"


def test_an_empty_folder_is_replaced_and_a_file_never_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", "new")
    assert (tmp_path / "empty" / "sub" / "file").read_text() == "new"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ArtifactError, match="file already exists"):
        write_folder(tmp_path / "file", "new")
    with pytest.raises(ArtifactError, match="file is a file, and a folder is to be written there"):
        write_folder(tmp_path / "file", "new", replace=True)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_that_cannot_be_moved_away_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (".", tmp_path):
        with pytest.raises(ArtifactError, match=r"is the current folder, .* Choose a folder in it"):
            check_free_folder(place)
    monkeypatch.chdir("/")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(ArtifactError, match="is a mounted folder"):
        check_free_folder(tmp_path, replace=True)
    check_free_folder(tmp_path / "in_it")


def test_one_that_cannot_be_moved_away_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    rename = Path.rename

    def busy(self: Path, target: Any) -> Path:
        if self == tmp_path / "out":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(ArtifactError, match=r"busy\. Nothing was left behind"), staged_folder(tmp_path / "out"):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not Path("/dev/shm").is_mount(), reason="no other file system at hand")
def test_a_link_to_another_disk_is_no_mounted_folder(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        (Path(disk) / "model").mkdir()
        (tmp_path / "link").symlink_to(Path(disk) / "model")
        check_free_folder(tmp_path / "link", replace=True)


def test_one_at_a_time(tmp_path: Path) -> None:
    with alone(tmp_path / "new" / "out", wait=False):
        with (
            pytest.raises(ArtifactError, match=r"another process is writing .*out"),
            alone(tmp_path / "new" / "out", wait=False),
        ):
            pass
        with alone(tmp_path / "new" / "other", wait=False):
            pass
    with alone(tmp_path / "new" / "out"):
        pass
    assert not list((tmp_path / "new").iterdir())


def test_a_lock_that_is_released_is_no_file_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opened it while it was held, and gets it now, sees that others would lock another one, and tries again."""
    links, release = [], FileLock.release
    with alone(tmp_path / "out"):
        with (tmp_path / "out.lock").open() as opened:
            waiting = os.dup(opened.fileno())

        def look(self: FileLock, *args: Any, **kwargs: Any) -> None:
            links.append(os.fstat(waiting).st_nlink)
            release(self, *args, **kwargs)

        monkeypatch.setattr(FileLock, "release", look)
    os.close(waiting)
    assert links[0] == 0


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path, there: bool) -> None:
    disk = tmp_path / "disk" / "model"
    if there:
        disk.mkdir(parents=True)
        (disk / "old.txt").write_text("old")
    (tmp_path / "link").symlink_to(disk)
    with staged_folder(tmp_path / "link", replace=True) as staging:
        (staging / "new.txt").write_text("new")
        assert staging.parent == disk.parent
    assert (tmp_path / "link").is_symlink() and [entry.name for entry in disk.iterdir()] == ["new.txt"]
    assert [entry.name for entry in disk.parent.iterdir()] == ["model"]


def test_a_place_is_free_if_nothing_would_be_lost(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_text(tmp_path / "full" / "file", "")
    for place in ("missing", "empty"):
        check_free(tmp_path / place)
    for place in ("full", "full/file"):
        with pytest.raises(ArtifactError, match=f"{place} already exists"):
            check_free(tmp_path / place)
        check_free(tmp_path / place, replace=True)


@pytest.mark.parametrize("check", [check_free, check_free_file, check_free_folder])
def test_a_place_that_cannot_be_made_is_not_free(tmp_path: Path, check: Callable[..., None]) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file/x", "file/new/x"):
        with pytest.raises(ArtifactError, match=f"cannot write .*{place}: Not a directory"):
            check(tmp_path / place, replace=True)
    check(tmp_path / "new" / "sub" / "x")
    assert names(tmp_path) == ["file"], "a check leaves nothing behind"


def test_what_is_written_into_a_folder_needs_no_right_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mounted folder can be filled, but not be replaced as a whole."""
    (tmp_path / "mounted").mkdir()
    temporary = tempfile.TemporaryFile

    def only_inside(*, dir: Path) -> Any:
        if dir == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))
        return temporary(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", only_inside)
    check_free(tmp_path / "mounted")
    check_free_file(tmp_path / "mounted" / "file")
    with pytest.raises(ArtifactError, match=r"cannot write .*mounted: Permission denied"):
        check_free_folder(tmp_path / "mounted")
    with pytest.raises(ArtifactError, match=r"cannot write .*file: Permission denied"):
        check_free_file(tmp_path / "file")


@needs_sigkill
@pytest.mark.parametrize("moment", ["writing", "set aside", "moved in"])
@pytest.mark.parametrize("replace", [False, True])
def test_killed_at_any_moment(tmp_path: Path, moment: str, replace: bool) -> None:
    """The name holds the old folder, the new one or nothing, never a part; the next run cleans up."""
    path = tmp_path / "folder"
    if replace:
        write_folder(path, "old")
    killed(f"""
        from pathlib import Path
        from foldgpt import artifacts
        path, moment = Path({str(path)!r}), {moment!r}
        rename = Path.rename

        def rename_and_die(self, target):
            rename(self, target)
            if (moment == "moved in") == (Path(target) == path):
                die()

        Path.rename = rename_and_die
        with artifacts.staged_folder(path, replace={replace}) as staging:
            (staging / "sub").mkdir()
            (staging / "sub" / "file").write_text("new")
            if moment == "writing" or (moment == "set aside" and not path.exists()):
                die()
    """)
    found = (path / "sub" / "file").read_text() if path.exists() else None
    expected = {"writing": "old" if replace else None, "set aside": None, "moved in": "new"}
    assert found == expected[moment]
    assert moment == "moved in" or len(names(tmp_path)) > (found is not None), "the kill left something"

    check_free_folder(path, replace=True)
    if moment != "moved in" and replace:
        assert (path / "sub" / "file").read_text() == "old", "what was set aside is back"
    write_folder(path, "again", replace=True)
    assert (path / "sub" / "file").read_text() == "again"
    assert names(tmp_path) == ["folder"]


def test_what_was_set_aside_in_a_folder_comes_back(tmp_path: Path) -> None:
    write_folder(tmp_path / ".foldgpt-partial-model-abcdefgh" / "old", "kept")
    write_folder(tmp_path / ".foldgpt-partial-other-abcdefgh" / "removed", "gone")
    remove_all_leftovers(tmp_path)
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "sub" / "file").read_text() == "kept"


def test_leftovers_of_other_names_stay(tmp_path: Path) -> None:
    """`run-2` may be in the making while `run` begins, and a name may hold what a glob takes for a pattern."""
    with staged_folder(tmp_path / "run-2") as other, staged_folder(tmp_path / "[run]") as odd:
        remove_leftovers(tmp_path / "run")
        with staged_folder(tmp_path / "run") as staging:
            assert other.is_dir() and odd.is_dir() and staging.is_dir()
    assert names(tmp_path) == ["[run]", "run", "run-2"]

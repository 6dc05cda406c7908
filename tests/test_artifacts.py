"""Artefacts appear whole or not at all: whatever fails, and wherever the process is killed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from foldgpt import artifacts
from foldgpt.artifacts import (
    alone,
    check_free,
    check_free_file,
    check_free_folder,
    hash_of,
    hash_of_file,
    read_json,
    remove_all_leftovers,
    remove_leftovers,
    staged_folder,
    take_over,
    without_infinity,
    write_json,
    write_text,
)
from foldgpt.errors import ArtifactError

needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")


def names(folder: Path) -> list[str]:
    """What a folder holds, hidden entries too."""
    return sorted(entry.name for entry in folder.iterdir())


def killed(code: str) -> None:
    """Run a script that kills itself with SIGKILL (as `die()`), so that no handler and no `finally` runs."""
    script = "import os, signal\ndef die(*_, **__):\n    os.kill(os.getpid(), signal.SIGKILL)\n" + textwrap.dedent(code)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; needs the right to mount one."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no mount on this system")
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


# --------------------------------------------------------------------------------------------------- files


def test_text_is_written_with_its_folders_and_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text.txt"
    write_text(path, "old, and longer than the new one")
    write_text(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    assert names(path.parent) == ["text.txt"]


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_new_artefacts_get_the_permissions_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file", "")
        with staged_folder(tmp_path / "folder"):
            pass
        assert os.umask(umask) == umask, "the process keeps its umask"
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_json_is_readable_by_people_and_exact(tmp_path: Path) -> None:
    value = {"z": [1, 2.5, None, True], "a": "naïve", "small": 1e-300}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "value.json") == value
    assert "naïve" in text and text.index('"z"') < text.index('"a"') and text.endswith("}\n")
    assert '\n  "a"' in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": [-float("inf")]}, {"x": object()}])
def test_what_is_not_json_is_refused_and_the_old_file_stays(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "value.json", 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == 1
    assert names(tmp_path) == ["value.json"]


def test_numbers_that_json_has_not_are_none_where_they_may_be() -> None:
    value = {"kl": math.nan, "cuts": [{"after": math.inf, "kept": True, "name": "x"}], "members": (1.5, -math.inf, 2)}
    assert without_infinity(value) == {
        "kl": None,
        "cuts": [{"after": None, "kept": True, "name": "x"}],
        "members": [1.5, None, 2],
    }


def test_text_that_cannot_be_encoded_leaves_nothing_behind(tmp_path: Path) -> None:
    """A lone surrogate, as Python makes of a file name that is not UTF-8."""
    write_text(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "new \udcff")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "replace", "mkdir"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*{"fsync": (os, "fsync")}.get(failing, (Path, failing)), full)
    with pytest.raises(ArtifactError) as caught:
        write_text(tmp_path / "file", "new")
    monkeypatch.undo()
    assert str(caught.value) == (f"cannot write {tmp_path / 'file'}: No space left on device. Nothing was left behind.")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_really_full_disk_leaves_the_old_file(small_disk: Path) -> None:
    write_text(small_disk / "file", "old")
    with pytest.raises(ArtifactError, match=r"cannot write .*file: No space left on device"):
        write_text(small_disk / "file", "x" * 1_000_000)
    assert (small_disk / "file").read_text() == "old"
    assert names(small_disk) == ["file"]


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    """Not a matter of permissions, so it holds for root too."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write .*file/sub/x\.json: Not a directory"):
        write_json(tmp_path / "file" / "sub" / "x.json", 1)
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*file/sub: "),
        staged_folder(tmp_path / "file" / "sub"),
    ):
        pytest.fail("must not begin")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="Permission denied"):
            write_text(tmp_path / "file", "")
        with pytest.raises(ArtifactError, match="Permission denied"), staged_folder(tmp_path / "folder"):
            pytest.fail("must not begin")
    finally:
        tmp_path.chmod(0o700)


def test_a_place_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(artifacts.tempfile, "mkstemp", refuse)
    monkeypatch.setattr(artifacts.tempfile, "mkdtemp", refuse)
    with pytest.raises(ArtifactError, match=r"cannot write .*file: Permission denied"):
        write_text(tmp_path / "file", "")
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*folder: Permission denied"),
        staged_folder(tmp_path / "folder"),
    ):
        pytest.fail("must not begin")
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(ArtifactError, match=r"cannot write .*folder: Permission denied"):
        check_free(tmp_path / "folder")


@needs_sigkill
def test_killed_while_writing_a_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    killed(f"""
        from foldgpt import artifacts
        artifacts.os.fsync = die
        artifacts.write_text({str(tmp_path / "file")!r}, "new")
    """)
    assert (tmp_path / "file").read_text() == "old"
    assert len(names(tmp_path)) == 2, "the kill came in the middle"
    remove_leftovers(tmp_path / "file")
    assert names(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', r"the plan .*x\.json is not valid JSON: Expecting value at line 2, column 7"),
        (b'{"a": 1', r"the plan .*x\.json is not valid JSON: .* at line 1"),
        (b"", r"the plan .*x\.json is not valid JSON: Expecting value at line 1, column 1"),
        (b'{"a": "\xff"}', r"the plan .*x\.json is not UTF-8 text \(byte 7\)"),
    ],
)
def test_a_corrupt_json_file_is_named_with_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        read_json(tmp_path / "x.json", "plan")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"analysis not found: .*x\.json"):
        read_json(tmp_path / "x.json", "analysis")
    with pytest.raises(ArtifactError, match=r"cannot read the analysis .*: Is a directory"):
        read_json(tmp_path, "analysis")


# ------------------------------------------------------------------------------------------------- folders


def write_folder(path: Path, text: str, **options: Any) -> None:
    with staged_folder(path, **options) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text(text)
        final = path / "sub" / "file"
        assert not final.exists() or final.read_text() != text, "not there before it is whole"


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
    temporary = artifacts.tempfile.TemporaryFile

    def only_inside(*, dir: Path) -> Any:
        if dir == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))
        return temporary(dir=dir)

    monkeypatch.setattr(artifacts.tempfile, "TemporaryFile", only_inside)
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


# ------------------------------------------------------------------------------------------------- hashes


def test_the_hash_of_a_value_is_of_its_content() -> None:
    one = hash_of({"a": [1, 2], "b": {"c": None, "d": "ï"}})
    assert one == hash_of({"b": {"d": "ï", "c": None}, "a": [1, 2]})
    assert one != hash_of({"a": [2, 1], "b": {"c": None, "d": "ï"}})
    assert hash_of(1) != hash_of("1")
    assert re.fullmatch("[0-9a-f]{64}", one)
    assert one == hash_of(json.loads(json.dumps({"a": [1, 2], "b": {"c": None, "d": "ï"}})))


def test_the_hash_of_a_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_of_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_is_taken_over_is_the_same_and_stands_by_itself(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    write_text(there / "sub" / "weights", "heavy")
    write_text(there / "README.md", "a card")
    write_text(here / "old", "gone")
    take_over(there, here, leave=frozenset({"README.md"}))
    assert [str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()] == ["sub/weights"]
    assert (here / "sub" / "weights").stat().st_ino == (there / "sub" / "weights").stat().st_ino
    write_text(here / "sub" / "weights", "other")
    assert (there / "sub" / "weights").read_text() == "heavy"
    take_over(there / "README.md", tmp_path / "new" / "card.md")
    assert (tmp_path / "new" / "card.md").read_text() == "a card"


def test_without_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    write_text(tmp_path / "there" / "file", "text")
    take_over(tmp_path / "there", tmp_path / "here")
    assert (tmp_path / "here" / "file").read_text() == "text"

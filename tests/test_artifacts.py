"""Files appear whole or not at all: whatever fails, and wherever the process is killed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from artifact_case import killed, names, needs_sigkill
from foldgpt.artifacts import (
    check_free,
    hash_of,
    hash_of_file,
    read_json,
    remove_leftovers,
    staged_folder,
    take_over,
    without_infinity,
    write_json,
    write_text,
)
from foldgpt.errors import ArtifactError

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

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
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
        import os
        from foldgpt import artifacts
        os.fsync = die
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
        (b'{"a": {"b": 1, "b": 1}}', r"'b' stands twice in one object of the plan .*x\.json"),
        (b"[" * 100_000, r"the plan .*x\.json is no JSON that can be read: maximum recursion"),
        (b"1" * 5000, r"the plan .*x\.json is no JSON that can be read: Exceeds the limit"),
    ],
)
def test_a_corrupt_json_file_is_named_with_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        read_json(tmp_path / "x.json", "plan")


def test_the_mark_that_some_editors_put_in_front_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"analysis not found: .*x\.json"):
        read_json(tmp_path / "x.json", "analysis")
    with pytest.raises(ArtifactError, match=r"cannot read the analysis .*: Is a directory"):
        read_json(tmp_path, "analysis")


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

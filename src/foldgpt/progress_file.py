"""What a long computation has so far, in a file, so that one that was stopped goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import foldgpt
from foldgpt.artifacts import check_free_file, hash_of, read_json, write_json
from foldgpt.errors import ArtifactError
from foldgpt.fingerprints import weights_fingerprint

_OWN = ("format", "fingerprint")


def computed_with(model: nn.Module) -> dict[str, Any]:
    """What whoever goes on with a computation must share with whoever began it, as JSON values.

    Another version of foldgpt may find other numbers, and so may another kind of device.
    """
    return {
        "foldgpt": foldgpt.__version__,
        "model": weights_fingerprint(model),
        "device": next(model.parameters()).device.type,
    }


class ProgressFile:
    """A file that belongs to one request. One of another request, or a damaged one, is as good as none.

    Args:
        path: the file; None keeps nothing.
        file_format: what the file says that it is.
        identity: gives all that decides the result, as JSON values; asked only where there is a file to keep.
        seconds_between: the least time between two writings, unless it has to be now.

    Raises:
        ArtifactError: the file could not be written. Said here, because the computation may be over before it is.
    """

    def __init__(
        self, path: str | Path | None, file_format: str, identity: Callable[[], Any], *, seconds_between: float
    ) -> None:
        self._path = None if path is None else Path(path)
        self._format = file_format
        self._seconds_between = seconds_between
        self._saved = time.monotonic()
        self._fingerprint = ""
        if self._path is not None:
            check_free_file(self._path, replace=True)
            self._fingerprint = hash_of(identity())

    def load(self) -> dict[str, Any]:
        """What was saved for this request; empty if there is nothing."""
        if self._path is None:
            return {}
        try:
            value = read_json(self._path, "checkpoint")
            if (value["format"], value["fingerprint"]) != (self._format, self._fingerprint):
                return {}
        except (ArtifactError, KeyError, TypeError):
            # Missing, of another request or damaged: it is only a shortcut, the computation starts over.
            return {}
        return {name: kept for name, kept in value.items() if name not in _OWN}

    def save(self, progress: Callable[[], dict[str, Any]], *, now: bool = False) -> None:
        """Write the progress, if the last time is long enough ago or `now`.

        Args:
            progress: gives it, as JSON values; asked only where it is written.
            now: write it in any case.

        Raises:
            ArtifactError: the file cannot be written.
        """
        if self._path is None or not (now or time.monotonic() - self._saved >= self._seconds_between):
            return
        write_json(self._path, {"format": self._format, "fingerprint": self._fingerprint, **progress()})
        self._saved = time.monotonic()

"""The progress of a search in a file, so that a search that was stopped goes on where it was."""

from __future__ import annotations

import time
from typing import Any

import foldgpt
from foldgpt.artifacts import hash_of, read_json, write_json
from foldgpt.errors import ArtifactError
from foldgpt.fingerprints import ids_fingerprint, weights_fingerprint
from foldgpt.selection.selection import Request

_FORMAT = "foldgpt.gates-checkpoint"
_SECONDS_BETWEEN = 20.0


class ProgressFile:
    """A checkpoint that belongs to one request. Files of other requests, or damaged ones, are ignored.

    Args:
        request: the request.
    """

    def __init__(self, request: Request) -> None:
        self._path = request.checkpoint
        self._fingerprint = "" if self._path is None else _fingerprint(request)
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any]:
        """What was saved for this request; empty if there is nothing."""
        if self._path is None:
            return {}
        try:
            value = read_json(self._path, "checkpoint")
            if value["format"] != _FORMAT or value["fingerprint"] != self._fingerprint:
                return {}
            progress: dict[str, Any] = value["progress"]
        except (ArtifactError, KeyError, TypeError):
            # Missing, of another request or damaged: it is only a shortcut, the search starts over.
            return {}
        return progress

    def save(self, progress: dict[str, Any], *, now: bool = False) -> None:
        """Write the progress, if the last time is long enough ago or `now`.

        Raises:
            ArtifactError: the file cannot be written.
        """
        if self._path is None or not (now or time.monotonic() - self._saved > _SECONDS_BETWEEN):
            return
        write_json(self._path, {"format": _FORMAT, "fingerprint": self._fingerprint, "progress": progress})
        self._saved = time.monotonic()


def _fingerprint(request: Request) -> str:
    """Identity of all that decides the result."""
    assert request.model is not None and request.ids_WT is not None
    return hash_of(
        {
            "foldgpt": foldgpt.__version__,
            "model": weights_fingerprint(request.model),
            "ids": ids_fingerprint(request.ids_WT),
            "num_remove": request.num_remove,
            "seed": request.seed,
            "objective": request.objective,
            "compensate": request.compensate,
            "sublayers": request.sublayers,
            "options": dict(request.options),
        }
    )

"""The checkpoint of a search: what it has found and what that has taken, so that a stopped one goes on where it was."""

from __future__ import annotations

from typing import Any

from foldgpt.fingerprints import ids_fingerprint
from foldgpt.progress_file import ProgressFile, computed_with
from foldgpt.selection.cost import RemovalCost
from foldgpt.selection.selection import Request

_FORMAT = "foldgpt.search-checkpoint"
_SECONDS_BETWEEN = 20.0


class Checkpoint:
    """Where a search keeps its progress, if the request names a place.

    Args:
        method: the selector.
        request: the request.
        cost: its measure. What the search took before it was stopped is added to what this one counts.

    Attributes:
        found: what was saved for this request; empty if there is nothing.

    Raises:
        ArtifactError: the checkpoint could not be written.
    """

    def __init__(self, method: str, request: Request, cost: RemovalCost) -> None:
        self._cost = cost
        self._file = ProgressFile(
            request.checkpoint, _FORMAT, lambda: _identity(method, request), seconds_between=_SECONDS_BETWEEN
        )
        self.found = self._file.load()
        if self.found:
            cost.add_spent(self.found["seconds"], self.found["forward_equivalents"])

    def save(self, progress: dict[str, Any], *, now: bool = False) -> None:
        """Write the progress and what it has taken, if the last time is long enough ago or `now`.

        Args:
            progress: JSON values.
            now: write it in any case.

        Raises:
            ArtifactError: the checkpoint cannot be written.
        """
        cost = self._cost
        spent = {"seconds": cost.seconds, "forward_equivalents": cost.forward_equivalents}
        self._file.save(lambda: {**progress, **spent}, now=now)


def _identity(method: str, request: Request) -> dict[str, Any]:
    """All that decides the result."""
    assert request.model is not None and request.ids_WT is not None
    return {
        **computed_with(request.model),
        "method": method,
        "ids": ids_fingerprint(request.ids_WT),
        "further_ids": None if request.further_ids_WT is None else ids_fingerprint(request.further_ids_WT),
        "copies": request.copies,
        "num_remove": request.num_remove,
        "seed": request.seed,
        "objective": request.objective,
        "compensate": request.compensate,
        "sublayers": request.sublayers,
        "options": dict(request.options),
    }

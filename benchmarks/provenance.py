"""How each row of a benchmark was measured: rows of one table may come from several calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from command import command_line
from foldgpt.environment import describe_environment

_KEPT = ("foldgpt", "python", "torch", "transformers", "cpu", "torch_threads", "ram_gb", "date")


def measured_by() -> dict[str, Any]:
    """The command and the machine of this call, to be kept in each row that it measures."""
    environment = describe_environment()
    return {"command": command_line(), "environment": {name: environment[name] for name in _KEPT}}


def provenance_lines(calls: Iterable[Mapping[str, Any]], seed: int) -> str:
    """The commands and machines behind a table, each once, in the order of the rows.

    Args:
        calls: what `measured_by` returned, of every row.
        seed: that all were called with.
    """
    paragraphs = []
    for call in calls:
        environment = call["environment"]
        paragraph = (
            f"`{' '.join(call['command'])}`, seed {seed}.\n"
            f"{environment['cpu']}, {environment['torch_threads']} threads, {environment['ram_gb']} GB RAM,\n"
            f"foldgpt {environment['foldgpt']}, torch {environment['torch']}, transformers "
            f"{environment['transformers']}, {environment['date'].partition('T')[0]}."
        )
        if paragraph not in paragraphs:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)

"""How each row of a benchmark was measured: rows of one table may come from several calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from command import as_typed, command_line
from foldgpt.environment import describe_environment

_KEPT = (
    "foldgpt",
    "python",
    "torch",
    "transformers",
    "cpu",
    "torch_threads",
    "omp_wait_policy",
    "ram_gb",
    "gpu",
    "date",
)


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
    return "\n\n".join(dict.fromkeys(provenance_of({**call, "seed": seed}) for call in calls))


def provenance_of(result: Mapping[str, Any]) -> str:
    """The command, the seed if there is one, and the machine of a result that one call has measured."""
    environment, seed = result["environment"], result.get("seed")
    machine = ", ".join(filter(None, (environment["cpu"], environment.get("gpu"))))
    waiting = environment.get("omp_wait_policy")
    return (
        f"`{as_typed(result['command'])}`{'' if seed is None else f', seed {seed}'}.\n"
        f"{machine}, {environment['torch_threads']} threads{f' waiting {waiting}' if waiting else ''}, "
        f"{environment['ram_gb']} GB RAM,\n"
        f"foldgpt {environment['foldgpt']}, torch {environment['torch']}, transformers "
        f"{environment['transformers']}, {environment['date'].partition('T')[0]}."
    )

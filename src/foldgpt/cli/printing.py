"""Results on standard output: tables, paths, JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from foldgpt.comparison import Comparison


def print_shown(shown: Any) -> None:
    """Print what rich can draw, a table or a text."""
    from rich.console import Console

    console = Console()
    # Redirected output has no width of its own; a table cut to 80 columns loses its labels.
    if not console.is_terminal:
        console = Console(width=120)
    console.print(shown)


def print_comparison(comparison: Comparison, *, as_json: bool) -> None:
    """Print the tables of a comparison and how they were measured, or all of it as JSON."""
    from foldgpt.comparison import difference_table, method_table, notes_of, task_accuracy_table

    if as_json:
        print_json(comparison.to_dict())
        return
    for table in (method_table(comparison), difference_table(comparison), task_accuracy_table(comparison)):
        if table.row_count:
            print_shown(table)
    for line in notes_of(comparison):
        typer.echo(line)


def print_paths(paths: list[Path]) -> None:
    """Print what was written, a line each."""
    for path in paths:
        typer.echo(str(path))


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")

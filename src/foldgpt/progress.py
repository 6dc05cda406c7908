"""Progress bars for anything that takes longer than a second, and a way to silence them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

#: Progress and messages go to stderr, so that stdout carries results alone (`--json` can be piped).
console = Console(stderr=True)


class Bar:
    """One running bar. `advance(n)` moves it; it draws nothing while the console is quiet."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: float = 1) -> None:
        self._progress.advance(self._task, amount)  # type: ignore[arg-type]


@contextmanager
def bar(description: str, total: float) -> Iterator[Bar]:
    """Show a progress bar on stderr while the block runs.

    Args:
        description: what is being done, in a few words.
        total: how many steps make the whole.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as progress:
        yield Bar(progress, progress.add_task(description, total=total))


def note(message: str) -> None:
    """Print one line for the user on stderr, unless quiet."""
    console.print(message, highlight=False, markup=False)


def be_quiet(quiet: bool = True) -> None:
    """Silence (or restore) progress bars and notes for this process."""
    console.quiet = quiet

"""Progress bars for anything that takes longer than a second, and a way to silence them."""

from __future__ import annotations

import logging
import os
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


def is_first_process() -> bool:
    """Whether this process speaks for all that share the work, as `torchrun` and `accelerate` number them.

    They set both variables; with RANK alone, as some job queues have it, nobody shares anything.
    """
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


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
    if not console.is_terminal:
        # A log file gets one line instead of a bar.
        note(description)
    hidden = console.quiet or not console.is_terminal or not is_first_process()
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield Bar(progress, progress.add_task(description, total=total))


def note(message: str) -> None:
    """Print one line for the user on stderr, unless quiet; of several processes that share the work the first does."""
    if is_first_process():
        console.print(message, highlight=False, markup=False, soft_wrap=True)


def be_quiet(quiet: bool = True) -> None:
    """Silence (or restore) progress bars and notes for this process."""
    console.quiet = quiet


@contextmanager
def silently(quiet: bool = True) -> Iterator[None]:
    """No bars and notes (or, with False, bars and notes) while the block runs."""
    before = console.quiet
    console.quiet = quiet
    try:
        yield
    finally:
        console.quiet = before


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bars and reports of transformers and accelerate: what matters in them is raised as an error here."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    accelerate_log = logging.getLogger("accelerate.big_modeling")
    accelerate_level = accelerate_log.level
    transformers_logging.set_verbosity_error()
    accelerate_log.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        accelerate_log.setLevel(accelerate_level)
        if bars:
            transformers_logging.enable_progress_bar()

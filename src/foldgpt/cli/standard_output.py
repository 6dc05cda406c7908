"""Standard output, which is for results alone: what libraries print, of whatever kind, would break a JSON document."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TextIO

import typer

_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)


@contextmanager
def results_alone() -> Iterator[None]:
    """What is printed goes to standard error meanwhile, but for results."""
    token = _RESULTS.set(results())
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(token)


def results() -> TextIO:
    """The stream for results."""
    return _RESULTS.get() or sys.stdout


def say(line: str) -> None:
    """Print a line that is, or belongs to, a result."""
    typer.echo(line, file=results())

"""The frame in which every verb runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def session(quiet: bool) -> Iterator[None]:
    """What all verbs have in common: quietness, and errors as one line and an exit code."""
    from foldgpt.allocator import keep_freed_memory
    from foldgpt.errors import FoldGPTError
    from foldgpt.progress import silently

    # A command's buffers are allocated and freed all the time; returning them to the system costs more than the work.
    keep_freed_memory()
    try:
        with silently(quiet):
            yield
    except FoldGPTError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("stopped; what was finished is kept", err=True)
        raise typer.Exit(130) from None

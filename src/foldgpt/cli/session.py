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
    except BrokenPipeError:
        # Whoever reads the output, such as `head`, has enough: typer ends quietly.
        raise
    except OSError as error:
        typer.echo(f"error: {_in_words(error)}", err=True)
        raise typer.Exit(FoldGPTError.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("stopped; what was finished is kept", err=True)
        raise typer.Exit(130) from None


def _in_words(error: OSError) -> str:
    """Which file or folder, and what is wrong with it; for an error of a library its own first line."""
    from foldgpt.errors import first_line

    if error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return first_line(error)

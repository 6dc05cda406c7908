"""The frame in which every verb runs."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import typer

from foldgpt.cli.flags import in_flags
from foldgpt.cli.standard_output import results_alone

#: What is said after an interruption: of what goes on, and of what begins anew.
AGAIN, ANEW = "The same command goes on from the last checkpoint, if there is one.", "Nothing half-written is left."


@contextmanager
def session(
    quiet: bool, flags: Mapping[str, str] | None = None, *, recipe: bool = False, again: str = ""
) -> Iterator[None]:
    """What all verbs have in common: quietness, results of one process, and errors as one line and an exit code.

    Args:
        quiet: show no progress and no notes.
        flags: key of a recipe → flag that sets it, so that errors speak of flags.
        recipe: the keys may stand in a recipe of the user's as well.
        again: what to do after an interruption, as a sentence.
    """
    from foldgpt.allocator import keep_freed_memory
    from foldgpt.errors import FoldGPTError, is_out_of_memory
    from foldgpt.progress import silently

    # A command's buffers are allocated and freed all the time; returning them to the system costs more than the work.
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        # Redirected on Windows, or in the locale C, it may know no more than a few hundred characters.
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")
    try:
        with silently(quiet), _results_once():
            yield
    except FoldGPTError as error:
        message = str(error) if flags is None else in_flags(str(error), flags, beside_keys=recipe)
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        # Whoever reads the output, such as `head`, has enough: typer ends quietly.
        raise
    except OSError as error:
        typer.echo(f"error: {_in_words(error)}", err=True)
        raise typer.Exit(FoldGPTError.exit_code) from None
    except KeyboardInterrupt:
        typer.echo(" ".join(filter(None, ["stopped.", again])), err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"allocate (\d[\d.]* \w+)", str(error))
        amount = f" ({asked[1]} more were asked for)" if asked else ""
        typer.echo(
            f"error: out of memory{amount}. --dtype bfloat16 takes less and, in a recovery, the settings "
            "micro_batch_size=1 and gradient_checkpointing=true do; another --device may have more.",
            err=True,
        )
        raise typer.Exit(FoldGPTError.exit_code) from None


@contextmanager
def output_file(path: Path | None, *, overwrite: bool) -> Iterator[None]:
    """Hold the place of a file that a verb will write in the end; None where it writes none.

    Raises:
        ArtifactError: it is taken, a run's, cannot be written, or another process is about to write it.
    """
    from foldgpt.artifacts import alone, check_free_file, no_empty_folders_above
    from foldgpt.progress import is_first_process
    from foldgpt.run_folder import check_is_no_runs

    if path is None:
        yield
        return
    check_is_no_runs(path)
    check_free_file(path, replace=overwrite)
    # Of several processes that share the work the first one writes, and so is the one that holds it.
    with no_empty_folders_above(path), alone(path, wait=False) if is_first_process() else nullcontext():
        # Again: another process may have ended between the two.
        check_free_file(path, replace=overwrite)
        yield


@contextmanager
def _results_once() -> Iterator[None]:
    """Of several processes that share the work let the first print its results; two JSON documents are none.

    Errors go to stderr and are printed by each: what one process alone runs into is to be seen.
    """
    from foldgpt.progress import is_first_process

    if is_first_process():
        with results_alone():
            yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _in_words(error: OSError) -> str:
    """Which file or folder, and what is wrong with it; for an error of a library its own first line."""
    from foldgpt.errors import first_line

    if error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return first_line(error)

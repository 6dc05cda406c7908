"""What can go wrong, in words a user can act on.

Every error that a user can cause is a `FoldGPTError`: one message that names the value, the place and,
where there is one, the nearest valid choice. The command line prints the message alone; a traceback is
shown only for faults of our own.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

#: What PyTorch says where the memory of the machine, or of a device, is full.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")


class FoldGPTError(Exception):
    """Base of all errors that foldgpt raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(FoldGPTError):
    """The request itself is wrong: an unknown name, a value out of range, options that contradict."""

    exit_code = 2


class NotFiniteError(UsageError):
    """A model whose states are beyond what its number format holds."""


class PlanError(UsageError):
    """A fold plan that contradicts itself or does not fit the model it is applied to."""


class SourceError(FoldGPTError):
    """A model or a text that cannot be found, read or understood."""


class UnsupportedModelError(SourceError):
    """A model that can be read but that foldgpt cannot fold correctly, so it refuses."""


class ArtifactError(FoldGPTError):
    """A file of a run that is missing, corrupt, or cannot be written."""


class VerificationError(FoldGPTError):
    """A folded model that does not do what its plan promises. Nothing is left under the final name."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_problem(error: ValidationError) -> str:
    """Where the values of a file are wrong first, and how."""
    first = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """A suffix for an error message: the nearest valid choice, or all of them when none is near.

    Args:
        value: what was given.
        choices: what would have been valid.
    """
    choices = sorted(choices)
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Valid choices: {', '.join(choices)}." if choices else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine, or of a device, was full."""
    # Looked up: importing torch would take seconds, and who has not imported it did not run out of memory in it.
    of_torch = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if isinstance(error, (MemoryError, of_torch)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)

"""Errors of the libraries that read models, as one kind with one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foldgpt.errors import SourceError, first_line


@contextmanager
def as_source_errors(place: Path) -> Iterator[None]:
    """Pass errors of libraries on as a `SourceError` that names the place."""
    try:
        yield
    except Exception as error:  # from_pretrained passes on errors of half a dozen libraries
        raise SourceError(f"cannot load {place}: {first_line(error)}") from error

"""Bars and notes go to stderr and can be silenced; stdout is for results."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from foldgpt import progress
from foldgpt.progress import bar, be_quiet, note


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """A terminal in memory, in place of stderr."""
    output = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=output, force_terminal=True, width=80))
    yield output
    be_quiet(False)


def test_a_note_is_printed_as_it_is(screen: io.StringIO) -> None:
    note("kept [3, 4] of [bold]6[/bold] blocks")
    assert screen.getvalue() == "kept [3, 4] of [bold]6[/bold] blocks\n"


def test_a_bar_shows_its_progress_and_goes_away(screen: io.StringIO) -> None:
    with bar("Analysing", total=4) as running:
        running.advance()
        running.advance(2)
    drawn = screen.getvalue()
    assert "Analysing" in drawn and "3/4" in drawn
    assert drawn.rstrip().endswith("\x1b[2K"), "its line is erased at the end"


def test_quiet_means_nothing_at_all(screen: io.StringIO) -> None:
    be_quiet()
    note("a note")
    with bar("Analysing", total=2) as running:
        running.advance()
    assert screen.getvalue() == ""
    be_quiet(False)
    note("a note")
    assert screen.getvalue() == "a note\n"


def test_stdout_stays_clean(capfd: pytest.CaptureFixture[str]) -> None:
    """`foldgpt … --json | jq` must get JSON alone."""
    note("a note")
    with bar("Analysing", total=1) as running:
        running.advance()
    out, err = capfd.readouterr()
    assert out == "" and "a note" in err


def test_a_bar_that_is_left_by_an_error_lets_it_through(screen: io.StringIO) -> None:
    with pytest.raises(KeyboardInterrupt), bar("Analysing", total=2):
        raise KeyboardInterrupt
    note("after")
    assert screen.getvalue().endswith("after\n")


def test_libraries_are_quiet_only_inside() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(KeyboardInterrupt), progress.quiet_libraries():
        assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
        raise KeyboardInterrupt
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before

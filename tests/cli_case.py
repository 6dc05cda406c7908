"""Calling the command line, and what its tests ask it for."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from foldgpt.cli import app

CALIBRATION = ("--context", 32, "--tokens", 256)


def foldgpt(*arguments: object) -> Result:
    """What a command prints and the code it ends with."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])

"""The command line: one verb for each step, and `run` for all of them.

Nothing heavy is imported at the top of these files: it waits until a verb really runs, so that `--help` answers at
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from foldgpt import __version__
from foldgpt.cli.export_verb import export
from foldgpt.cli.plan_verb import plan
from foldgpt.cli.recipes import compare, run, schema
from foldgpt.cli.results import push, report, show
from foldgpt.cli.stages import analyze, evaluate, fold, recover

#: In the order in which `--help` lists them: the stages as they follow each other, whole recipes, what there is.
_VERBS: dict[str, Callable[..., Any]] = {
    "analyze": analyze,
    "plan": plan,
    "fold": fold,
    "recover": recover,
    "eval": evaluate,
    "run": run,
    "compare": compare,
    "show": show,
    "report": report,
    "export": export,
    "push": push,
    "schema": schema,
}


class _Verbs(TyperGroup):
    """The verbs; ~ is the home folder in `--out=~/x` too, where shells leave it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_at_home(arg) for arg in args])


def _at_home(arg: str) -> str:
    name, _, value = arg.partition("=")
    if not (name.startswith("--") and f"{value}/".startswith("~/")):
        return arg
    from foldgpt.artifacts import from_home

    return f"{name}={from_home(value)}"


app = typer.Typer(
    name="foldgpt",
    cls=_Verbs,
    help="Make large language models smaller in depth: find redundant blocks, remove them, let the rest share weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, verb in _VERBS.items():
    app.command(name)(verb)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"foldgpt {__version__}")
        raise typer.Exit


@app.callback()
def _without_verb(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `foldgpt` command."""
    app()

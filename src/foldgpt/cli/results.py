"""Verbs for what is there: show, report, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foldgpt.cli.options import (
    AsJson,
    Quiet,
)
from foldgpt.cli.printing import print_comparison, print_evaluation, print_json, print_paths, print_strip
from foldgpt.cli.session import session


def show(
    path: Annotated[
        Path, typer.Argument(help="A plan, a folded model, or the folder of a run or comparison.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Show a plan as a strip of blocks, a run's measurements, or the tables of a comparison."""
    with session(quiet=True):
        from foldgpt.artifacts import read_json
        from foldgpt.comparison import COMPARISON, Comparison
        from foldgpt.errors import ArtifactError
        from foldgpt.evaluation import Evaluation
        from foldgpt.plan import FoldPlan

        if (path / COMPARISON).is_file():
            print_comparison(Comparison.load(path), as_json=as_json)
            return
        plan_path = path / "plan.json" if path.is_dir() else path
        if path.is_dir() and not plan_path.is_file():
            raise ArtifactError(
                f"{path} holds neither plan.json nor {COMPARISON}: it is no run, folded model or comparison"
            )
        made = FoldPlan.load(plan_path)
        evaluation_path = path / "evaluation.json"
        measured = Evaluation.load(evaluation_path) if path.is_dir() and evaluation_path.is_file() else None
        if as_json:
            shown = {"plan": made.to_json_dict()}
            if measured is not None:
                shown["evaluation"] = read_json(evaluation_path)
            print_json(shown)
            return
        print_strip(made)
        if measured is not None:
            print_evaluation(measured)


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run or comparison.", show_default=False)],
    quiet: Quiet = False,
) -> None:
    """Build the page of a run or comparison anew: one HTML file that needs no network."""
    with session(quiet):
        from foldgpt.comparison import COMPARISON, Comparison
        from foldgpt.report import build_report, write_comparison

        if (run / COMPARISON).is_file():
            print_paths([write_comparison(Comparison.load(run), run)["html"]])
        else:
            print_paths([build_report(run)])


def push(
    folder: Annotated[Path, typer.Argument(help="A folded model, or the folder of a run.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Repository on the hub: OWNER/NAME.", show_default=False)],
    private: Annotated[
        bool | None, typer.Option(help="Make a new repository private.", show_default="as the account says")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.", show_default=False)] = None,
    quiet: Quiet = False,
) -> None:
    """Upload a folded model to the hub, card included; needs a token (hf auth login)."""
    with session(quiet):
        from foldgpt import hub

        typer.echo(hub.push(folder, repo, private=private, revision=revision))

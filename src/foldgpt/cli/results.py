"""Verbs for what is there: show, report, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foldgpt.cli.options import AsJson, Quiet
from foldgpt.cli.printing import print_paths
from foldgpt.cli.session import session
from foldgpt.cli.showing import show_path
from foldgpt.cli.standard_output import say


def show(
    path: Annotated[
        Path,
        typer.Argument(
            help="A file that plan, analyze or eval wrote, a folded or recovered model, or the folder of a run or "
            "comparison.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show a plan, an analysis, measurements, a recovery or a comparison."""
    with session(quiet=True):
        show_path(path, as_json=as_json)


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run or comparison.", show_default=False)],
    quiet: Quiet = False,
) -> None:
    """Build the page of a run or comparison anew: one HTML file that needs no network."""
    with session(quiet):
        from foldgpt.comparison import COMPARISON, Comparison
        from foldgpt.errors import ArtifactError
        from foldgpt.report import build_report, write_comparison
        from foldgpt.run_folder import PLAN, command_to_go_on

        command = None if (run / PLAN).is_file() else command_to_go_on(run)
        if (run / COMPARISON).is_file():
            print_paths([write_comparison(Comparison.load(run), run)["html"]])
        elif command is not None:
            raise ArtifactError(f"{run} is not far enough for a page. To go on: {command}")
        else:
            print_paths([build_report(run)])


def push(
    folder: Annotated[Path, typer.Argument(help="A folded model, or the folder of a run.", show_default=False)],
    repo: Annotated[
        str,
        typer.Argument(
            help="Repository on the hub: OWNER/NAME, or a NAME alone for your own account.", show_default=False
        ),
    ],
    private: Annotated[
        bool | None, typer.Option(help="Make a new repository private.", show_default="as the account says")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.", show_default=False)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model there that is no folded one.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the model and list what would be uploaded; needs no network.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Upload a folded model to the hub, card included; needs a token (hf auth login)."""
    with session(quiet):
        from foldgpt import hub
        from foldgpt.formats import megabytes

        if dry_run:
            upload = hub.check_upload(folder, repo)
            for name, size in upload.files.items():
                say(f"{megabytes(size):>14}  {name}")
            say(f"{megabytes(sum(upload.files.values())):>14}  from {upload.folder} to {repo}")
            if upload.left:
                say(f"left out, not known as a part of a checkpoint: {', '.join(upload.left)}")
            return
        say(hub.push(folder, repo, private=private, revision=revision, overwrite=overwrite))

"""The verb that decides: plan."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foldgpt.cli.flags import PLAN
from foldgpt.cli.options import (
    AsJson,
    Compensate,
    Context,
    Copies,
    Device,
    Donor,
    DType,
    Fit,
    GroupSize,
    MaxMemory,
    Model,
    Objective,
    Overwrite,
    Quiet,
    Rank,
    Remove,
    RemoveRatio,
    Revision,
    Scales,
    SearchTokens,
    Seed,
    Select,
    SelectorOption,
    ShareMethod,
    Size,
    Start,
    Sublayers,
    Target,
    Texts,
    Tokens,
    TrustRemoteCode,
)
from foldgpt.cli.printing import print_json, print_paths, print_plan
from foldgpt.cli.requests import (
    calibration_of,
    check_objective,
    check_search_text,
    like_analysis,
    recipe_of,
    say_what_is_not_read,
    select_of,
)
from foldgpt.cli.session import AGAIN, output_file, session

if TYPE_CHECKING:
    from foldgpt.recipe import Recipe

#: What of a plan that is being made is kept beside it.
_PROGRESS = ("analysis", "search", "sharing")


def plan(
    model: Model,
    out: Annotated[Path, typer.Option(help="The plan, a JSON file that may be edited.")] = Path("plan.json"),
    text: Texts = None,
    analysis: Annotated[
        Path | None,
        typer.Option(
            help="For bi and angular: an analysis made before (file or run folder), instead of measuring anew. Its "
            "text, context, tokens and seed are what holds here too, where they are not given.",
            show_default=False,
        ),
    ] = None,
    select: Select = None,
    remove: Remove = None,
    remove_ratio: RemoveRatio = None,
    target: Target = None,
    search_tokens: SearchTokens = None,
    copies: Copies = None,
    objective: Objective = None,
    sublayers: Sublayers = None,
    option: SelectorOption = None,
    compensate: Compensate = None,
    share: ShareMethod = None,
    size: Size = None,
    group_size: GroupSize = None,
    donor: Donor = None,
    fit: Fit = None,
    rank: Rank = None,
    scales: Scales = None,
    start: Start = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            help="Folder to draw what is cut into, and the paths of the gates; with bi and angular the analysis as "
            "well.",
            show_default=False,
        ),
    ] = None,
    context: Context = None,
    tokens: Tokens = None,
    revision: Revision = None,
    dtype: DType = None,
    device: Device = None,
    seed: Seed = None,
    max_memory_gb: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Decide which blocks are removed and which share weights."""
    with session(quiet, PLAN, again=AGAIN), output_file(out, overwrite=overwrite):
        from foldgpt import planning, steps
        from foldgpt.artifacts import check_writable_folder
        from foldgpt.checks import check_plan
        from foldgpt.errors import UsageError
        from foldgpt.run_folder import check_is_no_runs
        from foldgpt.selection import ANALYSIS_FREE, SELECTORS
        from foldgpt.workbench import Workbench

        if figures is not None:
            check_is_no_runs(figures)
            check_writable_folder(figures)
        calibration = calibration_of(text, context, tokens)
        recipe = recipe_of(
            model=model,
            revision=revision,
            dtype=dtype,
            device=device,
            seed=seed,
            max_memory_gb=max_memory_gb,
            trust_remote_code=trust_remote_code,
            calibration=calibration,
            select=select_of(
                method=select,
                remove=remove,
                remove_ratio=remove_ratio,
                target=target,
                search_tokens=search_tokens,
                copies=copies,
                objective=objective,
                sublayers=sublayers,
                options=option,
            ),
            compensate={"method": compensate},
            share={
                "method": share,
                "size": size,
                "group_size": group_size,
                "donor": donor,
                "fit": fit,
                "rank": rank,
                "scales": scales,
                "start": start,
            },
        )
        method = recipe.select.method
        measured = None
        if analysis is not None:
            if method in ANALYSIS_FREE:
                raise UsageError(
                    f"--analysis with the selector {method!r}, which reads none: leave it out, or --select one of "
                    f"{', '.join(sorted(SELECTORS.keys() - ANALYSIS_FREE))}"
                )
            measured = steps.read_analysis(analysis)
            recipe = recipe.changed(**like_analysis(measured, calibration, seed))
        bench = Workbench(recipe)
        analyses = analysis is None and method not in ANALYSIS_FREE
        check_search_text(search_tokens, copies, recipe, analyses=analyses)
        about_text = {"--text": text, "--context": context, "--tokens": tokens}
        say_what_is_not_read(about_text, recipe, analyses=analyses)
        check_objective(objective, recipe)
        check_plan(bench)
        sweep, search, sharing = _progress_beside(out, recipe)
        if analysis is not None and measured is not None:
            steps.check_analysis(measured, bench, analysis)
        elif analyses:
            measured = steps.make_analysis(bench, sweep)
        selection = planning.make_selection(bench, measured, search)
        made = planning.make_plan(bench, selection, measured, sharing)
        made.save(out)
        planning.drop_search(search)
        for checkpoint in (sweep, sharing):
            checkpoint.unlink(missing_ok=True)
        drawn = [] if figures is None else steps.draw(measured, made, figures)
        if as_json:
            print_json(made.to_json_dict())
        else:
            print_plan(made)
            print_paths([out, *drawn])


def _progress_beside(out: Path, recipe: Recipe) -> list[Path]:
    """Where the sweep and the searches are, until the plan that is made of them is there.

    Those of other flags, which may have taken hours, have names of their own; that there are some is said.

    Args:
        out: the plan to be.
        recipe: of the flags.
    """
    from foldgpt.artifacts import hash_of
    from foldgpt.progress import note

    whole = recipe.model_dump(mode="json")
    swept = {name: whole[name] for name in ("model", "revision", "dtype", "device", "seed", "calibration")}
    searched = {**swept, "select": whole["select"], "compensate": whole["compensate"], "size": recipe.share.size}
    decides = {"analysis": swept, "search": searched, "sharing": {**searched, "share": whole["share"]}}
    own = [out.with_name(f".{out.name}.{hash_of(decides[what])[:8]}.{what}") for what in _PROGRESS]
    left = [path for what in _PROGRESS for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.*.{what}"))]
    others = [path.name for path in left if path not in own]
    if others:
        note(f"{', '.join(others)}: begun for {out} with other flags, which go on from there")
    return own

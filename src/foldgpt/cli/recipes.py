"""Verbs for whole recipes: run, compare, schema."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foldgpt.assignments import assignments
from foldgpt.cli.flags import COMPARE, OPTIONS, RUN
from foldgpt.cli.options import (
    DEVICES,
    AsJson,
    Compensate,
    Context,
    Copies,
    Device,
    Devices,
    Donor,
    DryRun,
    DType,
    Fit,
    GroupSize,
    MaxMemory,
    Objective,
    Perplexity,
    Quiet,
    Rank,
    RecipeValues,
    RecoverMinutes,
    RecoverSettings,
    RecoverTexts,
    RecoverTokens,
    Remove,
    RemoveRatio,
    Revision,
    SaveDType,
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
    Teraflops,
    Texts,
    Tokens,
    TrustRemoteCode,
    left_out,
)
from foldgpt.cli.printing import print_comparison, print_json, print_paths, print_shown
from foldgpt.cli.requests import (
    calibration_of,
    check_objective,
    check_recovers,
    check_search_text,
    recover_of,
    select_of,
)
from foldgpt.cli.session import session
from foldgpt.cli.showing import show_path
from foldgpt.cli.standard_output import say

if TYPE_CHECKING:
    from foldgpt.recipe import Recipe

#: What is said after an interruption.
_AGAIN = "The same command goes on where it was."


@left_out("the recipe's, else {}")
def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="recipe.yaml; without one, the flags and their defaults are the recipe.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/latest"),
    model: Annotated[str | None, typer.Option(help="Model, in place of the recipe's.", show_default=False)] = None,
    revision: Revision = None,
    text: Texts = None,
    context: Context = None,
    tokens: Tokens = None,
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
    recover_tokens: RecoverTokens = None,
    recover_text: RecoverTexts = None,
    recover_minutes: RecoverMinutes = None,
    recover_set: RecoverSettings = None,
    perplexity: Perplexity = None,
    values: RecipeValues = None,
    dtype: DType = None,
    save_dtype: SaveDType = None,
    device: Device = None,
    seed: Seed = None,
    max_memory_gb: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Take over the folder of another recipe; what still fits is kept.")
    ] = False,
    dry_run: DryRun = False,
    tflops: Teraflops = None,
    devices: Devices = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a whole recipe: analyse, plan, fold, verify, measure, draw."""
    with session(quiet, RUN, recipe=recipe is not None or bool(values), again="" if dry_run else _AGAIN):
        from foldgpt.errors import UsageError
        from foldgpt.recipe import Recipe

        _check_dry_run(dry_run, tflops, devices)
        if recipe is None and model is None:
            raise UsageError("name a recipe file, or a model with --model")
        place = OPTIONS if recipe is None else "recipe"
        base = Recipe.from_dict({"model": model}, OPTIONS) if recipe is None else Recipe.load(recipe)
        changes: dict[str, Any] = {
            "model": model,
            "revision": revision,
            "dtype": dtype,
            "save_dtype": save_dtype,
            "device": device,
            "seed": seed,
            "max_memory_gb": max_memory_gb,
            "trust_remote_code": trust_remote_code,
            "calibration": calibration_of(text, context, tokens),
            "select": select_of(
                method=select,
                remove=remove,
                remove_ratio=remove_ratio,
                target=target,
                search_tokens=search_tokens,
                copies=copies,
                objective=objective,
                sublayers=sublayers,
                options=option,
                over=base,
            ),
            "compensate": {"method": compensate},
            "share": {
                "method": share,
                "size": size,
                "group_size": group_size,
                "donor": donor,
                "fit": fit,
                "rank": rank,
                "scales": scales,
                "start": start,
            },
            "recover": recover_of(
                recover_tokens,
                recover_text,
                recover_minutes,
                recover_set,
                over=base.recover.settings,
            ),
            "evaluate": {"texts": perplexity},
        }
        whole = base.changed(assignments(values or ()), place=place, **changes)
        check_search_text(search_tokens, copies, whole, analyses=True)
        check_objective(objective, whole)
        check_recovers({"text": recover_text, "minutes": recover_minutes, "set": recover_set}, whole)

        if dry_run:
            _dry_run(whole, compare=False, tflops=tflops, devices=devices, as_json=as_json)
            return

        from foldgpt import pipeline

        result = pipeline.run(whole, out, overwrite=overwrite)
        if as_json:
            print_json(result.evaluation.to_dict())
        else:
            show_path(result.path)
            print_paths([result.model, *result.figures, result.report])


@left_out("the recipe's")
def compare(
    recipe: Annotated[
        Path, typer.Argument(help="recipe.yaml; its compare section says which rows.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The folder of the comparison.")] = Path("runs/comparison"),
    model: Annotated[str | None, typer.Option(help="Model, in place of the recipe's.", show_default=False)] = None,
    revision: Revision = None,
    remove: Remove = None,
    remove_ratio: RemoveRatio = None,
    target: Target = None,
    recover_tokens: RecoverTokens = None,
    values: RecipeValues = None,
    dtype: DType = None,
    save_dtype: SaveDType = None,
    device: Device = None,
    seed: Seed = None,
    max_memory_gb: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Take over the folder of another comparison; what still fits is kept.")
    ] = False,
    dry_run: DryRun = False,
    tflops: Teraflops = None,
    devices: Devices = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Put methods side by side on one model: a run for each, one table with intervals."""
    with session(quiet, COMPARE, recipe=True, again="" if dry_run else _AGAIN):
        from foldgpt.recipe import Recipe

        _check_dry_run(dry_run, tflops, devices)
        whole = Recipe.load(recipe).changed(
            assignments(values or ()),
            model=model,
            revision=revision,
            dtype=dtype,
            save_dtype=save_dtype,
            device=device,
            seed=seed,
            max_memory_gb=max_memory_gb,
            trust_remote_code=trust_remote_code,
            select={"remove": remove, "remove_ratio": remove_ratio, "target": target},
            recover={"num_tokens": recover_tokens},
        )

        if dry_run:
            _dry_run(whole, compare=True, tflops=tflops, devices=devices, as_json=as_json)
            return

        from foldgpt import side_by_side

        result = side_by_side.compare(whole, out, overwrite=overwrite)
        print_comparison(result, as_json=as_json)
        if not as_json:
            print_paths(sorted(out.glob("comparison.*")))


def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from foldgpt.recipe import Recipe

    print_json(Recipe.model_json_schema())


def _check_dry_run(dry_run: bool, tflops: float | None, devices: int | None) -> None:
    """Refuse what only a dry run reads.

    Raises:
        UsageError: it is given, and there is no dry run; or the number of devices, and no speed to divide by.
    """
    from foldgpt.errors import UsageError

    idle = [flag for flag, value in (("--tflops", tflops), ("--devices", devices)) if value is not None]
    if idle and not dry_run:
        raise UsageError(f"{' and '.join(idle)} without --dry-run: there is nothing to apply that to")
    if devices is not None and tflops is None:
        raise UsageError("--devices without --tflops: there is no time to divide; say what one device sustains")


def _dry_run(recipe: Recipe, *, compare: bool, tflops: float | None, devices: int | None, as_json: bool) -> None:
    """Rehearse a recipe and say what the real one takes."""
    from dataclasses import asdict

    from foldgpt.rehearsal import expectation_lines, expectation_table, rehearse

    devices = devices or DEVICES
    found = rehearse(recipe, compare=compare)
    if as_json:
        seconds = None if tflops is None else found.seconds(tflops * 1e12, devices=devices)
        print_json({**asdict(found), "flops": found.flops, "seconds": seconds})
        return
    print_shown(expectation_table(found, teraflops=tflops, devices=devices))
    for line in expectation_lines(found, teraflops=tflops, devices=devices):
        say(line)

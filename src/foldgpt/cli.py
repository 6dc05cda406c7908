"""The command line: one verb for each step, and `run` for all of them.

Only typer is imported here at the top: everything heavy waits until a verb really runs, so that `--help` answers
at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foldgpt.assignments import assignments
from foldgpt.counts import count
from foldgpt.options import (
    AsJson,
    Compensate,
    Context,
    Device,
    Devices,
    Donor,
    DryRun,
    DType,
    Fit,
    GroupSize,
    MaxMemory,
    Model,
    Overwrite,
    Quiet,
    Rank,
    RecoverTokens,
    Remove,
    RemoveRatio,
    Revision,
    Scales,
    Seed,
    Select,
    ShareMethod,
    Size,
    Start,
    Teraflops,
    Texts,
    Tokens,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from foldgpt.comparison import Comparison
    from foldgpt.recipe import Recipe

app = typer.Typer(
    name="foldgpt",
    help="Make large language models smaller in depth: find redundant blocks, remove them, let the rest share weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def analyze(
    model: Model,
    out: Annotated[Path, typer.Option(help="Run folder; analysis.json and figures are written there.")],
    text: Texts = None,
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
    """Measure how redundant each block is: similarity, block influence, angular distance."""
    with _session(quiet):
        from foldgpt import steps
        from foldgpt.artifacts import check_free_file, write_json
        from foldgpt.run_folder import ANALYSIS, FIGURES
        from foldgpt.tables import analysis_lines, analysis_table
        from foldgpt.workbench import Workbench

        path = out / ANALYSIS
        check_free_file(path, replace=overwrite)
        recipe = _recipe(
            model=model,
            revision=revision,
            dtype=dtype,
            device=device,
            seed=seed,
            max_memory_gb=max_memory_gb,
            trust_remote_code=trust_remote_code,
            calibration=_calibration(text, context, tokens),
        )
        analysis = steps.make_analysis(Workbench(recipe), out / ".analysis-checkpoint.json")
        write_json(path, analysis.to_json_dict())
        figures = steps.draw(analysis, None, out / FIGURES)
        if as_json:
            _print_json(analysis.to_json_dict())
        else:
            _print(analysis_table(analysis))
            _print(analysis_lines(analysis))
            _print_paths([path, *figures])


@app.command()
def plan(
    model: Model,
    out: Annotated[Path, typer.Option(help="The plan, a JSON file that may be edited.")] = Path("plan.json"),
    text: Texts = None,
    analysis: Annotated[
        Path | None,
        typer.Option(
            help="An analysis made before (file or run folder), instead of measuring anew.", show_default=False
        ),
    ] = None,
    select: Select = None,
    remove: Remove = None,
    remove_ratio: RemoveRatio = None,
    compensate: Compensate = None,
    share: ShareMethod = None,
    size: Size = None,
    group_size: GroupSize = None,
    donor: Donor = None,
    fit: Fit = None,
    rank: Rank = None,
    scales: Scales = None,
    start: Start = None,
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
    with _session(quiet):
        from foldgpt import steps
        from foldgpt.artifacts import check_free_file
        from foldgpt.selection import ANALYSIS_FREE
        from foldgpt.tables import candidates_table, plan_strip
        from foldgpt.workbench import Workbench

        check_free_file(out, replace=overwrite)
        recipe = _recipe(
            model=model,
            revision=revision,
            dtype=dtype,
            device=device,
            seed=seed,
            max_memory_gb=max_memory_gb,
            trust_remote_code=trust_remote_code,
            calibration=_calibration(text, context, tokens),
            select={"method": select, "remove": remove, "remove_ratio": remove_ratio},
            compensate={"method": compensate},
            share=_share(share, size, group_size, donor, fit, rank, scales, start),
        )
        bench = Workbench(recipe)
        measured = None
        if analysis is not None:
            measured = steps.read_analysis(analysis, bench)
        elif recipe.select.method not in ANALYSIS_FREE:
            measured = steps.make_analysis(bench)
        search = out.with_name(f".{out.name}.search")
        made = steps.make_plan(bench, measured, search)
        made.save(out)
        search.unlink(missing_ok=True)
        if as_json:
            _print_json(made.to_json_dict())
        else:
            _print(plan_strip(made))
            if "candidates" in made.origin:
                _print(candidates_table(made))
            _print_paths([out])


@app.command()
def fold(
    model: Model,
    plan: Annotated[
        Path, typer.Option(help="The plan: a JSON file, or a folder that holds plan.json.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Where the folded model is saved.", show_default=False)],
    revision: Revision = None,
    dtype: DType = None,
    device: Device = None,
    max_memory_gb: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Do what a plan says, and save the result once it is verified."""
    with _session(quiet):
        from dataclasses import asdict

        from foldgpt import steps
        from foldgpt.artifacts import check_free
        from foldgpt.plan import FoldPlan
        from foldgpt.report import write_model_card
        from foldgpt.tables import plan_strip, verification_lines
        from foldgpt.workbench import Workbench

        made = FoldPlan.load(plan)
        check_free(out, replace=overwrite)
        recipe = _recipe(
            model=model,
            revision=revision,
            dtype=dtype,
            device=device,
            max_memory_gb=max_memory_gb,
            trust_remote_code=trust_remote_code,
        )
        bench = Workbench(recipe)
        verification = steps.make_folded(bench, made, out, replace=overwrite)
        write_model_card(out, source=bench.place)
        if as_json:
            _print_json(asdict(verification))
        else:
            _print(plan_strip(made))
            _print(verification_lines(verification))
            _print_paths([out])


@app.command()
def recover(
    folder: Annotated[Path, typer.Argument(help="The folded model.", show_default=False)],
    teacher: Annotated[str, typer.Option(help="Its source: any MODEL.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the recovered model is saved.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="Tokens to train on, such as 2M.", parser=count, show_default=False)],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="Text to train on; self: is what the teacher writes. May be repeated.",
            show_default="demo:wikipedia",
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in one window.", show_default="512")] = None,
    held_out_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens on which the best state is chosen.", parser=count, show_default="16384"),
    ] = None,
    separate_documents: Annotated[
        bool, typer.Option("--separate-documents", help="Let a token see its own document alone.")
    ] = False,
    minutes: Annotated[float | None, typer.Option(help="Stop after this time.", show_default=False)] = None,
    teacher_cache: Annotated[
        str | None,
        typer.Option(help="Folder for the teacher's states, for later runs on the same text.", show_default=False),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="Logger: tensorboard, wandb or trackio. May be repeated.", show_default=False),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="NAME=VALUE, such as rank=32 or learning_rate=5e-4. May be repeated.", show_default=False
        ),
    ] = None,
    dtype: DType = None,
    device: Device = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a folded model, briefly, to predict what its source predicts."""
    with _session(quiet):
        from foldgpt import steps
        from foldgpt.artifacts import check_free
        from foldgpt.report import write_model_card
        from foldgpt.tables import recovery_lines
        from foldgpt.workbench import Workbench

        check_free(out, replace=overwrite)
        recipe = _recipe(
            model=teacher,
            dtype=dtype,
            device=device,
            seed=seed,
            trust_remote_code=trust_remote_code,
            recover={
                "num_tokens": tokens,
                "texts": text or ["demo:wikipedia"],
                "context": context,
                "held_out_tokens": held_out_tokens,
                "separate_documents": separate_documents,
                "minutes": minutes,
                "teacher_cache": teacher_cache,
                "report_to": report_to,
                "settings": assignments(setting or []),
            },
        )
        bench = Workbench(recipe)
        result = steps.make_recovered(bench, folder, out, replace=overwrite)
        write_model_card(out, source=bench.place)
        if as_json:
            _print_json(result.to_json_dict())
        else:
            _print(recovery_lines(result))
            _print_paths([out])


@app.command("eval")
def evaluate(
    folder: Annotated[str, typer.Argument(help="The model to measure: a folder, or any MODEL.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Where the result is written as JSON.", show_default=False)] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Model to compare with, measured in the same run.", show_default=False)
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(help="Text for perplexity, as --text elsewhere. May be repeated.", show_default=False),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in one window.", show_default="512")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next.", show_default="the context")
    ] = None,
    max_windows: Annotated[int, typer.Option(help="Use the first windows only; 0 for all.")] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(help="Multiple-choice tasks, separated by commas, such as piqa,arc_easy.", show_default=False),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(help="Folder of JSON-lines files with the tasks' items.", show_default="from the hub"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First items of each task only.", show_default="all")] = None,
    generations: Annotated[int, typer.Option(help="Beginnings of the text that each model continues.")] = 0,
    speed: Annotated[bool, typer.Option(help="Measure prefill and decode speed.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory.")] = True,
    dtype: DType = None,
    device: Device = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure size, perplexity, speed and memory, beside a baseline."""
    with _session(quiet):
        from foldgpt import steps
        from foldgpt.artifacts import check_free_file, write_json
        from foldgpt.tables import comparison_table, protocol_lines, task_table
        from foldgpt.workbench import Workbench

        if out is not None:
            check_free_file(out, replace=overwrite)
        recipe = _recipe(
            model=folder if baseline is None else baseline,
            dtype=dtype,
            device=device,
            seed=seed,
            trust_remote_code=trust_remote_code,
            evaluate={
                "texts": perplexity or [],
                "tasks": [name.strip() for name in tasks.split(",")] if tasks else [],
                "data_dir": data_dir,
                "limit": limit,
                "generations": generations,
                "context": context,
                "stride": stride,
                "speed": speed,
                "memory": memory,
            },
        ).changed_to(("evaluate", "max_windows"), max_windows or None)
        evaluation = steps.make_evaluation(Workbench(recipe), folder, compare=baseline is not None)
        if out is not None:
            write_json(out, evaluation.to_dict())
        if as_json:
            _print_json(evaluation.to_dict())
        else:
            _print(comparison_table(evaluation))
            if evaluation.folded.tasks:
                _print(task_table(evaluation))
            _print(protocol_lines(evaluation))
            if out is not None:
                _print_paths([out])


@app.command()
def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="recipe.yaml; without one, the flags and their defaults are the recipe.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/latest"),
    model: Annotated[str | None, typer.Option(help="Model, in place of the recipe's.", show_default=False)] = None,
    text: Texts = None,
    context: Context = None,
    tokens: Tokens = None,
    select: Select = None,
    remove: Remove = None,
    remove_ratio: RemoveRatio = None,
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
    dtype: DType = None,
    device: Device = None,
    seed: Seed = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Take over the folder of another recipe; what still fits is kept.")
    ] = False,
    dry_run: DryRun = False,
    tflops: Teraflops = 100,
    devices: Devices = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a whole recipe: analyse, plan, fold, verify, measure, draw."""
    with _session(quiet):
        from foldgpt.errors import UsageError
        from foldgpt.recipe import Recipe

        if recipe is None and model is None:
            raise UsageError("name a recipe file, or a model with --model")
        changes: dict[str, Any] = {
            "model": model,
            "dtype": dtype,
            "device": device,
            "seed": seed,
            "calibration": _calibration(text, context, tokens),
            "select": {"method": select, "remove": remove, "remove_ratio": remove_ratio},
            "compensate": {"method": compensate},
            "share": _share(share, size, group_size, donor, fit, rank, scales, start),
            "recover": {"num_tokens": recover_tokens},
        }
        whole = _recipe(**changes) if recipe is None else Recipe.load(recipe).changed(**changes)

        if dry_run:
            _dry_run(whole, compare=False, tflops=tflops, devices=devices, as_json=as_json)
            return

        from foldgpt import pipeline
        from foldgpt.tables import candidates_table, comparison_table, plan_strip, protocol_lines, task_table

        result = pipeline.run(whole, out, overwrite=overwrite)
        if as_json:
            _print_json(result.evaluation.to_dict())
        else:
            _print(plan_strip(result.plan))
            if "candidates" in result.plan.origin:
                _print(candidates_table(result.plan))
            _print(comparison_table(result.evaluation))
            if result.evaluation.folded.tasks:
                _print(task_table(result.evaluation))
            _print(protocol_lines(result.evaluation))
            _print_paths([result.model, *result.figures, result.report])


@app.command()
def compare(
    recipe: Annotated[
        Path, typer.Argument(help="recipe.yaml; its compare section says which rows.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The folder of the comparison.")] = Path("runs/comparison"),
    model: Annotated[str | None, typer.Option(help="Model, in place of the recipe's.", show_default=False)] = None,
    remove: Remove = None,
    remove_ratio: RemoveRatio = None,
    recover_tokens: RecoverTokens = None,
    dtype: DType = None,
    device: Device = None,
    seed: Seed = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Take over the folder of another comparison; what still fits is kept.")
    ] = False,
    dry_run: DryRun = False,
    tflops: Teraflops = 100,
    devices: Devices = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Put methods side by side on one model: a run for each, one table with intervals."""
    with _session(quiet):
        from foldgpt.recipe import Recipe

        whole = Recipe.load(recipe).changed(
            model=model,
            dtype=dtype,
            device=device,
            seed=seed,
            select={"remove": remove, "remove_ratio": remove_ratio},
            recover={"num_tokens": recover_tokens},
        )

        if dry_run:
            _dry_run(whole, compare=True, tflops=tflops, devices=devices, as_json=as_json)
            return

        from foldgpt import side_by_side

        result = side_by_side.compare(whole, out, overwrite=overwrite)
        _print_comparison(result, as_json=as_json)
        if not as_json:
            _print_paths(sorted(out.glob("comparison.*")))


@app.command()
def show(
    path: Annotated[
        Path, typer.Argument(help="A plan, a folded model, or the folder of a run or comparison.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Show a plan as a strip of blocks, a run's measurements, or the tables of a comparison."""
    with _session(quiet=True):
        from foldgpt.artifacts import read_json
        from foldgpt.comparison import COMPARISON, Comparison
        from foldgpt.errors import ArtifactError
        from foldgpt.evaluation import Evaluation
        from foldgpt.plan import FoldPlan
        from foldgpt.tables import comparison_table, plan_strip, protocol_lines, task_table

        if (path / COMPARISON).is_file():
            _print_comparison(Comparison.load(path), as_json=as_json)
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
            _print_json(shown)
            return
        _print(plan_strip(made))
        if measured is not None:
            _print(comparison_table(measured))
            if measured.folded.tasks:
                _print(task_table(measured))
            _print(protocol_lines(measured))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run or comparison.", show_default=False)],
    quiet: Quiet = False,
) -> None:
    """Build the page of a run or comparison anew: one HTML file that needs no network."""
    with _session(quiet):
        from foldgpt.comparison import COMPARISON, Comparison
        from foldgpt.report import build_report, write_comparison

        if (run / COMPARISON).is_file():
            _print_paths([write_comparison(Comparison.load(run), run)["html"]])
        else:
            _print_paths([build_report(run)])


@app.command()
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
    with _session(quiet):
        from foldgpt import hub

        typer.echo(hub.push(folder, repo, private=private, revision=revision))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from foldgpt.recipe import Recipe

    _print_json(Recipe.model_json_schema())


def main() -> None:
    """Entry point of the `foldgpt` command."""
    app()


@contextmanager
def _session(quiet: bool) -> Iterator[None]:
    """What all verbs have in common: quietness, and errors as one line and an exit code."""
    from foldgpt.allocator import keep_freed_memory
    from foldgpt.errors import FoldGPTError
    from foldgpt.progress import silently

    # A command's buffers are allocated and freed all the time; returning them to the system costs more than the work.
    keep_freed_memory()
    try:
        with silently(quiet):
            yield
    except FoldGPTError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("stopped; what was finished is kept", err=True)
        raise typer.Exit(130) from None


def _recipe(**values: Any) -> Recipe:
    """A recipe from flags; None stands for the default."""
    from foldgpt.recipe import Recipe

    given: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = {key: part for key, part in value.items() if part is not None}
        if value is not None:
            given[name] = value
    return Recipe.from_dict(given, "options")


def _dry_run(recipe: Recipe, *, compare: bool, tflops: float, devices: int, as_json: bool) -> None:
    """Rehearse a recipe and say what the real one takes."""
    from dataclasses import asdict

    from foldgpt.rehearsal import expectation_lines, expectation_table, rehearse

    found = rehearse(recipe, compare=compare)
    if as_json:
        _print_json({**asdict(found), "flops": found.flops, "seconds": found.flops / (tflops * 1e12 * devices)})
        return
    _print(expectation_table(found, teraflops=tflops, devices=devices))
    for line in expectation_lines(found, teraflops=tflops, devices=devices):
        typer.echo(line)


def _calibration(text: list[str] | None, context: int | None, tokens: int | None) -> dict[str, Any]:
    return {"texts": text or None, "context": context, "num_tokens": tokens}


def _share(
    method: str | None,
    size: str | None,
    group_size: int | None,
    donor: str | None,
    fit: bool | None,
    rank: int | None,
    scales: bool | None,
    start: str | None,
) -> dict[str, Any]:
    return {
        "method": method,
        "size": size,
        "group_size": group_size,
        "donor": donor,
        "fit": fit,
        "rank": rank,
        "scales": scales,
        "start": start,
    }


def _print(shown: Any) -> None:
    from rich.console import Console

    console = Console()
    # Redirected output has no width of its own; a table cut to 80 columns loses its labels.
    if not console.is_terminal:
        console = Console(width=120)
    console.print(shown)


def _print_comparison(comparison: Comparison, *, as_json: bool) -> None:
    from foldgpt.comparison import difference_table, method_table, notes_of, task_accuracy_table

    if as_json:
        _print_json(comparison.to_dict())
        return
    for table in (method_table(comparison), difference_table(comparison), task_accuracy_table(comparison)):
        if table.row_count:
            _print(table)
    for line in notes_of(comparison):
        typer.echo(line)


def _print_paths(paths: list[Path]) -> None:
    for path in paths:
        typer.echo(str(path))


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

"""Verbs for one stage each: analyze, fold, recover, eval; plan has a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foldgpt.assignments import assignments
from foldgpt.cli.flags import ANALYZE, EVAL, FOLD, OPTIONS, RECOVER
from foldgpt.cli.options import (
    AsJson,
    Context,
    Device,
    DType,
    MaxMemory,
    Model,
    Overwrite,
    OverwriteFolded,
    Quiet,
    Revision,
    SaveDType,
    Seed,
    Texts,
    Tokens,
    TrustRemoteCode,
    count,
)
from foldgpt.cli.printing import (
    print_analysis,
    print_evaluation,
    print_fits,
    print_generations,
    print_json,
    print_paths,
    print_recovery,
    print_shown,
    print_strip,
)
from foldgpt.cli.requests import calibration_of, recipe_of
from foldgpt.cli.session import AGAIN, ANEW, output_file, session


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
    with session(quiet, ANALYZE, again=AGAIN):
        from foldgpt import steps
        from foldgpt.artifacts import write_json
        from foldgpt.run_folder import ANALYSIS, ANALYSIS_CHECKPOINT, FIGURES
        from foldgpt.workbench import Workbench

        path, checkpoint = out / ANALYSIS, out / ANALYSIS_CHECKPOINT
        with output_file(path, overwrite=overwrite):
            recipe = recipe_of(
                model=model,
                revision=revision,
                dtype=dtype,
                device=device,
                seed=seed,
                max_memory_gb=max_memory_gb,
                trust_remote_code=trust_remote_code,
                calibration=calibration_of(text, context, tokens),
            )
            analysis = steps.make_analysis(Workbench(recipe), checkpoint)
            write_json(path, analysis.to_json_dict())
            checkpoint.unlink(missing_ok=True)
            figures = steps.draw(analysis, None, out / FIGURES)
        if as_json:
            print_json(analysis.to_json_dict())
        else:
            print_analysis(analysis)
            print_paths([path, *figures])


def fold(
    model: Model,
    plan: Annotated[
        Path, typer.Option(help="The plan: a JSON file, or a folder that holds plan.json.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Where the folded model is saved.", show_default=False)],
    revision: Revision = None,
    dtype: DType = None,
    save_dtype: SaveDType = None,
    device: Device = None,
    max_memory_gb: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: OverwriteFolded = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Do what a plan says, and save the result once it is verified."""
    with session(quiet, FOLD, again=ANEW):
        from dataclasses import asdict

        from foldgpt import steps
        from foldgpt.checks import check_applies
        from foldgpt.folding import check_place
        from foldgpt.plan import FoldPlan
        from foldgpt.report import write_model_card
        from foldgpt.run_folder import check_is_no_runs
        from foldgpt.tables import verification_lines
        from foldgpt.workbench import Workbench

        check_is_no_runs(out)
        check_place(out, replace=overwrite, read=[model])
        made = FoldPlan.load(plan)
        recipe = recipe_of(
            model=model,
            revision=revision,
            dtype=dtype,
            save_dtype=save_dtype,
            device=device,
            max_memory_gb=max_memory_gb,
            trust_remote_code=trust_remote_code,
        )
        bench = Workbench(recipe)
        check_applies(bench, made)
        verification = steps.make_folded(bench, made, out, replace=overwrite)
        write_model_card(out, source=bench.place)
        if as_json:
            print_json(asdict(verification))
        else:
            print_strip(made)
            print_fits(out)
            print_shown(verification_lines(verification))
            print_paths([out])


def recover(
    folder: Annotated[Path, typer.Argument(help="The folded model.", show_default=False)],
    teacher: Annotated[str, typer.Option(help="Its source: any MODEL.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the recovered model is saved.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="Tokens to train on, such as 2M.", parser=count, show_default=False)],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="Text or chats to train on; self: is what the teacher writes. May be repeated.",
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
        typer.Option(
            help="Folder for what students are compared with, for later runs on the same text.", show_default=False
        ),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="Logger: tensorboard, wandb or trackio. May be repeated.", show_default=False),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE, such as rank=32 or learning_rate=5e-4. The names are listed in docs/recovery.md under "
            "Settings; a wrong one is answered by the nearest, or by all. May be repeated.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    dtype: DType = None,
    save_dtype: SaveDType = None,
    device: Device = None,
    max_memory_gb: MaxMemory = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: OverwriteFolded = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a folded model, briefly, to predict what its source predicts."""
    with session(quiet, RECOVER, again=AGAIN):
        from foldgpt import steps
        from foldgpt.folding import check_place
        from foldgpt.report import write_model_card
        from foldgpt.run_folder import check_is_no_runs
        from foldgpt.workbench import Workbench

        check_is_no_runs(out)
        check_place(out, replace=overwrite, read=[folder, teacher])
        recipe = recipe_of(
            model=teacher,
            revision=revision,
            dtype=dtype,
            save_dtype=save_dtype,
            device=device,
            max_memory_gb=max_memory_gb,
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
            print_json(result.to_json_dict())
        else:
            print_recovery(result)
            print_paths([out])


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
        int | None, typer.Option(help="Tokens from one window to the next.", show_default="without overlap")
    ] = None,
    max_windows: Annotated[int, typer.Option(min=0, help="Use the first windows only; 0 for all.")] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(help="Multiple-choice tasks, separated by commas, such as piqa,arc_easy.", show_default=False),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(help="Folder of JSON-lines files with the tasks' items.", show_default="from the hub"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First items of each task only.", show_default="all")] = None,
    generations: Annotated[
        int, typer.Option(help="Beginnings of the first --perplexity text that each model continues.")
    ] = 0,
    card: Annotated[
        bool, typer.Option("--card", help="Write the figures into the model's card (README.md), which is made anew.")
    ] = False,
    speed: Annotated[bool, typer.Option(help="Measure prefill and decode speed.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory.")] = True,
    revision: Revision = None,
    dtype: DType = None,
    device: Device = None,
    max_memory_gb: MaxMemory = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure size, perplexity, speed and memory, beside a baseline."""
    with session(quiet, EVAL, again=ANEW), output_file(out, overwrite=overwrite):
        from foldgpt import steps
        from foldgpt.artifacts import write_json
        from foldgpt.environment import describe_environment
        from foldgpt.errors import UsageError
        from foldgpt.report import write_model_card
        from foldgpt.workbench import Workbench

        if card and not (Path(folder) / "plan.json").is_file():
            raise UsageError(f"--card, and {folder} is no folder of a folded model (it holds no plan.json)")
        about_text = {"context": context, "stride": stride, "max-windows": max_windows, "generations": generations}
        about_tasks = {"data-dir": data_dir, "limit": limit}
        for flags, needed, given in ((about_text, "perplexity", perplexity), (about_tasks, "tasks", tasks)):
            if (idle := [f"--{flag}" for flag, value in flags.items() if value]) and not given:
                raise UsageError(f"{' and '.join(idle)} without --{needed}: there is nothing to apply that to")
        recipe = recipe_of(
            model=folder if baseline is None else baseline,
            revision=revision,
            dtype=dtype,
            device=device,
            max_memory_gb=max_memory_gb,
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
        ).changed({"evaluate.max_windows": max_windows or None}, place=OPTIONS)
        bench = Workbench(recipe)
        evaluation = steps.make_evaluation(bench, folder, compare=baseline is not None)
        written = {**evaluation.to_dict(), "environment": describe_environment()}
        # Written first: a reader that has enough, such as `head`, ends the process. Shown whatever becomes of the file.
        try:
            if out is not None:
                write_json(out, written)
            if card:
                # Without a baseline it keeps what it says of licence and languages.
                write_model_card(folder, evaluation=evaluation, source=bench.place)
        finally:
            if as_json:
                print_json(written)
            else:
                print_evaluation(evaluation)
                print_generations(evaluation)
        if out is not None and not as_json:
            print_paths([out])

"""The verb export: a folded model in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foldgpt.cli.options import AsJson, Device, MaxMemory, Quiet, TrustRemoteCode
from foldgpt.cli.printing import print_json, print_paths, print_shown
from foldgpt.cli.session import ANEW, session

#: What `--to` takes.
_FORMS = ("dense", "gguf")


def export(
    folder: Annotated[Path, typer.Argument(help="A folded model, or the folder of a run.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="dense: a checkpoint of the source's own class, nothing shared. gguf: a file for llama.cpp.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder, or for gguf the file, to write.", show_default=False)],
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="For gguf: a checkout of llama.cpp, with llama-perplexity built.", show_default=False),
    ] = None,
    outtype: Annotated[
        str | None,
        typer.Option(help="For gguf: f32, f16, bf16 or q8_0.", show_default="16 bits, as its converter chooses"),
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="For gguf: do not compare what llama.cpp predicts with the model.")
    ] = False,
    device: Device = None,
    max_memory_gb: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folded model, or the file, that is there.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a folded model in another form: without shared weights, or for llama.cpp."""
    with session(quiet, again=ANEW):
        from dataclasses import asdict

        from foldgpt.errors import UsageError, did_you_mean
        from foldgpt.export import export_dense, export_gguf
        from foldgpt.report import write_model_card
        from foldgpt.run_folder import check_is_no_runs, final_model
        from foldgpt.tables import exported_lines, verification_lines

        check_is_no_runs(out)
        if to not in _FORMS:
            raise UsageError(f"unknown form {to!r} (--to).{did_you_mean(to, _FORMS)}")
        model = final_model(folder)
        loading: dict[str, Any] = {
            "device": device or "auto",
            "max_memory_gb": max_memory_gb,
            "trust_remote_code": bool(trust_remote_code),
        }
        if to == "dense":
            for_gguf = {"--llama-cpp": llama_cpp, "--outtype": outtype, "--unverified": unverified}
            idle = [flag for flag, value in for_gguf.items() if value]
            if idle:
                raise UsageError(f"{' and '.join(idle)} with --to dense, which needs none: leave them out")
            verification = export_dense(model, out, **loading, replace=overwrite)
            write_model_card(out, source=model)
            result, lines = asdict(verification), verification_lines(verification)
        else:
            if llama_cpp is None:
                raise UsageError("llama.cpp's own converter makes the file: give a checkout of it (--llama-cpp)")
            exported = export_gguf(
                model,
                out,
                llama_cpp,
                outtype=outtype or "auto",
                verify=not unverified,
                **loading,
                replace=overwrite,
            )
            result, lines = asdict(exported), exported_lines(exported)
        if as_json:
            print_json(result)
        else:
            print_shown(lines)
            print_paths([out])

"""Options that several verbs of the command line have in common."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Annotated, Any, get_type_hints

import typer

from foldgpt import counts

#: Devices in a dry run where nothing else is said.
DEVICES = 1

Model = Annotated[
    str,
    typer.Argument(
        help="Hub id, local folder, GGUF file, or demo:smollm2-135m / demo:gemma3-270m.", show_default=False
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="Calibration text: txt, jsonl or parquet file (globs), hub:NAME, demo:wikipedia, or self: (what the model "
        "writes). May be repeated.",
        show_default="demo:wikipedia",
    ),
]


def count(written: str) -> int:
    """A count of tokens, for typer, which says a ValueError in words of its own."""
    try:
        return counts.count(written)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Context = Annotated[int | None, typer.Option(help="Tokens in one calibration window.", show_default="512")]
Tokens = Annotated[
    int | None, typer.Option(help="Calibration tokens in all, such as 500k.", parser=count, show_default="32768")
]
Select = Annotated[
    str | None,
    typer.Option(
        help="Selector: gates, greedy, loo, taylor, bi, angular, last, random or blocks.", show_default="gates"
    ),
]
Remove = Annotated[
    int | None,
    typer.Option(
        help="How many blocks to remove. This, --remove-ratio or --target is needed, unless a recipe has it or weights "
        "are shared.",
        show_default=False,
    ),
]
RemoveRatio = Annotated[float | None, typer.Option(help="The same as a fraction of all blocks.", show_default=False)]
Target = Annotated[
    str | None,
    typer.Option(
        help="What the folded model may take, instead: parameters=95M, flops=80%, prefill=80% or decode=25ms.",
        show_default=False,
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        help="What searches measure: kl, the divergence from the source, or lm, the loss on the text.",
        show_default="kl",
    ),
]
Sublayers = Annotated[
    bool | None,
    typer.Option(
        "--sublayers",
        help="Remove attention and MLP apart, as many parameters as that many blocks have (gates, greedy, loo).",
        show_default=False,
    ),
]
SelectorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="NAME=VALUE of the selector, such as effort=0.5, in place of a recipe's value (docs/selection.md). May be "
        "repeated.",
        show_default=False,
    ),
]
SearchTokens = Annotated[
    int | None,
    typer.Option(
        "--search-tokens",
        help="Calibration tokens that removals are measured on.",
        parser=count,
        show_default="4096",
    ),
]
Copies = Annotated[
    float | None,
    typer.Option(
        help="Share of each window that removals are measured on in which its beginning is repeated, 0 to 0.5.",
        show_default="0.0625",
    ),
]
Compensate = Annotated[
    str | None,
    typer.Option(help="none, or linear: the block before each cut takes over what it can.", show_default="linear"),
]
ShareMethod = Annotated[
    str | None,
    typer.Option(
        "--share",
        help="none, adjacent, or auto: measure what to remove and what to share, and take the best.",
        show_default="none",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="With --share auto: a fraction of the blocks' parameters (0.7), parameters (95M) or bytes (200MB).",
        show_default=False,
    ),
]
GroupSize = Annotated[int | None, typer.Option(help="Blocks that share one set of weights.", show_default="2")]
Donor = Annotated[
    str | None,
    typer.Option(
        help="Shared weights: first, last, best or mean of the members, or least_squares (with --fit).",
        show_default="first",
    ),
]
Fit = Annotated[
    bool | None,
    typer.Option(
        "--fit", help="Fit shared weights and private terms on the calibration text when folding.", show_default=False
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(help="Rank of the low-rank terms each position has beside shared weights.", show_default="0"),
]
Scales = Annotated[
    bool | None,
    typer.Option("--scales", help="Give each position that shares scales of its own.", show_default=False),
]
Start = Annotated[
    str | None,
    typer.Option(
        help="hard: kept blocks share. zero: removed blocks stay as positions that borrow, at first without effect.",
        show_default="hard",
    ),
]
Perplexity = Annotated[
    list[str] | None,
    typer.Option(help="Text to measure perplexity on, as --text. May be repeated.", show_default="demo:wikipedia-test"),
]
RecoverTokens = Annotated[
    int | None, typer.Option(help="Tokens of training after folding, such as 2M.", parser=count, show_default="0")
]
RecoverTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--recover-text",
        help="Text or chats to train on, as --text. May be repeated.",
        show_default="the calibration texts",
    ),
]
RecoverMinutes = Annotated[float | None, typer.Option(help="Stop training after this time.", show_default=False)]
RecoverSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--recover-set",
        help="NAME=VALUE of the recovery's settings, such as rank=64, over those of a recipe; listed in "
        "docs/recovery.md. May be repeated.",
        show_default=False,
    ),
]
RecipeValues = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="KEY=VALUE of the recipe, for what has no flag, such as evaluate.speed=false or "
        "'evaluate.tasks=[piqa, arc_easy]' (docs/recipes.md). May be repeated.",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", show_default=False)]
DType = Annotated[
    str | None,
    typer.Option(
        help="Format to compute in: auto (the source's own), float32, bfloat16 or float16.", show_default="auto"
    ),
]
SaveDType = Annotated[
    str | None,
    typer.Option(
        "--save-dtype",
        help="Format of the saved weights: auto (the source's own, or --dtype's if that takes no more), float32, "
        "bfloat16 or float16.",
        show_default="auto",
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 …", show_default="auto")]
Seed = Annotated[int | None, typer.Option(help="Seed of all that is drawn.", show_default="0")]
MaxMemory = Annotated[
    float | None,
    typer.Option(
        "--max-memory-gb",
        help="Memory for the weights, in GB. An analysis reads what does not fit from disk; to be folded, all must.",
        show_default="80 % of what is free",
    ),
]
TrustRemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Run code that comes with the model.", show_default=False)
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Run it on a tiny random model of the same architecture, and say what the real one takes."
    ),
]
Teraflops = Annotated[
    float | None,
    typer.Option(
        "--tflops", min=0.001, help="For --dry-run: TFLOP/s that one device sustains, for times.", show_default=False
    ),
]
Devices = Annotated[
    int | None, typer.Option(min=1, help="For --dry-run: devices that share the recovery.", show_default=f"{DEVICES}")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
OverwriteFolded = Annotated[bool, typer.Option("--overwrite", help="Replace the folded model that is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def left_out(shown: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let the help of a verb that reads a recipe say what holds where an option is left out.

    Without that it would show the defaults of a recipe in which nothing is said.

    Args:
        shown: what takes the place of the default that an option shows; `{}` in it stands for that default.
    """

    def change(verb: Callable[..., None]) -> Callable[..., None]:
        hints: dict[str, Any] = get_type_hints(verb, include_extras=True)
        for name, hint in hints.items():
            for option in getattr(hint, "__metadata__", ()):
                # Those of a dry run are in no recipe.
                if isinstance(option.show_default, str) and hint not in (Teraflops, Devices):
                    changed = copy(option)
                    changed.show_default = shown.format(option.show_default)
                    hints[name] = Annotated[hint.__origin__, changed]
        verb.__annotations__ = hints
        return verb

    return change

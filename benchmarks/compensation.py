"""What closed-form compensation gives: perplexity and KL to the source of removed blocks, without and with it.

Corrections are fitted on calibration text only and merged, the model is folded, and the folded model is measured on
other texts: the first windows, without overlap, or with `self:` windows of what the source writes itself. Seconds are
those of the fit with the source's states recorded anew for each set, as a user would wait for them; the merge is below
a second.

    python benchmarks/compensation.py --model demo:smollm2-135m --text C4.jsonl --text WIKIPEDIA.jsonl \
        --evaluate wiki.test.raw --evaluate self: --remove 13-18 --remove 13,14,16,17,18,25
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from command import command_line
from foldgpt.artifacts import write_json, write_text
from foldgpt.block_lists import blocks_of
from foldgpt.compensation import compensate, merge_
from foldgpt.corpus import OwnText, Windows, calibration_windows, evaluation_windows
from foldgpt.corpus.own_text import SELF
from foldgpt.environment import describe_environment
from foldgpt.folding import fold_, source_model_of
from foldgpt.objectives import Head
from foldgpt.plan import FoldPlan
from foldgpt.progress import be_quiet
from foldgpt.sources import Source, load_source
from judging import last_hidden, perplexity_and_kl
from provenance import provenance_of


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text", action="append", help="calibration text; may be repeated (demo:wikipedia)")
    parser.add_argument(
        "--evaluate", action="append", help="text to measure on, another one; may be repeated (demo:wikipedia)"
    )
    parser.add_argument("--remove", action="append", required=True, help="a set, e.g. 13-18 or 3,7-9; may be repeated")
    parser.add_argument("--tokens", type=int, action="append", help="calibration tokens; may be repeated (8192)")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40, help="windows of each text to measure on")
    parser.add_argument("--where", choices=("cuts", "behind"), default="cuts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="compensation", help="stem of the result files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.text = arguments.text or ["demo:wikipedia"]
    arguments.evaluate = arguments.evaluate or ["demo:wikipedia"]
    arguments.tokens = arguments.tokens or [8192]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    source = load_source(arguments.model, dtype=arguments.dtype)
    judged_on = {name_of(text): windows_of(text, source, arguments) for text in arguments.evaluate}
    fit_on = {
        tokens: calibration_windows(
            arguments.text, source.tokenizer, context=arguments.context, num_tokens=tokens, seed=arguments.seed
        )
        for tokens in arguments.tokens
    }
    head = Head(source.model)
    teacher = {name: last_hidden(source.model, windows.ids) for name, windows in judged_on.items()}
    original = {name: measured(head, teacher[name], teacher[name], windows) for name, windows in judged_on.items()}
    rows = []
    for blocks in map(blocks_of, arguments.remove):
        plan = FoldPlan.create(source_model_of(source.model, source.spec), removed=blocks)
        plain = judge(source.model, plan, {}, head, teacher, judged_on)
        for windows in fit_on.values():
            started = time.perf_counter()
            corrections = compensate(source.model, plan, windows.ids, where=arguments.where)
            seconds = time.perf_counter() - started
            rows.append(
                {
                    "removed": blocks,
                    "tokens": windows.ids.numel(),
                    "without": plain,
                    "with": judge(source.model, plan, corrections, head, teacher, judged_on),
                    "seconds": round(seconds, 2),
                    "cuts": {index: asdict(found.report) for index, found in corrections.items()},
                }
            )
            print(rows[-1], flush=True)
    result = {
        "benchmark": "compensation",
        "command": command_line(),
        "config": {
            name: [name_of(text) for text in value] if name in ("text", "evaluate") else value
            for name, value in vars(arguments).items()
            if name not in ("out", "seed", "name")
        },
        "seed": arguments.seed,
        "environment": describe_environment(),
        "source": {"spec": source.spec, "revision": source.revision, "fingerprint": source.fingerprint},
        "calibration": {
            tokens: {"protocol": windows.protocol, "fingerprint": windows.fingerprint}
            for tokens, windows in fit_on.items()
        },
        "evaluation": {
            name: {"protocol": windows.protocol, "fingerprint": windows.fingerprint}
            for name, windows in judged_on.items()
        },
        "num_blocks": plan.source.num_blocks,
        "original": original,
        "sets": rows,
    }
    write_json(arguments.out / f"{arguments.name}.json", result)
    write_text(arguments.out / f"{arguments.name}.md", as_markdown(result))
    print(as_markdown(result))


def name_of(text: str) -> str:
    """The file alone, of a text that is one."""
    return text if text.startswith(SELF) else Path(text).name


def windows_of(text: str, source: Source, arguments: argparse.Namespace) -> Windows:
    """Windows to measure on: the first ones of a text, or what the source writes, which has no order."""
    if not text.startswith(SELF):
        return evaluation_windows([text], source.tokenizer, context=arguments.context, max_windows=arguments.windows)
    own = OwnText(lambda: source.model, source.tokenizer, source.fingerprint)
    num_tokens = arguments.windows * arguments.context
    # Another seed than that of the fit, which may be on such text as well.
    seed = arguments.seed + 1
    return calibration_windows(
        [text], source.tokenizer, context=arguments.context, num_tokens=num_tokens, seed=seed, own=own
    )


def judge(
    model: Any,
    plan: FoldPlan,
    corrections: Any,
    head: Head,
    teacher: Mapping[str, Tensor],
    judged_on: Mapping[str, Windows],
) -> dict[str, dict[str, float]]:
    """Merge, fold and measure a copy; by text."""
    model = copy.deepcopy(model)
    merge_(model, corrections)
    fold_(model, plan)
    return {
        name: measured(head, teacher[name], last_hidden(model, windows.ids), windows)
        for name, windows in judged_on.items()
    }


def measured(head: Head, teacher_WTH: Tensor, student_WTH: Tensor, judged_on: Windows) -> dict[str, float]:
    """Perplexity of the student, and its mean KL from the teacher, over all tokens but each window's first."""
    perplexity, kl = perplexity_and_kl(head, teacher_WTH, student_WTH, judged_on.ids)
    return {"perplexity": round(perplexity, 3), "kl": round(kl, 4)}


def as_markdown(result: dict[str, Any]) -> str:
    config = result["config"]
    rows = "\n".join(
        f"| {', '.join(map(str, row['removed']))} | {text} | {row['without'][text]['perplexity']:.2f} | "
        f"{row['with'][text]['perplexity']:.2f} | {row['without'][text]['kl']:.3f} | {row['with'][text]['kl']:.3f} | "
        f"{row['tokens']:,} | {row['seconds']:.1f} |"
        for row in result["sets"]
        for text in config["evaluate"]
    )
    source = ", ".join(f"{found['perplexity']:.2f} on {text}" for text, found in result["original"].items())
    return f"""# Closed-form compensation

{config["model"]} ({result["num_blocks"]} blocks, {config["dtype"]}); corrections fitted on
{", ".join(config["text"])} in windows of {config["context"]}, measured on {config["windows"]} windows of each text:
the first ones without overlap, or what the source writes (self:). The source's perplexity is {source}.

| removed blocks | text | perplexity without | with | KL without | with | tokens fitted on | seconds |
|---|---|---|---|---|---|---|---|
{rows}

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()

"""Perplexity after removing blocks by block influence (ShortGPT), at several counts: the yardstick of all tables.

    python benchmarks/removal_by_bi.py --model demo:smollm2-135m --remove 3 6 9 \
        --text demo:wikipedia --perplexity wiki.test.raw
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from command import command_line
from foldgpt.analysis import analyze
from foldgpt.artifacts import write_json, write_text
from foldgpt.corpus import calibration_windows, evaluation_windows
from foldgpt.environment import describe_environment
from foldgpt.evaluation import perplexity, size_of
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.selection import Request, select
from foldgpt.sources import Source, load_source
from provenance import provenance_of


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--remove", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--text", nargs="+", default=["demo:wikipedia"], help="calibration texts")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    parser.add_argument("--perplexity", nargs="+", required=True, help="test text")
    parser.add_argument("--context", type=int, default=512, help="tokens per window, for both texts")
    parser.add_argument("--max-windows", type=int, help="use the first windows of the test text only")
    parser.add_argument("--first-windows", type=int, default=40, help="also report the first windows alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    source = load(arguments)
    texts = [Path(text).name for text in arguments.text]
    calibration = calibration_windows(
        arguments.text, source.tokenizer, context=arguments.context, num_tokens=arguments.tokens, seed=arguments.seed
    )
    analysis = analyze(source.model, calibration.ids)  # type: ignore[arg-type]
    identity = source_model_of(source.model, name=arguments.model)
    result: dict[str, Any] = {
        "benchmark": "removal_by_bi",
        "command": command_line(),
        "config": {
            **{name: value for name, value in vars(arguments).items() if name not in ("out", "seed")},
            "text": texts,
            "perplexity": [Path(text).name for text in arguments.perplexity],
        },
        "seed": arguments.seed,
        "environment": describe_environment(),
        "calibration": {"protocol": calibration.protocol, "fingerprint": calibration.fingerprint},
        "bi": analysis.bi,
        "rows": [row(source, [], arguments)],
    }
    for num_remove in arguments.remove:
        request = Request(num_blocks=analysis.num_blocks, num_remove=num_remove, analysis=analysis)
        removed = select("bi", request).removed
        folded = load(arguments)
        fold_(folded.model, FoldPlan.create(identity, removed=removed))
        result["rows"].append(row(folded, list(removed), arguments))
    name = f"removal_by_bi_{arguments.model.split(':')[-1].split('/')[-1]}"
    write_json(arguments.out / f"{name}.json", result)
    write_text(arguments.out / f"{name}.md", as_markdown(result))
    print(as_markdown(result))


def load(arguments: argparse.Namespace) -> Source:
    return load_source(arguments.model, dtype=arguments.dtype)


def row(source: Source, removed: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    whole = evaluation_windows(
        arguments.perplexity, source.tokenizer, context=arguments.context, max_windows=arguments.max_windows
    )
    first = evaluation_windows(
        arguments.perplexity, source.tokenizer, context=arguments.context, max_windows=arguments.first_windows
    )
    on_whole, on_first = perplexity(source.model, whole), perplexity(source.model, first)
    return {
        "removed": removed,
        "unique_parameters": size_of(source.model).unique_parameters,
        "perplexity": on_whole.value,
        "mean_nll": on_whole.mean_nll,
        "standard_error": on_whole.standard_error,
        "protocol": on_whole.protocol,
        "perplexity_first_windows": on_first.value,
    }


def as_markdown(result: dict[str, Any]) -> str:
    config, protocol = result["config"], result["rows"][0]["protocol"]
    rows = "\n".join(
        f"| {len(row['removed'])} | {', '.join(map(str, row['removed'])) or '–'} | "
        f"{row['unique_parameters'] / 1e6:,.1f} M | {row['perplexity']:,.2f} | {row['perplexity_first_windows']:,.2f} |"
        for row in result["rows"]
    )
    return f"""# Removal by block influence: {config["model"]}

Perplexity of {" + ".join(config["perplexity"])} in {config["dtype"]}: {protocol["tokens_scored"]:,} tokens scored in
{protocol["windows"]:,} windows of {protocol["context"]} tokens, no overlap, BOS {"yes" if protocol["bos"] else "no"},
{"the whole text" if protocol["text_complete"] else "not the whole text"}; and of its first {config["first_windows"]}
windows alone. BI over {config["tokens"]:,} tokens of {" + ".join(config["text"])}. Nothing is trained.

| removed | which | parameters | perplexity | first {config["first_windows"]} windows |
|---|---|---|---|---|
{rows}

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()

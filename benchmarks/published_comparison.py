"""The paper's experiment: ShortGPT's block influence beside learned gates, with the same recovery, at equal size.

A `foldgpt compare` of one model at one size, with the seven tasks and perplexity. Rows can be added later: what stands
is kept, and a comparison that was killed goes on where it was.

    python benchmarks/published_comparison.py --model demo:smollm2-135m --ratio 0.2 --text C4.jsonl \\
        --text WIKIPEDIA.jsonl --perplexity wiki.test.raw --data-dir TASKS --tokens 200000 --runs runs/published
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command import as_typed, command_line, without_folders
from foldgpt import Recipe, compare
from foldgpt.allocator import keep_freed_memory
from foldgpt.artifacts import write_json, write_text
from foldgpt.assignments import assignments
from foldgpt.comparison.rows import known_rows
from foldgpt.corpus import identity_of
from foldgpt.counts import count
from foldgpt.evaluation.tasks import TASKS
from foldgpt.report import as_markdown

#: What is put beside each other. Positions that start at zero hold the weights of a kept neighbour, with scales and
#: low-rank terms of their own.
ROWS: dict[str, dict[str, Any] | None] = {
    "random": None,
    "last": None,
    "angular": None,
    "bi": None,
    "bi + compensation": None,
    "bi + plain LoRA": None,
    "greedy": None,
    "gates": None,
    "gates + compensation": None,
    "gates + positions at zero": {
        "compensate": {"method": "linear"},
        "share": {"method": "adjacent", "start": "zero", "rank": 8},
        "recover": {"settings": {"scale_rate": 10.0}},
    },
    # Terms half as large, for sizes at which those above would be beyond the common budget.
    "gates + positions at zero, rank 4": {
        "compensate": {"method": "linear"},
        "share": {"method": "adjacent", "start": "zero", "rank": 4},
        "recover": {"settings": {"scale_rate": 10.0}},
    },
}
DEFAULT_ROWS = ("bi", "gates + compensation")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the blocks removed")
    parser.add_argument(
        "--row", action="append", choices=list(ROWS), help=f"may be repeated ({', '.join(DEFAULT_ROWS)})"
    )
    parser.add_argument(
        "--reference", choices=list(ROWS), default="bi", help="the row that the others are compared with (bi)"
    )
    parser.add_argument(
        "--recovered", action="append", choices=list(ROWS), help="rows to recover as well; may be repeated (all)"
    )
    parser.add_argument(
        "--recovered-only",
        nargs="*",
        metavar="ROW",
        help="rows that are not there without recovery; if none is named, all. Where --recovered is given, name them "
        "there too",
    )
    parser.add_argument(
        "--text",
        action="append",
        required=True,
        help="to train on; the first two also to calibrate",
    )
    parser.add_argument("--tokens", type=count, default=100_000, help="training tokens of each recovery")
    parser.add_argument("--context", type=int, default=512, help="tokens of a calibration or training window")
    parser.add_argument("--search-tokens", type=count, default=4096, help="calibration tokens of the search")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="settings of the recovery")
    parser.add_argument("--perplexity", action="append", required=True, help="text to measure on; may be repeated")
    parser.add_argument("--perplexity-context", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=32, help="windows of each; 0 for all")
    parser.add_argument("--no-tasks", action="store_true", help="measure perplexity alone")
    parser.add_argument("--no-speed", action="store_true", help="where other work shares the machine")
    parser.add_argument("--data-dir", help="folder of the tasks' JSON-lines files; without one they come from the hub")
    parser.add_argument("--limit", type=int, default=200, help="items of each task; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the comparison and its runs")
    parser.add_argument("--name", default="published", help="stem of the result files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    unknown = set(arguments.recovered_only or ()) - set(arguments.row or DEFAULT_ROWS)
    if unknown:
        parser.error(f"--recovered-only names {', '.join(sorted(unknown))}: no rows of this comparison (--row)")
    return arguments


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The comparison as a recipe."""
    names = arguments.row or DEFAULT_ROWS
    recipe = Recipe.from_dict(
        {
            "model": arguments.model,
            "dtype": arguments.dtype,
            "seed": arguments.seed,
            "calibration": {"texts": arguments.text[:2], "context": arguments.context, "num_tokens": 32_768},
            "select": {
                "method": "gates",
                "remove_ratio": arguments.ratio,
                "num_tokens": arguments.search_tokens,
            },
            "recover": {
                "num_tokens": arguments.tokens,
                "texts": arguments.text,
                "context": arguments.context,
                "held_out_tokens": 8192,
                "teacher_cache": str(arguments.runs / "teacher"),
                "settings": assignments(arguments.set),
            },
            "evaluate": {
                "texts": arguments.perplexity,
                "context": arguments.perplexity_context,
                "max_windows": arguments.max_windows or None,
                "memory": False,
                "speed": not arguments.no_speed,
                "generations": 0,
                "tasks": [] if arguments.no_tasks else list(TASKS),
                "data_dir": None if arguments.no_tasks else arguments.data_dir,
                "limit": None if arguments.no_tasks else arguments.limit or None,
            },
            "compare": {
                "rows": {name: ROWS[name] for name in names},
                "recovered": arguments.recovered,
                "reference": arguments.reference,
            },
        }
    )
    if arguments.recovered_only is None:
        return recipe
    # A row that says how it is recovered is not there without.
    known = known_rows(recipe)
    rows = {name: ROWS[name] for name in names}
    for name in arguments.recovered_only or names:
        rows[name] = {"recover": {"settings": {}}, **(ROWS[name] or known[name])}
    return recipe.changed(compare={"rows": rows})


def with_names(result: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """A comparison in which the figures of texts go by the names of the files, not by their paths."""
    names = {f"perplexity.{text}": f"perplexity.{Path(text).name}" for text in texts}
    for method in result["methods"]:
        method["figures"] = {names.get(key, key): value for key, value in method["figures"].items()}
    return result


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    recipe = recipe_of(arguments)
    begun = time.monotonic()
    comparison = compare(recipe, arguments.runs / "comparison", overwrite=True)
    seconds = time.monotonic() - begun
    result = {
        "command": command_line(),
        "recipe": without_folders(recipe.model_dump(mode="json")),
        "text_identities": {Path(text).name: identity_of([text]) for text in (*arguments.text, *arguments.perplexity)},
        **with_names(comparison.to_dict(), arguments.perplexity),
    }
    write_json(arguments.out / f"{arguments.name}.json", result)
    text = as_markdown(comparison)
    text += f"\n`{as_typed(command_line())}`: {seconds:.0f} seconds in this call.\n"
    write_text(arguments.out / f"{arguments.name}.md", text)
    print(text)


if __name__ == "__main__":
    main()

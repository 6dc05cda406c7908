"""Do the tasks' accuracies agree with a scorer that has nothing in common with the harness?

The other scorer (`tests/multiple_choice.py`) writes the prompts out by hand, runs one choice at a time, and takes its
log-likelihood in fp32; it shares neither the harness nor the batches. Both score the same model on the same rows.

    python benchmarks/task_agreement.py --model demo:smollm2-135m --data-dir EVAL
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from command import command_line
from foldgpt.allocator import keep_freed_memory
from foldgpt.artifacts import write_json, write_text
from foldgpt.environment import describe_environment
from foldgpt.evaluation import TASKS, load_suite
from foldgpt.evaluation.tasks.rows import find_file
from foldgpt.progress import be_quiet
from foldgpt.sources import Source, load_source
from provenance import provenance_of

# The plain scorer is the reference of the tests as well; there is one of it.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from multiple_choice import ITEMS, hits


def measure(source: Source, tasks: list[str], *, data_dir: str, limit: int | None) -> list[dict[str, Any]]:
    """One row for each task: both accuracies by its headline metric, and on how many items they differ."""
    scores = load_suite(tasks, data_dir=data_dir, limit=limit).measure(source.model, source.tokenizer)
    rows = []
    for task in tasks:
        file = find_file(Path(data_dir), TASKS[task].files, task)
        lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()][:limit]
        plain, normed = hits(source.model, source.tokenizer, [ITEMS[task](json.loads(line)) for line in lines])
        headline = scores[task].headline
        ours, theirs = scores[task].accuracy.hits, {"acc": plain, "acc_norm": normed}[headline]
        rows.append(
            {
                "task": task,
                "metric": headline,
                "items": len(theirs),
                "harness": ours.count("1") / len(ours),
                "plain": theirs.count("1") / len(theirs),
                "num_different": sum(own != other for own, other in zip(ours, theirs, strict=True)),
            }
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be repeated (piqa, arc_easy, boolq)")
    parser.add_argument("--data-dir", required=True, help="folder of JSON-lines files")
    parser.add_argument("--limit", type=int, default=0, help="items of each task; 0 for all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    keep_freed_memory()
    source = load_source(arguments.model, dtype=arguments.dtype)
    tasks = arguments.task or ["piqa", "arc_easy", "boolq"]
    result = {
        "benchmark": "task_agreement",
        "command": command_line(),
        "config": {
            **{name: value for name, value in vars(arguments).items() if name != "out"},
            "data_dir": Path(arguments.data_dir).name,
        },
        "source": {"spec": source.spec, "fingerprint": source.fingerprint},
        "environment": describe_environment(),
        "rows": measure(source, tasks, data_dir=arguments.data_dir, limit=arguments.limit or None),
    }
    place = arguments.out / f"task_agreement_{arguments.model.partition(':')[2] or Path(arguments.model).name}.json"
    write_json(place, result)
    write_text(place.with_suffix(".md"), as_markdown(result))
    print(place.with_suffix(".md").read_text())


def as_markdown(result: dict[str, Any]) -> str:
    lines = [
        f"| {row['task']} ({row['metric']}) | {row['items']:,} | {row['harness']:.2%} | {row['plain']:.2%} | "
        f"{100 * (row['harness'] - row['plain']):+.2f} | {row['num_different']} |"
        for row in result["rows"]
    ]
    table = "\n".join(lines)
    return f"""# Tasks against a plain scorer

{result["config"]["model"]}, {result["config"]["dtype"]}. Same rows, same model, two scorers without common code.

| task | items | harness | plain scorer | points | items that differ |
|---|---:|---:|---:|---:|---:|
{table}

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()

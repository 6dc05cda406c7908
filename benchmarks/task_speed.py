"""Time of the seven multiple-choice tasks, and what it goes into: tokens, padding, prefixes that choices share.

Each task is scored by itself, in turn, `--repeats` times. Tokens run are those of the inputs, equal ones once; padding
is what batches of unequal length add; of the tokens run, those that an earlier input of the task begins with are
computed again, and would be the saving of a cache of prefixes.

    python benchmarks/task_speed.py --model demo:smollm2-135m --data-dir EVAL --limit 200
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import command_line
from foldgpt.allocator import keep_freed_memory
from foldgpt.artifacts import write_json, write_text
from foldgpt.environment import describe_environment
from foldgpt.evaluation import TASKS, load_suite
from foldgpt.evaluation.tasks.harness_model import LoadedModel
from foldgpt.progress import be_quiet
from foldgpt.sources import Source, load_source
from provenance import provenance_of


@dataclass
class Work:
    """What a task had the model do."""

    inputs: int = 0
    tokens: int = 0
    padded: int = 0
    distinct: int = 0

    @property
    def padding_ratio(self) -> float:
        """Share of the positions run that held padding."""
        return 1 - self.tokens / self.padded if self.padded else 0.0

    @property
    def repeated_ratio(self) -> float:
        """Share of the tokens run that an earlier input had begun with."""
        return 1 - self.distinct / self.tokens if self.tokens else 0.0


class Watched:
    """Counts the batches of `LoadedModel` while it is entered."""

    def __enter__(self) -> Work:
        work, prefixes = Work(), set[int]()
        self._batches = batches = LoadedModel._batches

        def counted(model: LoadedModel, inputs: list[Any]) -> Iterator[list[Any]]:
            for batch in batches(model, inputs):
                work.inputs += len(batch)
                work.padded += len(batch) * len(batch[0].tokens)
                for item in batch:
                    work.tokens += len(item.tokens)
                    prefix = 0
                    for token in item.tokens:
                        prefix = hash((prefix, token))
                        prefixes.add(prefix)
                work.distinct = len(prefixes)
                yield batch

        LoadedModel._batches = counted  # type: ignore[method-assign]
        return work

    def __exit__(self, *_: object) -> None:
        LoadedModel._batches = self._batches  # type: ignore[method-assign]


def measure(source: Source, tasks: list[str], *, data_dir: str | None, limit: int | None, repeats: int) -> list[dict]:
    """One row for each task."""
    rows = []
    suites = {task: load_suite([task], data_dir=data_dir, limit=limit) for task in tasks}
    work: dict[str, Work] = {}
    seconds: dict[str, list[float]] = {task: [] for task in tasks}
    items: dict[str, int] = {}
    for _ in range(repeats):
        for task, suite in suites.items():
            with Watched() as work[task]:
                started = time.perf_counter()
                items[task] = suite.measure(source.model, source.tokenizer)[task].num_items
                seconds[task].append(time.perf_counter() - started)
    for task in tasks:
        done = work[task]
        rows.append(
            {
                "task": task,
                "items": items[task],
                "inputs": done.inputs,
                "tokens": done.tokens,
                "padding_ratio": round(done.padding_ratio, 4),
                "repeated_ratio": round(done.repeated_ratio, 4),
                "seconds": [round(each, 2) for each in seconds[task]],
            }
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be repeated (all)")
    parser.add_argument("--data-dir", help="folder of JSON-lines files; without one, rows come from the hub")
    parser.add_argument("--limit", type=int, default=200, help="items of each task; 0 for all")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    keep_freed_memory()
    source = load_source(arguments.model, dtype=arguments.dtype)
    rows = measure(
        source,
        arguments.task or list(TASKS),
        data_dir=arguments.data_dir,
        limit=arguments.limit or None,
        repeats=arguments.repeats,
    )
    result = {
        "benchmark": "task_speed",
        "command": command_line(),
        "config": {
            **{name: value for name, value in vars(arguments).items() if name != "out"},
            "data_dir": arguments.data_dir and Path(arguments.data_dir).name,
        },
        "source": {"spec": source.spec, "fingerprint": source.fingerprint},
        "environment": describe_environment(),
        "rows": rows,
    }
    place = arguments.out / f"task_speed_{arguments.model.partition(':')[2] or Path(arguments.model).name}.json"
    write_json(place, result)
    write_text(place.with_suffix(".md"), as_markdown(result))
    print(place.with_suffix(".md").read_text())


def as_markdown(result: dict[str, Any]) -> str:
    lines = []
    for row in result["rows"]:
        seconds = statistics.median(row["seconds"])
        shares = f"{row['padding_ratio']:.1%} | {row['repeated_ratio']:.1%}"
        counts = f"{row['items']:,} | {row['inputs']:,} | {row['tokens']:,}"
        lines.append(f"| {row['task']} | {counts} | {shares} | {seconds:.1f} | {row['tokens'] / seconds:,.0f} |")
    total = sum(statistics.median(row["seconds"]) for row in result["rows"])
    table = "\n".join(lines)
    return f"""# Time of the tasks

{result["config"]["model"]}, {result["config"]["dtype"]}; all together {total:.0f} s (medians of \
{result["config"]["repeats"]}). Repeated: tokens run that an earlier input of the task had begun with.

| task | items | inputs | tokens run | padding | repeated | seconds | tokens/s |
|---|---:|---:|---:|---:|---:|---:|---:|
{table}

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()

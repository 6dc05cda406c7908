"""Selectors on several draws of calibration text: how much of a result is the text that it was calibrated on?

Each draw takes other documents of the same texts, and another seed for what a search draws; every selector chooses
blocks by it, and what is left is measured on texts that are always the same. With --compensate the fit of each draw is
made on its own documents. The arguments are those of compare_selectors.py, `--seed` that of the first draw. Each row is
written when it is done; the same command goes on where it was stopped, and more draws may be added.

    python benchmarks/calibration_draws.py --text C4.jsonl --text WIKIPEDIA.jsonl --tokens 4096 --context 256 \
        --ratio 0.1 --draws 8 --perplexity wiki.test.raw --max-windows 32
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from compare_selectors import Bench, add_arguments, completed, copies_of, key_of, name_of, spread, tokens_fitted_on
from foldgpt.allocator import keep_freed_memory
from foldgpt.artifacts import hash_of, read_json, write_json, write_text
from foldgpt.errors import ArtifactError
from foldgpt.progress import be_quiet
from provenance import measured_by, provenance_lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--draws", type=int, default=8, help="of calibration text")
    parser.add_argument("--name", default="calibration_draws", help="stem of the result files")
    arguments = parser.parse_args()
    arguments.selector = arguments.selector or ["gates", "bi"]
    return completed(parser, arguments)


class Draws:
    """The benches of all draws: one model and one set of tests, made when they are needed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.first = Bench(arguments)
        self._bench, self._seed = self.first, arguments.seed

    def bench(self, seed: int) -> Bench:
        """The bench that is calibrated on one draw; the one before it is dropped."""
        if seed != self._seed:
            arguments = argparse.Namespace(**{**vars(self._arguments), "seed": seed})
            self._bench, self._seed = Bench(arguments, beside=self.first), seed
        return self._bench


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    keep_freed_memory()
    draws = Draws(arguments)
    tests = {name: test.fingerprint for name, test in draws.first.tests.items()}
    left_out = ("out", "name", "seed", "draws", "ratio", "selector")
    config = {name: value for name, value in vars(arguments).items() if name not in left_out}
    header = {
        "benchmark": "calibration_draws",
        "config": {
            **config,
            "text": [Path(text).name for text in arguments.text],
            "perplexity": list(tests),
            "prior_tokens": draws.first.prior_tokens,
        },
        "seed": arguments.seed,
        "source": {"spec": draws.first.source.spec, "fingerprint": draws.first.source.fingerprint},
        "calibration": draws.first.calibration.fingerprint,
        "further": draws.first.further.fingerprint,
        "tests": tests,
        "num_blocks": draws.first.num_blocks,
    }
    identity = hash_of(header)
    place = arguments.out / f"{arguments.name}.json"
    found = resumed(place, identity)
    rows, unchanged, call = found["rows"], found["source_perplexities"], measured_by()

    def save() -> None:
        result = {**header, "identity": identity, "source_perplexities": unchanged, "rows": rows}
        write_json(place, result)
        write_text(place.with_suffix(".md"), as_markdown(result))

    if not unchanged:
        unchanged.update(draws.first.perplexities([], list(tests)))
    # What is not compensated is the same model on every draw.
    known = {} if arguments.compensate else {key_of(row["removed"]): row["perplexities"] for row in rows}
    done = {(row["ratio"], row["selector"], row["seed"]) for row in rows}
    for draw in range(arguments.draws):
        seed = arguments.seed + draw
        for ratio in arguments.ratio:
            for selector in arguments.selector:
                if (ratio, selector, seed) in done:
                    continue
                bench = draws.bench(seed)
                row = {**bench.row(selector, ratio, seed), "calibration": bench.calibration.fingerprint, "call": call}
                key = key_of(row["removed"])
                row["perplexities"] = known.get(key) or bench.perplexities(row["removed"], list(tests))
                if not arguments.compensate:
                    known[key] = row["perplexities"]
                rows.append(row)
                print(
                    {name: row[name] for name in ("seed", "ratio", "selector", "removed", "perplexities")}, flush=True
                )
                save()
    save()
    print(place.with_suffix(".md").read_text())


def resumed(place: Path, identity: str) -> dict[str, Any]:
    """Rows of an earlier run with the same settings, and the source's perplexities."""
    try:
        earlier = read_json(place)
    except ArtifactError:
        earlier = {}
    return earlier if earlier.get("identity") == identity else {"rows": [], "source_perplexities": {}}


def as_markdown(result: dict[str, Any]) -> str:
    config, rows, tests = result["config"], result["rows"], list(result["tests"])
    sizes = sorted({(row["ratio"], row["num_remove"]) for row in rows})
    selectors = list(dict.fromkeys(row["selector"] for row in rows))
    lines, beside = [], []
    for ratio, number in sizes:
        of_size = {name: [r for r in rows if (r["ratio"], r["selector"]) == (ratio, name)] for name in selectors}
        lines += [line_of(f"{number} ({ratio:.0%})", name, found, config, tests) for name, found in of_size.items()]
        beside += [
            line_beside(f"{number} ({ratio:.0%})", of_size[selectors[0]], name, of_size[name], tests)
            for name in selectors[1:]
        ]
    table, differences = "\n".join(filter(None, lines)), "\n".join(filter(None, beside))
    texts = ", ".join(f"{name} (the source's is {result['source_perplexities'][name]:.2f})" for name in tests)
    heads = "".join(f" {name} |" for name in tests)
    fitted = f", with compensation fitted on {tokens_fitted_on(config):,} tokens of each draw"
    return f"""# Selectors on several draws of calibration text

{config["model"]} ({result["num_blocks"]} blocks, {config["dtype"]}), calibrated on {config["tokens"]:,} tokens of
{" + ".join(config["text"])} in windows of {config["context"]}{copies_of(config)}, each draw on other
documents and with another seed of the search{fitted * config["compensate"]}. Perplexity is of {texts},
context {config["perplexity_context"]}, \
{"the whole text" if config["max_windows"] is None else f"the first {config['max_windows']} windows"}; \
mean and standard deviation over draws.
In brackets behind a set: on how many draws it is chosen.

| removed | selector | draws | blocks |{heads} passes |
|---|---|---|---|{"---|" * len(tests)}---|
{table}

Perplexity beside that of {selectors[0]}, draw by draw: geometric mean ratio with its standard error, and on how many
draws it is higher, level and lower.

| removed | selector |{heads}
|---|---|{"---|" * len(tests)}
{differences}

{provenance_lines((row["call"] for row in rows), result["seed"])}
"""


def line_of(size: str, name: str, found: list[dict[str, Any]], config: dict[str, Any], tests: list[str]) -> str:
    """One selector at one size; empty if it has not been measured there."""
    if not found:
        return ""
    sets = Counter(name_of(row["removed"], config["sublayers"]) for row in found)
    passes = [row["forward_equivalents"] for row in found]
    cells = [
        size,
        name,
        str(len(found)),
        "; ".join(f"{blocks} ({times})" for blocks, times in sets.most_common()),
        *(spread([row["perplexities"][text] for row in found], 1) for text in tests),
        "—" if None in passes else f"{statistics.mean(passes):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def line_beside(
    size: str, first: list[dict[str, Any]], name: str, other: list[dict[str, Any]], tests: list[str]
) -> str:
    """One selector beside the first one, on the draws that both have; empty if those are fewer than two."""
    of_first = {row["seed"]: row["perplexities"] for row in first}
    pairs = [(of_first[row["seed"]], row["perplexities"]) for row in other if row["seed"] in of_first]
    if len(pairs) < 2:
        return ""
    cells = []
    for text in tests:
        logs = [math.log(b[text] / a[text]) for a, b in pairs]
        mean = math.exp(statistics.mean(logs))
        error = mean * statistics.stdev(logs) / math.sqrt(len(logs))
        counts = [sum(log > 0 for log in logs), sum(log == 0 for log in logs), sum(log < 0 for log in logs)]
        cells.append(f"{mean:.3f} ± {error:.3f} ({', '.join(map(str, counts))})")
    return f"| {size} | {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

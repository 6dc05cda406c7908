"""Selectors side by side: what each removes, how near the result is to the source, and what the search costs.

For each selector and ratio: the removed blocks, the KL to the source on all calibration windows as searches see it (one
measure for all, whatever the selector looked at), the perplexity on other texts, and the cost of the search in seconds
and in forward passes over the calibration windows. Sets that come out level are judged by gates on other windows of the
same texts. With --compensate searches see the weaker fit that is fast enough for them, of each quarter of the windows
on the other three, begun at one of further text; the perplexity is of the model that folding makes. The cost of bi and
angular is that of their analysis; greedy runs once, for the largest ratio, and passes the smaller ones on its way. With
--remove the sets that it names are measured likewise, such as those that other searches ended at, and selectors only if
some are asked for. Each row is written when it is done; the same command goes on where it was stopped.

    python benchmarks/compare_selectors.py --model demo:smollm2-135m --text C4.jsonl --text WIKIPEDIA.jsonl \
        --perplexity wiki.test.raw --ratio 0.1 --ratio 0.2 --ratio 0.3
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from foldgpt.allocator import keep_freed_memory
from foldgpt.analysis import analyze
from foldgpt.artifacts import hash_of, read_json, write_json, write_text
from foldgpt.assignments import assignments
from foldgpt.block_lists import blocks_of
from foldgpt.compensation import Correction, compensate, merge_
from foldgpt.corpus import Windows, calibration_windows, evaluation_windows
from foldgpt.errors import ArtifactError, UsageError
from foldgpt.evaluation.perplexity import perplexity
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.progress import be_quiet
from foldgpt.replay import Replay
from foldgpt.selection import (
    BY_SUBLAYER,
    MEASURED,
    RemovalCost,
    Request,
    Selection,
    number_to_remove,
    search_windows,
    select,
)
from foldgpt.selection.copies import COPIES
from foldgpt.selection.units import Units, units_of
from foldgpt.sources import Source, load_source
from provenance import measured_by, provenance_lines

SELECTORS = ("gates", "greedy", "loo", "taylor", "bi", "angular", "last", "random")
#: What sets go by that --remove names.
NAMED = "blocks"

#: Sets are measured from the source's states on a text, which they share, as long as those take no more bytes.
_MOST_KEPT = 4 * 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a `Bench` reads, and where results go."""
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text", action="append", help="calibration text; may be repeated (demo:wikipedia)")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens that selectors see (4,096)")
    parser.add_argument(
        "--calibration-tokens", type=int, default=32_768, help="those and the text of finals and fits, in all (32,768)"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--copies", type=float, default=COPIES, help="share of a window that repeats its beginning")
    parser.add_argument("--ratio", type=float, action="append", help="share of blocks removed; may be repeated (0.2)")
    parser.add_argument("--selector", action="append", choices=SELECTORS, help="may be repeated (all)")
    parser.add_argument(
        "--effort", type=float, help="forward passes of a search by gates, as a share of greedy's (the default's)"
    )
    parser.add_argument("--option", action="append", help="of gates, NAME=VALUE, e.g. estimator=smoothed; repeatable")
    parser.add_argument("--sublayers", action="store_true", help="remove attention and MLP apart")
    parser.add_argument("--compensate", action="store_true", help="compensate, in the searches and in the result")
    parser.add_argument("--compensation-tokens", type=int, help="tokens of the final fit (all)")
    parser.add_argument("--perplexity", action="append", help="text to measure perplexity on; may be repeated (none)")
    parser.add_argument("--perplexity-context", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, help="use the first windows of those texts only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--search-seeds", type=int, default=1, help="searches by gates, each with another seed")
    parser.add_argument("--random-seeds", type=int, default=5, help="draws of the selector random")
    parser.add_argument("--remove", action="append", help="a set, e.g. 13-18 or 3,7-9; repeatable")
    parser.add_argument("--name", default="selectors", help="stem of the result files")
    arguments = parser.parse_args()
    try:
        arguments.remove = [sorted(blocks_of(words)) for words in arguments.remove or []]
    except UsageError as error:
        parser.error(str(error))
    if arguments.remove and arguments.sublayers:
        parser.error("--remove names whole blocks; with --sublayers only selectors choose")
    if arguments.remove and not arguments.selector:
        arguments.ratio = arguments.selector = []
    return completed(parser, arguments)


def completed(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with what is meant where nothing was given; exits where they do not go together."""
    arguments.text = arguments.text or ["demo:wikipedia"]
    arguments.perplexity = arguments.perplexity or []
    arguments.ratio = [0.2] if arguments.ratio is None else arguments.ratio
    if arguments.selector is None:
        arguments.selector = [name for name in SELECTORS if name in BY_SUBLAYER or not arguments.sublayers]
    if arguments.tokens > arguments.calibration_tokens:
        parser.error(f"--tokens {arguments.tokens} is more than --calibration-tokens {arguments.calibration_tokens}")
    if arguments.sublayers and set(arguments.selector) - BY_SUBLAYER:
        parser.error(f"with --sublayers only {', '.join(sorted(BY_SUBLAYER))} can select")
    return arguments


class Bench:
    """The model, the texts, and measurements that several rows share.

    Args:
        arguments: of `add_arguments`.
        beside: a bench with other calibration text, whose model and tests are this one's too.
    """

    def __init__(self, arguments: argparse.Namespace, beside: Bench | None = None) -> None:
        self.arguments = arguments
        self.source: Source = beside.source if beside else load_source(arguments.model, dtype=arguments.dtype)
        self.model: Any = self.source.model
        self.num_blocks = len(decoder_of(self.model).blocks)
        # As `foldgpt run` divides its text: finals of gates see windows that selectors do not.
        self._drawn = self.windows(arguments.calibration_tokens)
        self.calibration, self.further = parted(self._drawn, arguments.tokens)
        self.tests: dict[str, Windows] = beside.tests if beside else self._tests()
        started = time.perf_counter()
        self.analysis = analyze(self.model, self.ids)
        self.analysis_seconds = time.perf_counter() - started
        self._cost: RemovalCost | None = None
        self._test_costs: dict[str, RemovalCost] = beside._test_costs if beside else {}
        self._fitted_on: Replay | None = None
        self._greedy: Selection | None = None

    def _tests(self) -> dict[str, Windows]:
        arguments = self.arguments
        return {
            Path(text).name: evaluation_windows(
                [text],
                self.source.tokenizer,
                context=arguments.perplexity_context,
                max_windows=arguments.max_windows,
            )
            for text in arguments.perplexity
        }

    @property
    def ids(self) -> Tensor:
        return self.calibration.ids

    @property
    def units(self) -> Units:
        """What rows number, whatever is to go of it."""
        decoder = decoder_of(self.model)
        return Units.sublayers(decoder, 0) if self.arguments.sublayers else Units.blocks(self.num_blocks, 0)

    def row(self, selector: str, ratio: float, seed: int) -> dict[str, Any]:
        num_remove = number_to_remove(self.num_blocks, remove=None, ratio=ratio)
        if selector == "greedy" and not self.arguments.sublayers:
            removed, seconds, report = self.greedily(num_remove)
        else:
            started = time.perf_counter()
            selection = select(selector, self.request(selector, num_remove, seed))
            removed, seconds, report = self.units_of(selection), time.perf_counter() - started, dict(selection.report)
        passes = report.get("forward_equivalents")
        if selector in ("bi", "angular"):
            seconds, passes = self.analysis_seconds, 1.0
        return {
            **self._row_of(selector, ratio, seed, num_remove, removed),
            "seconds": round(seconds, 1),
            "forward_equivalents": passes,
            "steps": report.get("steps"),
            "by_gates_alone": report.get("by_gates_alone"),
            "finals": report.get("finals"),
        }

    def named(self, blocks: list[int]) -> dict[str, Any]:
        """The row of blocks that no selector was asked for."""
        number = len(blocks)
        row = self._row_of(NAMED, number / self.num_blocks, self.arguments.seed, number, tuple(blocks))
        return {**row, "seconds": 0.0, "forward_equivalents": None}

    def _row_of(
        self, selector: str, ratio: float, seed: int, num_remove: int, removed: tuple[int, ...]
    ) -> dict[str, Any]:
        return {
            "selector": selector,
            "ratio": ratio,
            "seed": seed,
            "num_remove": num_remove,
            "removed": list(removed),
            "kl": self.kl(removed, num_remove),
        }

    def request(self, selector: str, num_remove: int, seed: int) -> Request:
        measured = selector in MEASURED
        return Request(
            self.num_blocks,
            num_remove,
            analysis=self.analysis,
            seed=seed,
            model=self.model if measured else None,
            ids_WT=self.ids if measured else None,
            further_ids_WT=self.further.ids if measured else None,
            copies=self.arguments.copies,
            compensate=self.arguments.compensate and measured,
            sublayers=self.arguments.sublayers,
            options=options_of(self.arguments) if selector == "gates" else {},
        )

    @property
    def prior_tokens(self) -> int:
        """Tokens of the further text on which the starts of a search's fits are fitted; 0 if it does not compensate."""
        return self.request("gates", 1, 0).num_prior_windows * self.arguments.context

    def units_of(self, selection: Selection) -> tuple[int, ...]:
        """What is removed: blocks, or with sublayers 2 i for the attention of block i and 2 i + 1 for its MLP."""
        per_block = 2 if self.arguments.sublayers else 1
        parts = selection.removed, selection.removed_attention, selection.removed_mlp
        return tuple(units_of(*parts, per_block))

    def greedily(self, num_remove: int) -> tuple[tuple[int, ...], float, dict[str, Any]]:
        """What greedy removes on its way to the largest ratio, and what it had spent by then."""
        if self._greedy is None:
            most = max(number_to_remove(self.num_blocks, remove=None, ratio=r) for r in self.arguments.ratio)
            self._greedy = select("greedy", self.request("greedy", most, self.arguments.seed))
        trace = self._greedy.report["trace"][:num_remove]
        return tuple(sorted(step["removed"] for step in trace)), trace[-1]["seconds"], trace[-1]

    def kl(self, removed: tuple[int, ...], num_remove: int) -> float:
        if self._cost is None:
            request = Request(
                self.num_blocks,
                num_remove,
                model=self.model,
                ids_WT=self.ids,
                further_ids_WT=self.further.ids,
                copies=self.arguments.copies,
                seed=self.arguments.seed,
                compensate=self.arguments.compensate,
                sublayers=self.arguments.sublayers,
            )
            self._cost = request.need_cost("benchmark")
        return self._cost.cost(frozenset(removed))

    def perplexities(self, removed: list[int], texts: list[str]) -> dict[str, float]:
        """Of the model without these blocks, on some of the texts."""
        whole = [text for text in texts if (self.arguments.compensate and removed) or self.is_long(text)]
        folded = self.folded(removed) if whole else None
        found = {text: perplexity(folded, self.tests[text]).value for text in whole}
        rest = [text for text in texts if text not in found]
        return found | {text: math.exp(self.test_cost(text).cost(frozenset(removed))) for text in rest}

    def is_long(self, text: str) -> bool:
        """Whether the source's states on a text, which sets would share, are too many to keep."""
        config = self.model.config.get_text_config(decoder=True)
        kept = self.tests[text].ids.numel() * config.hidden_size * self.model.dtype.itemsize * (self.num_blocks + 1)
        return bool(kept > _MOST_KEPT)

    def test_cost(self, text: str) -> RemovalCost:
        if text not in self._test_costs:
            # Sets share what lies before their first removed block. All positions are measured.
            ids = self.tests[text].ids
            self._test_costs[text] = RemovalCost(
                Replay(self.model, ids),
                units=self.units,
                objective="lm",
                position_share=1.0,
                most_positions=ids.numel(),
            )
        return self._test_costs[text]

    def folded(self, removed: list[int]) -> Any:
        """The model after the fit, if one is asked for, and the fold that a user gets."""
        whole, attention, mlp = self.units.parts(removed)
        source = source_model_of(self.model)
        plan = FoldPlan.create(source, removed=whole, removed_attention=attention, removed_mlp=mlp)
        folded = copy.deepcopy(self.model)
        if self.arguments.compensate and removed:
            merge_(folded, self.corrections(plan))
        fold_(folded, plan)
        return folded

    def corrections(self, plan: FoldPlan) -> Mapping[int, Correction]:
        """The final fit, which sees more tokens than those of searches."""
        tokens = self.arguments.compensation_tokens
        if self._fitted_on is None:
            windows = self._drawn if tokens is None else self.windows(tokens)
            self._fitted_on = Replay(self.model, windows.ids)
        return compensate(self.model, plan, self._fitted_on.ids_WT, replay=self._fitted_on)

    def windows(self, tokens: int) -> Windows:
        arguments = self.arguments
        return calibration_windows(
            arguments.text,
            self.source.tokenizer,
            context=arguments.context,
            num_tokens=tokens,
            seed=arguments.seed,
        )


def parted(windows: Windows, tokens: int) -> tuple[Windows, Windows]:
    """The first windows, of so many tokens, and the others."""
    num_windows, context = windows.ids.shape
    first = search_windows(tokens, context, num_windows)
    halves = (slice(None, first), slice(first, None))
    before, behind = (replace(windows, ids=windows.ids[of], score_from=windows.score_from[of]) for of in halves)
    return before, behind


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of gates."""
    effort = {} if arguments.effort is None else {"effort": arguments.effort}
    return {**effort, **assignments(arguments.option or [], "--option")}


def tokens_fitted_on(config: Mapping[str, Any]) -> int:
    """Tokens that the final fit of compensation saw; without a number of its own, all that were drawn."""
    return int(config["compensation_tokens"] or config["calibration_tokens"])


def copies_of(config: Mapping[str, Any]) -> str:
    """What a result says of the windows in which text is repeated; those of before such windows have none."""
    return f", of which a share of {config['copies']:g} repeats what they begin with" if config.get("copies") else ""


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    keep_freed_memory()
    bench = Bench(arguments)
    header = {
        "benchmark": "selectors",
        "config": {
            **{
                name: value
                for name, value in vars(arguments).items()
                if name not in ("out", "name", "seed", "selector") and (name not in ("effort", "option") or value)
            },
            "text": [Path(text).name for text in arguments.text],
            "perplexity": list(bench.tests),
            "prior_tokens": bench.prior_tokens,
        },
        "seed": arguments.seed,
        "source": {"spec": bench.source.spec, "fingerprint": bench.source.fingerprint},
        "calibration": {"protocol": bench.calibration.protocol, "fingerprint": bench.calibration.fingerprint},
        "further": bench.further.fingerprint,
        "num_blocks": bench.num_blocks,
    }
    call = measured_by()
    # Rows of another model, text or setting are not taken over; other ratios and texts may be added.
    more_rows = ("ratio", "random_seeds", "search_seeds", "perplexity", "remove")
    settings = {name: value for name, value in header["config"].items() if name not in more_rows}
    identity = hash_of([settings, *(header[name] for name in ("seed", "source", "calibration", "further"))])
    place = arguments.out / f"{arguments.name}.json"
    rows, tests = resumed(place, identity, bench.tests)

    def save() -> None:
        result = {**header, "identity": identity, "tests": tests, "rows": rows}
        write_json(place, result)
        write_text(place.with_suffix(".md"), as_markdown(result))

    def measure(removed: list[int]) -> None:
        key = key_of(removed)
        missing = [text for text, test in tests.items() if text in bench.tests and key not in test["perplexities"]]
        for text, value in bench.perplexities(removed, missing).items():
            tests[text]["perplexities"][key] = value

    def add(row: dict[str, Any]) -> None:
        rows.append({**row, "call": call})
        measure(row["removed"])
        print(rows[-1], flush=True)
        save()

    for removed in ([], *(row["removed"] for row in rows)):
        measure(removed)
    save()
    named = [row["removed"] for row in rows if row["selector"] == NAMED]
    for blocks in arguments.remove:
        if blocks not in named:
            add(bench.named(blocks))
    done = {(row["selector"], row["ratio"], row["seed"]) for row in rows}
    for ratio in arguments.ratio:
        for selector in arguments.selector:
            draws = {"random": arguments.random_seeds, "gates": arguments.search_seeds}.get(selector, 1)
            for seed in range(arguments.seed, arguments.seed + draws):
                if (selector, ratio, seed) not in done:
                    add(bench.row(selector, ratio, seed))
    print(place.with_suffix(".md").read_text())


def resumed(place: Path, identity: str, texts: dict[str, Windows]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of an earlier run of the same settings, and perplexities of every text, those measured before included."""
    try:
        earlier = read_json(place)
    except ArtifactError:
        earlier = {}
    if earlier.get("identity") != identity:
        earlier = {"rows": [], "tests": {}}
    tests: dict[str, Any] = dict(earlier["tests"])
    for text, windows in texts.items():
        if text not in tests or tests[text]["fingerprint"] != windows.fingerprint:
            tests[text] = {"protocol": windows.protocol, "fingerprint": windows.fingerprint, "perplexities": {}}
    return earlier["rows"], tests


def key_of(removed: list[int]) -> str:
    return ",".join(map(str, removed))


def as_markdown(result: dict[str, Any]) -> str:
    config, tests = result["config"], result["tests"]
    lines = []
    for ratio in sorted({row["ratio"] for row in result["rows"]}):
        for selector in SELECTORS:
            found = [row for row in result["rows"] if (row["ratio"], row["selector"]) == (ratio, selector)]
            if found:
                lines.append(line_of(found, config["sublayers"], tests))
        named = [row for row in result["rows"] if (row["ratio"], row["selector"]) == (ratio, NAMED)]
        lines += [line_of([row], config["sublayers"], tests) for row in named]
    table = "\n".join(lines)
    texts = ", ".join(f"{name} (the source's is {test['perplexities']['']:.2f})" for name, test in tests.items())
    begun = f"\nand begun at one of {config['prior_tokens']:,} further tokens." if config.get("prior_tokens") else "."
    seen = (
        "KL is what searches see: in nats per token, on the calibration windows, after the fit that is fast enough\n"
        "for them (a map of the MLP output), made for each quarter of the windows on the other three" + begun
        if config["compensate"]
        else "KL is in nats per token, on the calibration windows."
    )
    heads = "".join(f" {name} |" for name in tests) + (" × source |" if len(tests) > 1 else "")
    beside = "; beside the source's, the geometric mean over texts" if len(tests) > 1 else ""
    return f"""# Selectors

{config["model"]} ({result["num_blocks"]} blocks, {config["dtype"]}), calibrated on {config["tokens"]:,} tokens of
{" + ".join(config["text"])} in windows of {config["context"]}\
{copies_of(config)}\
{", attention (a) and MLP (m) apart" if config["sublayers"] else ""}\
{f", with compensation fitted on {tokens_fitted_on(config):,} tokens" * config["compensate"]}.
{seen} Perplexity is of {texts or "nothing"},
context {config["perplexity_context"]}, \
{"the whole text" if config["max_windows"] is None else f"the first {config['max_windows']} windows"}{beside}. \
Passes are forward passes over the calibration windows.

| removed | selector | blocks | KL |{heads} seconds | passes |
|---|---|---|---|{"---|" * heads.count("|")}---|---|
{table}

{provenance_lines((row["call"] for row in result["rows"]), result["seed"])}
"""


def line_of(found: list[dict[str, Any]], sublayers: bool, tests: dict[str, Any]) -> str:
    """One line of the table; several draws become mean and standard deviation."""
    row = found[0]
    same = len({tuple(r["removed"]) for r in found}) == 1
    passes = "—" if None in (took := [r["forward_equivalents"] for r in found]) else f"{statistics.mean(took):.1f}"
    cells = [
        f"{row['num_remove']} ({row['ratio']:.0%})",
        row["selector"],
        name_of(row["removed"], sublayers) if same else f"{len(found)} draws",
        spread([r["kl"] for r in found], 3),
        *(spread([test["perplexities"].get(key_of(r["removed"])) for r in found], 1) for test in tests.values()),
        *([spread([beside_source(r["removed"], tests) for r in found], 2)] if len(tests) > 1 else []),
        f"{statistics.mean(r['seconds'] for r in found):.0f}",
        passes,
    ]
    return f"| {' | '.join(cells)} |"


def beside_source(removed: list[int], tests: Mapping[str, Any]) -> float | None:
    """Perplexity over the source's, as a geometric mean over all texts; None if one of them is not measured."""
    found = [(test["perplexities"].get(key_of(removed)), test["perplexities"][""]) for test in tests.values()]
    if any(value is None for value, _ in found):
        return None
    return statistics.geometric_mean(value / source for value, source in found)


def name_of(removed: list[int], sublayers: bool) -> str:
    """The removed blocks; 7a is the attention of block 7, 7m its MLP."""
    if not sublayers:
        return " ".join(map(str, removed))
    gone = set(removed)
    names = []
    for block in sorted({unit // 2 for unit in removed}):
        lost = [letter for unit, letter in ((2 * block, "a"), (2 * block + 1, "m")) if unit in gone]
        names.append(f"{block}" if len(lost) == 2 else f"{block}{lost[0]}")
    return " ".join(names)


def spread(values: list[float | None], digits: int) -> str:
    """Mean and standard deviation; a dash for what another call of the benchmark left out."""
    if None in values:
        return "—"
    if len(values) == 1:
        return f"{values[0]:,.{digits}f}"
    return f"{statistics.mean(values):,.{digits}f} ± {statistics.stdev(values):,.{digits}f}"


if __name__ == "__main__":
    main()

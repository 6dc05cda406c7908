"""The best set of blocks that a long search finds, and how far the selectors' sets are from it.

Local search on the KL to the source, on the calibration windows of a result of compare_selectors.py (with the
compensation of searches, if that had it): every set there of the wanted size is a start, and so are some random ones.
One removed block after another is given back and the best block to remove in its place is looked for among all others,
until a whole round brings nothing. Every measured set is kept in the result file, so that starts share what they
measure and the same command goes on where it was stopped.

With --on the search is by the language-modelling loss on a text to measure on, not by what was calibrated on. No
selector may do that. It says what any of them could reach there, and how far a set is from it.

    python benchmarks/best_set.py --selectors benchmarks/results/selectors_smollm2-135m.json --text-folder TEXTS \\
        --ratio 0.2
    python benchmarks/best_set.py --selectors selectors_smollm2-135m.json --text-folder TEXTS \\
        --ratio 0.1 --on wiki.test.raw --windows 8 --blocks 16-18
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import command_line
from compare_selectors import parted
from foldgpt.allocator import keep_freed_memory
from foldgpt.artifacts import read_json, write_json, write_text
from foldgpt.block_lists import blocks_of
from foldgpt.corpus import calibration_windows, evaluation_windows
from foldgpt.environment import describe_environment
from foldgpt.errors import ArtifactError, UsageError
from foldgpt.progress import be_quiet
from foldgpt.replay import Replay
from foldgpt.selection import RemovalCost, Request
from foldgpt.selection.units import Removed
from foldgpt.sources import load_source
from provenance import provenance_of


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--selectors", type=Path, required=True, help="JSON result of compare_selectors.py")
    parser.add_argument("--text-folder", type=Path, default=Path(), help="where its calibration texts lie")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of blocks removed, one of that result's")
    parser.add_argument("--blocks", action="append", default=[], help="a further start, e.g. 16-18; may be repeated")
    parser.add_argument("--random-starts", type=int, default=2)
    parser.add_argument("--on", help="text whose loss is searched by (the KL to the source where it was calibrated)")
    parser.add_argument("--windows", type=int, default=8, help="with --on: its first windows")
    parser.add_argument("--context", type=int, default=1024, help="with --on: tokens of a window")
    parser.add_argument("--seed", type=int, default=0, help="of the random starts")
    parser.add_argument("--name", default="best_set", help="stem of the result files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


class Measured:
    """Costs of sets, each measured once; all are saved once a minute."""

    def __init__(self, cost: RemovalCost, known: dict[Removed, float], save: Callable[[], None]) -> None:
        self.known = known
        self._cost = cost
        self._save = save
        self._saved = time.monotonic()

    def __call__(self, removed: Removed) -> float:
        if removed not in self.known:
            self.known[removed] = self._cost.cost(removed)
            if time.monotonic() - self._saved > 60:
                self._save()
                self._saved = time.monotonic()
        return self.known[removed]


def local_optimum(start: Removed, num_blocks: int, cost: Measured) -> Removed:
    """A set that no exchange of one block makes better."""
    best, waited = start, 0
    while waited < len(start):
        for block in sorted(best):
            others = [other for other in range(num_blocks) if other not in best]
            # Sets that begin alike, one after another: they share states.
            swapped = sorted((best - {block} | {other} for other in others), key=sorted)
            found = min(swapped, key=cost)
            waited += 1
            if cost(found) < cost(best):
                best, waited = found, 0
                break
            if waited >= len(start):
                break
    return best


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    keep_freed_memory()
    selectors = read_json(arguments.selectors)
    config = selectors["config"]
    rows = [row for row in selectors["rows"] if row["ratio"] == arguments.ratio]
    if not rows or config["sublayers"]:
        raise UsageError(f"{arguments.selectors} has no rows of whole blocks of ratio {arguments.ratio}")
    source = load_source(config["model"], dtype=config["dtype"])
    drawn = calibration_windows(
        [str(arguments.text_folder / name) if not name.startswith("demo:") else name for name in config["text"]],
        source.tokenizer,
        context=config["context"],
        num_tokens=config["calibration_tokens"],
        seed=selectors["seed"],
    )
    windows, further = parted(drawn, config["tokens"])
    if windows.fingerprint != selectors["calibration"]["fingerprint"]:
        raise UsageError(f"the texts in {arguments.text_folder} are not those of {arguments.selectors}")
    num_blocks, num_remove = selectors["num_blocks"], rows[0]["num_remove"]
    if arguments.on:
        if config["compensate"]:
            raise UsageError("--on with a result that was compensated: the fit would be made on what is measured")
        windows = evaluation_windows(
            [arguments.on], source.tokenizer, context=arguments.context, max_windows=arguments.windows
        )
        cost_of = RemovalCost(
            Replay(source.model, windows.ids), objective="lm", position_share=1.0, most_positions=windows.ids.numel()
        )
    else:
        request = Request(
            num_blocks,
            num_remove,
            model=source.model,
            ids_WT=windows.ids,
            # Of before priors there are results as well.
            further_ids_WT=further.ids if config.get("prior_tokens") else None,
            copies=config.get("copies", 0.0),  # of before there were any
            seed=selectors["seed"],
            compensate=config["compensate"],
        )
        cost_of = request.need_cost("best_set")
    place = arguments.out / f"{arguments.name}.json"
    identity = [windows.fingerprint, source.fingerprint, config["dtype"], num_remove]
    if config["compensate"]:
        identity.append(f"compensated from {config.get('prior_tokens', 0)}")
    if arguments.on:
        identity.append("loss")
    elif config.get("copies"):
        identity.append(f"copies {config['copies']}")

    draw = random.Random(arguments.seed)
    starts = {
        row["selector"] + (f", seed {row['seed']}" if row["seed"] else ""): frozenset(row["removed"])
        for row in sorted(rows, key=lambda row: row["kl"])
        if row["selector"] != "random"
    }
    starts |= {f"`--blocks {blocks}`": frozenset(blocks_of(blocks)) for blocks in arguments.blocks}
    starts |= {
        f"random {k}": frozenset(draw.sample(range(num_blocks), num_remove)) for k in range(arguments.random_starts)
    }
    result: dict[str, Any] = {
        "benchmark": "best_set",
        "command": command_line(),
        "identity": identity,
        "model": config["model"],
        "num_blocks": num_blocks,
        "num_remove": num_remove,
        "compensate": config["compensate"],
        "objective": "lm" if arguments.on else "kl",
        "windows": windows.protocol,
        "environment": describe_environment(),
        "rows": [],
    }

    def save() -> None:
        result["known"] = [[sorted(removed), value] for removed, value in cost.known.items()]
        write_json(place, result)

    cost = Measured(cost_of, earlier(place, identity), save)
    for name, start in starts.items():
        began, before = time.perf_counter(), len(cost.known)
        found = local_optimum(start, num_blocks, cost)
        result["rows"].append(
            {
                "start": name,
                "removed": sorted(start),
                "cost": cost(start),
                "found": sorted(found),
                "found_cost": cost(found),
                "measured": len(cost.known) - before,
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
        print(result["rows"][-1], flush=True)
        save()
        write_text(place.with_suffix(".md"), as_markdown(result))
    print(place.with_suffix(".md").read_text())


def earlier(place: Path, identity: list[Any]) -> dict[Removed, float]:
    """Sets that an earlier run of the same search measured."""
    try:
        found = read_json(place)
    except ArtifactError:
        return {}
    if found.get("identity") != identity:
        return {}
    return {frozenset(removed): value for removed, value in found["known"]}


def as_markdown(result: dict[str, Any]) -> str:
    best = min(result["rows"], key=lambda row: row["found_cost"])
    by_loss = result["objective"] == "lm"
    # Of a loss the perplexity is what tables have.
    shown = math.exp if by_loss else float
    what = "perplexity" if by_loss else "KL"
    lines = [
        f"| {row['start']} | {' '.join(map(str, row['removed']))} | {shown(row['cost']):.4f} | "
        f"{shown(row['cost']) / shown(best['found_cost']) - 1:+.1%} | {' '.join(map(str, row['found']))} | "
        f"{shown(row['found_cost']):.4f} | {row['measured']} |"
        for row in result["rows"]
    ]
    table = "\n".join(lines)
    windows = result["windows"]
    searched_by = (
        f"perplexity on the first {windows['windows']} windows of {windows['context']} tokens of "
        f"{', '.join(windows['texts'])}"
        if by_loss
        else "KL to the source on the calibration windows"
    )
    return f"""# The best set

{result["model"]}, {result["num_remove"]} of {result["num_blocks"]} blocks removed. From each start, blocks are
exchanged one by one while that lowers the {searched_by}\
{", compensated as searches do it" * result["compensate"]}. The best of
{len(result["known"]):,} measured sets: **{" ".join(map(str, best["found"]))}**, {what} {shown(best["found_cost"]):.4f}.
"From the best" is what the start costs more than that one.

| start | blocks | {what} | from the best | search ends at | {what} | sets measured |
|---|---|---|---|---|---|---|
{table}

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()

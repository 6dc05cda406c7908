"""What folding and loading cost: time to load the source, to fold it, to save and verify, to load the result.

Loading is timed for source and folded model in turn, round after round, so that a slow moment of the machine hits
both.

    python benchmarks/fold_and_load.py --model demo:smollm2-135m --remove 6
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from foldgpt.artifacts import write_json, write_text
from foldgpt.environment import describe_environment
from foldgpt.evaluation import folder_bytes
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, save_folded, source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.progress import be_quiet, quiet_libraries
from foldgpt.sharing import adjacent_groups
from foldgpt.sources import load_source, resolve
from provenance import provenance_of

KINDS = {"removal": "removed", "sharing": "shared in pairs"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--remove", type=int, default=6, help="last blocks removed in the first case")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of loading")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    place = resolve(arguments.model)
    result: dict[str, Any] = {
        "benchmark": "fold_and_load",
        "command": ["python", *sys.argv],
        "config": {name: value for name, value in vars(arguments).items() if name != "out"},
        "seed": None,
        "environment": describe_environment(),
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for kind in KINDS:
            result["cases"][kind] = measure(kind, arguments, place, Path(scratch) / kind)
    write_json(arguments.out / "fold_and_load.json", result)
    write_text(arguments.out / "fold_and_load.md", as_markdown(result))
    print(as_markdown(result))


def measure(kind: str, arguments: argparse.Namespace, place: Path, folder: Path) -> dict[str, Any]:
    source = load_source(str(place), dtype=arguments.dtype, device="cpu")
    decoder = decoder_of(source.model)
    identity = source_model_of(source.model, name=arguments.model)
    blocks = range(len(decoder.blocks))
    if kind == "removal":
        plan = FoldPlan.create(identity, removed=blocks[-arguments.remove :])
    else:
        plan = FoldPlan.create(identity, groups=adjacent_groups(decoder, blocks, size=2))
    fold_seconds = timed(lambda: fold_(source.model, plan))
    save_seconds = timed(lambda: save_folded(source.model, plan, folder, tokenizer=source.tokenizer))
    loads: dict[str, list[float]] = {"source": [], "folded": []}
    for repeat in range(arguments.repeats + 1):
        for name, path in (("source", place), ("folded", folder)):
            seconds = timed(lambda path=path: load(path, arguments.dtype))
            if repeat:
                loads[name].append(round(seconds, 4))
    medians = {name: statistics.median(seconds) for name, seconds in loads.items()}
    return {
        "fold_seconds": round(fold_seconds, 4),
        "save_and_verify_seconds": round(save_seconds, 2),
        "load_seconds": loads,
        "load_ratio": round(medians["folded"] / medians["source"], 3),
        "bytes": {"source": folder_bytes(place), "folded": folder_bytes(folder)},
    }


def load(path: Path, dtype: str) -> None:
    with quiet_libraries():
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def as_markdown(result: dict[str, Any]) -> str:
    config = result["config"]
    rows = "\n".join(
        f"| {KINDS[kind]} | {case['fold_seconds']:.3f} | {case['save_and_verify_seconds']:.1f} | "
        f"{statistics.median(case['load_seconds']['source']):.2f} | "
        f"{statistics.median(case['load_seconds']['folded']):.2f} | {case['load_ratio']:.2f} | "
        f"{case['bytes']['source'] / 1e6:,.1f} | {case['bytes']['folded'] / 1e6:,.1f} |"
        for kind, case in result["cases"].items()
    )
    return f"""# Time to fold and to load

{config["model"]} in {config["dtype"]}: its last {config["remove"]} blocks removed, or all blocks shared in pairs.
Medians of {config["repeats"]} interleaved rounds of `AutoModelForCausalLM.from_pretrained`.

| blocks | fold, s | save and verify, s | load source, s | load folded, s | ratio | source, MB | folded, MB |
|---|---|---|---|---|---|---|---|
{rows}

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()

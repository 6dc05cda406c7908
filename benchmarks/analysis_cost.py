"""What the analysis costs: one sweep against one plain forward pass over the same tokens.

The three are timed in turn, round after round, so that a slow moment of the machine hits all of them, with
the same micro-batches. The sweep needs no logits, so it is compared with the decoder's body; the pass with
the head is there for scale.

    python benchmarks/analysis_cost.py --model demo:smollm2-135m --text demo:wikipedia
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from foldgpt.analysis import analyze
from foldgpt.artifacts import write_json, write_text
from foldgpt.corpus import calibration_windows
from foldgpt.environment import describe_environment
from foldgpt.families import decoder_of
from foldgpt.progress import be_quiet
from foldgpt.sources import load_source
from provenance import provenance_of

LABELS = {"body": "plain forward, body only", "full": "plain forward with logits", "sweep": "analysis sweep"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--text", default="demo:wikipedia")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows per pass")
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    parser.add_argument("--batch-size", type=int, default=1, help="windows per micro-batch, for all three")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds after one warm-up round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    source = load_source(arguments.model, dtype=arguments.dtype, device=arguments.device)
    windows = calibration_windows(
        [arguments.text],
        source.tokenizer,
        context=arguments.context,
        num_tokens=arguments.windows * arguments.context,
        seed=arguments.seed,
    )
    decoder = decoder_of(source.model)
    body = decoder.body
    batches = windows.ids.to(arguments.device).split(arguments.batch_size)

    def plain(module: torch.nn.Module) -> None:
        with torch.inference_mode():
            for batch in batches:
                module(input_ids=batch, use_cache=False)

    passes: dict[str, Callable[[], object]] = {
        "body": lambda: plain(body),
        "full": lambda: plain(source.model),
        "sweep": lambda: analyze(source.model, windows.ids, batch_size=arguments.batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for round_number in range(arguments.repeats + 1):
        for name, run in passes.items():
            elapsed = timed(run, arguments.device)
            if round_number:
                seconds[name].append(elapsed)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "benchmark": "analysis_cost",
        "command": ["python", *sys.argv],
        "config": {name: value for name, value in vars(arguments).items() if name not in ("out", "seed")},
        "seed": arguments.seed,
        "environment": describe_environment(),
        "source": {"spec": source.spec, "revision": source.revision, "fingerprint": source.fingerprint},
        "calibration": {"protocol": windows.protocol, "fingerprint": windows.fingerprint},
        "num_blocks": len(decoder.blocks),
        "num_tokens": windows.ids.numel(),
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio_to_body": {name: round(value / medians["body"], 4) for name, value in medians.items()},
    }
    write_json(arguments.out / "analysis_cost.json", result)
    write_text(arguments.out / "analysis_cost.md", as_markdown(result))
    print(as_markdown(result))


def timed(run: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def as_markdown(result: dict) -> str:
    config = result["config"]
    rows = "\n".join(
        f"| {label} | {result['median_seconds'][name]:.3f} | "
        f"{result['num_tokens'] / result['median_seconds'][name]:,.0f} | {result['ratio_to_body'][name]:.3f} |"
        for name, label in LABELS.items()
    )
    return f"""# Cost of the analysis

{config["model"]} ({result["num_blocks"]} blocks, {config["dtype"]}, {config["device"]}),
{result["num_tokens"]:,} tokens of {config["text"]} in windows of {config["context"]},
{config["batch_size"]} per micro-batch. Medians of {config["repeats"]} interleaved rounds.

| pass | seconds | tokens/s | times body |
|---|---|---|---|
{rows}

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()

"""What private terms cost in time: a folded model beside itself unfolded, prefill and decode in turns.

Unfolded, every position has ordinary weights of its own with scales and low-rank terms merged in, so both compute the
same. Neighbours share in pairs; the second of each pair has the terms. The share of operations is that of the
low-rank terms in the unfolded model's products, head included (prefill makes one row of logits, decode one for each
token).

    python benchmarks/sharing_speed.py --model demo:smollm2-135m --pairs 15 --rank 16
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from command import command_line
from foldgpt.allocator import keep_freed_memory
from foldgpt.artifacts import write_json, write_text
from foldgpt.environment import describe_environment
from foldgpt.evaluation import measure_speed
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, predicted_parameters, source_model_of, unfold_
from foldgpt.plan import FoldPlan, Group
from foldgpt.progress import be_quiet
from foldgpt.sharing import adjacent_groups
from foldgpt.sharing.solver import middle
from foldgpt.sources import load_source
from provenance import provenance_of


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pairs", type=int, help="pairs around the middle (as many as there are)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the low-rank terms, on every linear layer")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, action="append", help="sequences at once; may be repeated (1)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--name", default="sharing_speed", help="stem of the result files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.batch_size = arguments.batch_size or [1]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    keep_freed_memory()
    source = load_source(arguments.model, dtype=arguments.dtype)
    decoder = decoder_of(source.model)
    blocks = range(len(decoder.blocks))
    found = adjacent_groups(decoder, blocks, size=2)
    pairs = middle(found, blocks, len(found) if arguments.pairs is None else arguments.pairs)
    cases: dict[str, dict[str, Any]] = {
        "norms": {},
        "norms and scales": {"private": ("norms", "scales")},
        f"norms, scales, rank {arguments.rank}": {"private": ("norms", "scales"), "ranks": arguments.rank},
    }
    rows = []
    for name, terms in cases.items():
        groups = tuple(Group(blocks=pair.blocks, donor="first", **terms) for pair in pairs)
        plan = FoldPlan.create(source_model_of(source.model), groups=groups)
        folded = copy.deepcopy(source.model)
        fold_(folded, plan)
        unfolded = copy.deepcopy(folded)
        unfold_(unfolded)
        for batch_size in arguments.batch_size:
            speed = measure_speed(
                {"unfolded": unfolded, "folded": folded},
                prompt_tokens=arguments.prompt_tokens,
                decode_tokens=arguments.decode_tokens,
                repeats=arguments.repeats,
                batch_size=batch_size,
            )["folded"]
            rows.append(
                {
                    "private": name,
                    "batch_size": batch_size,
                    "extra_operations": extra_operations(source.model, plan, arguments.prompt_tokens),
                    # Time, not rate: above 1 is slower.
                    "prefill_time": 1 / speed.prefill.ratio,
                    "decode_time": 1 / speed.decode.ratio,
                }
            )
            print(rows[-1], flush=True)
    result = {
        "benchmark": "sharing_speed",
        "command": command_line(),
        "config": {name: value for name, value in vars(arguments).items() if name not in ("out", "name")},
        "seed": 0,
        "num_pairs": len(pairs),
        "num_blocks": len(blocks),
        "environment": describe_environment(),
        "rows": rows,
    }
    write_json(arguments.out / f"{arguments.name}.json", result)
    write_text(arguments.out / f"{arguments.name}.md", as_markdown(result))
    print(as_markdown(result))


def extra_operations(model: Any, plan: FoldPlan, prompt_tokens: int) -> dict[str, float]:
    """Products of the low-rank terms as a share of those of the unfolded model, attention's own left out."""
    without = [Group(blocks=group.blocks, donor="first", private=group.private) for group in plan.groups]
    terms = predicted_parameters(model, plan) - predicted_parameters(
        model, FoldPlan.create(plan.source, groups=without)
    )
    in_blocks = sum(p.numel() for p in decoder_of(model).blocks.parameters() if p.ndim > 1)
    head = model.get_output_embeddings().weight.numel()
    return {"prefill": terms / (in_blocks + head / prompt_tokens), "decode": terms / (in_blocks + head)}


def as_markdown(result: dict[str, Any]) -> str:
    config = result["config"]
    table = "\n".join(
        f"| {row['private']} | {row['batch_size']} | {row['extra_operations']['prefill']:.1%} | "
        f"{row['prefill_time']:.3f} | {row['extra_operations']['decode']:.1%} | {row['decode_time']:.3f} |"
        for row in result["rows"]
    )
    return f"""# What private terms cost in time

{config["model"]} ({config["dtype"]}), {result["num_pairs"]} pairs among its {result["num_blocks"]} blocks, folded and
unfolded in turns: a prompt of {config["prompt_tokens"]} tokens, then {config["decode_tokens"]} tokens on the KV cache.
Time of the folded model over that of the unfolded, medians of {config["repeats"]} pairs of turns; beside it what
low-rank terms add to the operations.

| private | sequences | prefill, operations | prefill, time | decode, operations | decode, time |
|---|---|---|---|---|---|
{table}

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()

"""Quality against tokens of recovery: perplexity and KL to the source of a folded model, before and after training.

Each number of tokens is a recovery of its own, from the same folded model, with its own learning-rate cosine. The
model is measured on another text than it was trained or judged on. `won_back` is the share of the log-perplexity lost
by folding that recovery won back.

    python benchmarks/recovery_curve.py --model demo:smollm2-135m --remove 13-18 --text C4.jsonl \
        --text WIKIPEDIA.jsonl --evaluate wiki.test.raw --tokens 100000 --tokens 300000 --tokens 1000000
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from block_lists import blocks_of
from command import command_line
from foldgpt.allocator import keep_freed_memory
from foldgpt.artifacts import write_json, write_text
from foldgpt.compensation import compensate, merge_
from foldgpt.corpus import OwnText, Windows, calibration_windows, evaluation_windows
from foldgpt.counts import count
from foldgpt.environment import describe_environment
from foldgpt.folding import fold_, source_model_of
from foldgpt.objectives import Head, cross_entropy, forward_kl
from foldgpt.plan import FoldPlan
from foldgpt.recovery import RecoverySettings, packed_windows, recover
from foldgpt.recovery.states import Body
from foldgpt.sources import load_source


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--remove", default="13-18", help="blocks, e.g. 13-18 or 3,7-9")
    parser.add_argument("--text", action="append", help="text to train on; may be repeated (demo:wikipedia)")
    parser.add_argument("--evaluate", default="demo:wikipedia", help="text to measure on; it should be another one")
    parser.add_argument("--tokens", type=count, action="append", help="training tokens; may be repeated (100000)")
    parser.add_argument("--held-out", type=int, default=16_384, help="tokens by which the best state is chosen")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40, help="windows to measure on")
    parser.add_argument(
        "--compensate", action="store_true", help="fit the linear compensation before, on 32,768 tokens"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--minutes", type=float, help="stop each recovery after this time")
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--lm", type=float, default=0.0)
    parser.add_argument("--last-error", type=float, default=0.0)
    parser.add_argument("--states", type=float, default=0.0)
    parser.add_argument("--train-blocks", default="all", choices=("all", "behind"))
    parser.add_argument("--train-fully", default="none", choices=("none", "cuts", "all"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="recovery_curve", help="stem of the result files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.text = arguments.text or ["demo:wikipedia"]
    arguments.tokens = sorted(arguments.tokens or [100_000])
    return arguments


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    source = load_source(arguments.model, dtype=arguments.dtype)
    own = OwnText(lambda: source.model, source.tokenizer, source.fingerprint)
    judged_on = evaluation_windows(
        [arguments.evaluate], source.tokenizer, context=arguments.context, max_windows=arguments.windows
    )
    head = Head(source.model)
    theirs = last_hidden(source.model, judged_on.ids)
    plan = FoldPlan.create(source_model_of(source.model, source.spec), removed=blocks_of(arguments.remove))
    folded = copy.deepcopy(source.model)
    if arguments.compensate:
        windows = calibration_windows(
            arguments.text, source.tokenizer, context=arguments.context, num_tokens=32_768, seed=arguments.seed, own=own
        )
        merge_(folded, compensate(folded, plan, windows.ids))
    fold_(folded, plan)
    original = measured(head, theirs, theirs, judged_on)
    start = measured(head, theirs, last_hidden(folded, judged_on.ids), judged_on)
    settings = RecoverySettings(
        kl=arguments.kl,
        lm=arguments.lm,
        last_error=arguments.last_error,
        states=arguments.states,
        rank=arguments.rank,
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
        train_blocks=arguments.train_blocks,
        train_fully=arguments.train_fully,
        evaluate_every=arguments.evaluate_every,
        minutes=arguments.minutes,
        seed=arguments.seed,
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in arguments.tokens:
            train, held_out = packed_windows(
                arguments.text,
                source.tokenizer,
                folder,
                context=arguments.context,
                num_tokens=tokens,
                num_held_out=arguments.held_out,
                seed=arguments.seed,
                own=own,
            )
            student = copy.deepcopy(folded)
            result = recover(student, source.model, plan, train, held_out, settings, Path(folder) / str(tokens))
            found = measured(head, theirs, last_hidden(student, judged_on.ids), judged_on)
            lost = math.log(start["perplexity"] / original["perplexity"])
            won = math.log(start["perplexity"] / found["perplexity"])
            rows.append({"tokens": tokens, **found, "won_back": won / lost, "recovery": result.to_json_dict()})
            print({name: value for name, value in rows[-1].items() if name != "recovery"}, flush=True)
    result_of_all = {
        "benchmark": "recovery_curve",
        "command": command_line(),
        "config": {name: plain(value) for name, value in vars(arguments).items() if name not in ("out", "name")},
        "seed": arguments.seed,
        "environment": describe_environment(),
        "source": {"spec": source.spec, "revision": source.revision, "fingerprint": source.fingerprint},
        "evaluation": {"protocol": judged_on.protocol, "fingerprint": judged_on.fingerprint},
        "original": original,
        "folded": start,
        "curve": rows,
    }
    write_json(arguments.out / f"{arguments.name}.json", result_of_all)
    write_text(arguments.out / f"{arguments.name}.md", as_markdown(result_of_all))
    print(as_markdown(result_of_all))


def plain(value: Any) -> Any:
    """A value of the command line without folders."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value


@torch.inference_mode()
def last_hidden(model: Any, ids_WT: Tensor) -> Tensor:
    """What the head would get, [W, T, H]."""
    body = Body(model)
    return torch.cat([body(ids_BT).last_BTH for ids_BT in ids_WT.split(4)])


def measured(head: Head, teacher: Tensor, student: Tensor, judged_on: Windows) -> dict[str, float]:
    """Perplexity, and KL to the source, of windows that do not overlap."""
    rows = [states[:, :-1].flatten(0, 1) for states in (teacher, student)]
    loss = cross_entropy(head, rows[1], judged_on.ids[:, 1:].flatten()).mean()
    return {"perplexity": float(loss.exp()), "kl": float(forward_kl(head, *rows).mean())}


def as_markdown(result: dict[str, Any]) -> str:
    config, environment = result["config"], result["environment"]
    lines = [
        "# Recovery against tokens",
        "",
        f"`{' '.join(result['command'])}`",
        "",
        f"{config['model']}, {config['dtype']}, blocks {config['remove']} removed"
        f"{', compensated' if config['compensate'] else ''}; LoRA of rank {config['rank']} in "
        f"{'all blocks' if config['train_blocks'] == 'all' else 'the blocks behind the first cut'}, learning rate "
        f"{config['learning_rate']}; trained on {', '.join(config['text'])}, measured on {config['windows']} windows "
        f"of {config['context']} tokens of {config['evaluate']}.",
        "",
        "| tokens | perplexity | KL | log-perplexity won back | held-out loss | seconds |",
        "|---|---|---|---|---|---|",
        f"| source | {result['original']['perplexity']:.2f} | 0 | | | |",
        f"| 0 | {result['folded']['perplexity']:.2f} | {result['folded']['kl']:.3f} | 0 % | | |",
    ]
    for row in result["curve"]:
        recovery = row["recovery"]
        lines.append(
            f"| {recovery['num_tokens']:,} | {row['perplexity']:.2f} | {row['kl']:.3f} | {row['won_back']:.0%} | "
            f"{recovery['before']['loss']:.3f} → {recovery['after']['loss']:.3f} | {recovery['seconds']:.0f} |"
        )
    lines += [
        "",
        f"{environment['cpu']}, {environment['torch_threads']} threads, torch {environment['torch']}, transformers "
        f"{environment['transformers']}, {environment['date']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

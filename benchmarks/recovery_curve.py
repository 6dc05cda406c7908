"""Quality against tokens of recovery: perplexity and KL to the source of a folded model, before and after training.

Each number of tokens is a recovery of its own, from the same folded model, with its own learning-rate cosine. The
model is measured on another text than it was trained or judged on. `won_back` is the share of the log-perplexity lost
by the removal alone that was won back, by compensation (if asked for) and recovery together.

    python benchmarks/recovery_curve.py --model demo:smollm2-135m --remove 13-18 --text C4.jsonl \
        --text WIKIPEDIA.jsonl --evaluate wiki.test.raw --tokens 100000 --tokens 300000 --tokens 1000000
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import command_line, without_folders
from foldgpt.allocator import keep_freed_memory
from foldgpt.artifacts import hash_of, read_json, write_json, write_text
from foldgpt.block_lists import blocks_of
from foldgpt.compensation import compensate, merge_
from foldgpt.corpus import OwnText, calibration_windows, evaluation_windows
from foldgpt.counts import count
from foldgpt.environment import describe_environment
from foldgpt.evaluation import TASKS, load_suite
from foldgpt.evaluation.tasks.score import average
from foldgpt.fingerprints import weights_fingerprint
from foldgpt.folding import fold_, source_model_of
from foldgpt.objectives import Head
from foldgpt.plan import FoldPlan
from foldgpt.recovery import RECOVERY, RecoverySettings, TrainingWindows, packed_windows, recover
from foldgpt.sources import Source, load_source
from judging import last_hidden, perplexity_and_kl
from provenance import provenance_of

#: What is trained in full beside the adapters.
FULLY = {"none": "", "cuts": ", the blocks beside a cut in full", "all": ", all of them in full in place of it"}


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
    parser.add_argument("--windows", type=int, default=40, help="windows to measure on; 0 for all")
    parser.add_argument("--data-dir", help="folder of the tasks' JSON-lines files, to measure accuracy as well")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be repeated (all seven)")
    parser.add_argument("--limit", type=int, default=200, help="items of each task; 0 for all")
    parser.add_argument("--work", type=Path, help="keep recovered models here; the same command then goes on")
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
    parser.add_argument("--last-cosine", type=float, default=0.0)
    parser.add_argument("--states", type=float, default=0.0)
    parser.add_argument("--train-blocks", default="all", choices=("all", "behind"))
    parser.add_argument("--train-fully", default="none", choices=("none", "cuts", "all"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="recovery_curve", help="stem of the result files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if arguments.task and not arguments.data_dir:
        parser.error("--task needs --data-dir")
    arguments.text = arguments.text or ["demo:wikipedia"]
    arguments.tokens = sorted(arguments.tokens or [100_000])
    return arguments


class Bench:
    """The source, the text and the tasks that every model is measured on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.source = load_source(arguments.model, dtype=arguments.dtype)
        self.judged_on = evaluation_windows(
            [arguments.evaluate],
            self.source.tokenizer,
            context=arguments.context,
            max_windows=arguments.windows or None,
        )
        self.suite = None
        if arguments.data_dir:
            self.suite = load_suite(
                arguments.task or list(TASKS), data_dir=arguments.data_dir, limit=arguments.limit or None
            )
        self._head = Head(self.source.model)
        self._theirs_WTH = last_hidden(self.source.model, self.judged_on.ids)

    def measured(self, model: Any) -> dict[str, float]:
        """Perplexity, KL to the source of windows that do not overlap, and the average accuracy of the tasks."""
        own_WTH = last_hidden(model, self.judged_on.ids)
        perplexity, kl = perplexity_and_kl(self._head, self._theirs_WTH, own_WTH, self.judged_on.ids)
        found = {"perplexity": perplexity, "kl": kl}
        if self.suite is not None:
            scores = self.suite.measure(model, self.source.tokenizer)
            found["accuracy"] = average(scores)
            for task, score in scores.items():
                found[f"accuracy.{task}"], found[f"chance.{task}"] = score.accuracy.value, score.chance
                found[f"error.{task}"] = score.accuracy.standard_error or math.inf
        return found


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    bench = Bench(arguments)
    source = bench.source
    own = OwnText(lambda: source.model, source.tokenizer, source.fingerprint)
    plan = FoldPlan.create(source_model_of(source.model, source.spec), removed=blocks_of(arguments.remove))
    folded = copy.deepcopy(source.model)
    fold_(folded, plan)
    result: dict[str, Any] = {
        "benchmark": "recovery_curve",
        "command": command_line(),
        "config": without_folders(
            {name: value for name, value in vars(arguments).items() if name not in ("out", "name", "work")}
        ),
        "seed": arguments.seed,
        "source": {"spec": source.spec, "revision": source.revision, "fingerprint": source.fingerprint},
        "evaluation": {"protocol": bench.judged_on.protocol, "fingerprint": bench.judged_on.fingerprint},
        "original": bench.measured(source.model),
        "removed": bench.measured(folded),
        "curve": [],
    }
    if arguments.compensate:
        windows = calibration_windows(
            arguments.text, source.tokenizer, context=arguments.context, num_tokens=32_768, seed=arguments.seed, own=own
        )
        folded = copy.deepcopy(source.model)
        merge_(folded, compensate(folded, plan, windows.ids))
        fold_(folded, plan)
        result["compensated"] = bench.measured(folded)
    settings = RecoverySettings(
        kl=arguments.kl,
        lm=arguments.lm,
        last_error=arguments.last_error,
        last_cosine=arguments.last_cosine,
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
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        for tokens in arguments.tokens:
            train, held_out = packed_windows(
                arguments.text,
                source.tokenizer,
                work,
                context=arguments.context,
                num_tokens=tokens,
                num_held_out=arguments.held_out,
                seed=arguments.seed,
                own=own,
            )
            texts = [windows.identity() for windows in (train, held_out)]
            identity = [source.fingerprint, weights_fingerprint(folded), *texts, dataclasses.asdict(settings)]
            place = work / f"{tokens}-{hash_of(identity)[:12]}"
            student, recovery = recovered(place, folded, source, plan, train, held_out, settings)
            result["curve"].append({"tokens": tokens, **bench.measured(student), "recovery": recovery})
            result["environment"] = describe_environment()
            write_json(arguments.out / f"{arguments.name}.json", result)
            write_text(arguments.out / f"{arguments.name}.md", as_markdown(result))
    print(as_markdown(result))


def recovered(
    place: Path,
    folded: Any,
    source: Source,
    plan: FoldPlan,
    train: TrainingWindows,
    held_out: TrainingWindows,
    settings: RecoverySettings,
) -> tuple[Any, dict[str, Any]]:
    """A recovered model, and how that went; one that an earlier call left there is taken over."""
    if place.exists():
        found: dict[str, Any] = read_json(place / RECOVERY)
        return load_source(str(place), device=str(source.model.device)).model, found
    student = copy.deepcopy(folded)
    result = recover(student, source.model, plan, train, held_out, settings, place, tokenizer=source.tokenizer)
    return student, result.to_json_dict()


def solved(original: dict[str, Any]) -> list[str]:
    """Tasks in which the source is better than chance by two standard errors; the others say nothing of a loss."""
    return [
        task
        for task in TASKS
        if f"accuracy.{task}" in original
        and original[f"accuracy.{task}"] > original[f"chance.{task}"] + 2 * original[f"error.{task}"]
    ]


def mean_accuracy(row: dict[str, Any], tasks: list[str]) -> float:
    return sum(row[f"accuracy.{task}"] for task in tasks) / len(tasks)


def won_back(result: dict[str, Any], row: dict[str, Any], of: Callable[[dict[str, Any]], float]) -> str:
    """The share of what the removal alone lost that a model has again; a dash if it lost nothing."""
    original, removed = of(result["original"]), of(result["removed"])
    return f"{(removed - of(row)) / (removed - original):.0%}" if removed > original else "—"


def accuracies(name: str, values: list[float]) -> str:
    return f"| {name} | {' | '.join(f'{value:.1%}' for value in (*values, sum(values) / len(values)))} |"


def as_markdown(result: dict[str, Any]) -> str:
    config, curve = result["config"], result["curve"]
    with_tasks = "accuracy" in result["original"]
    names = ("kl", "lm", "last_error", "last_cosine", "states")
    losses = " + ".join(f"{config[name]:g} {name}" for name in names if config[name])
    measured = [task for task in TASKS if f"accuracy.{task}" in result["original"]]
    items = f" and on {config['limit'] or 'all'} items of each of {len(measured)} tasks"
    tasks = solved(result["original"]) if with_tasks else []
    rows = [("source", result["original"]), ("removed", result["removed"])]
    rows += [("compensated", result["compensated"])] if "compensated" in result else []
    rows += [(f"{row['recovery']['num_tokens']:,} tokens", row) for row in curve]
    lines = [
        "# Recovery against tokens",
        "",
        f"{config['model']}, {config['dtype']}, blocks {config['remove']} removed"
        f"{', compensated' if config['compensate'] else ''}; LoRA of rank {config['rank']} in "
        f"{'all blocks' if config['train_blocks'] == 'all' else 'the blocks behind the first cut'}"
        f"{FULLY[config['train_fully']]}, loss {losses}, learning rate {config['learning_rate']}, steps of "
        f"{config['batch_size'] * config['context']:,} tokens; trained on {', '.join(config['text'])}, measured on "
        f"{config['windows'] or 'all'} windows of {config['context']} tokens of {config['evaluate']}"
        f"{items if with_tasks else ''}. "
        "Won back: of the log-perplexity and of the average accuracy that the removal alone lost.",
        "",
        "| | perplexity | KL | won back | " + "accuracy | won back | " * bool(tasks) + "held-out loss | seconds |",
        "|---|---|---|---|" + "---|---|" * bool(tasks) + "---|---|",
    ]
    for name, row in rows:
        cells = [name, f"{row['perplexity']:.2f}", f"{row['kl']:.3f}"]
        cells.append(won_back(result, row, lambda row: math.log(row["perplexity"])))
        if tasks:
            cells += [f"{mean_accuracy(row, tasks):.1%}", won_back(result, row, lambda row: -mean_accuracy(row, tasks))]
        recovery = row.get("recovery")
        cells += (
            ["", ""]
            if recovery is None
            else [
                f"{recovery['before']['loss']:.3f} → {recovery['after']['loss']:.3f}",
                f"{recovery['seconds']:.0f}",
            ]
        )
        lines.append(f"| {' | '.join(cells)} |")
    if with_tasks:
        lines += [
            "",
            f"Accuracy is the mean of {', '.join(tasks) or 'no task'}: the tasks in which the source is better than "
            "chance by two standard errors. All of them, and their mean:",
            "",
            f"| | {' | '.join(measured)} | mean |",
            "|---" * (len(measured) + 2) + "|",
            accuracies("chance", [result["original"][f"chance.{task}"] for task in measured]),
            *(accuracies(name, [row[f"accuracy.{task}"] for task in measured]) for name, row in rows),
        ]
    return "\n".join([*lines, "", provenance_of(result)]) + "\n"


if __name__ == "__main__":
    main()

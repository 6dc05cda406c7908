"""A run folder in which every part of the report has something to show."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

from foldgpt.analysis import Analysis
from foldgpt.artifacts import write_json, write_text
from foldgpt.evaluation import Evaluation, LastWord, Measured, ModelSize, PeakMemory, Perplexity, Rate, Speed, TaskScore
from foldgpt.evaluation.generations import Generation
from foldgpt.evaluation.tasks import Accuracy, retained, retained_on_average
from foldgpt.plan import Compensation, FoldPlan, Group, SourceModel

NUM_BLOCKS = 12


def analysis(num_blocks: int = NUM_BLOCKS) -> Analysis:
    """Made-up measures with the usual shape: ends that matter, a middle that does less."""
    depth = num_blocks + 1
    bi = [0.02 + 0.5 * math.exp(-block) + 0.2 * math.exp(block - num_blocks) for block in range(num_blocks)]
    sublayer = {"bi": [value / 2 for value in bi], "relative_update": [0.5] * num_blocks}
    cosine = [[math.cos(abs(i - j) / depth) for j in range(depth)] for i in range(depth)]
    spans = [[0.05 * n] * (num_blocks - n + 1) for n in range(1, num_blocks + 1)]
    return Analysis.model_validate(
        {
            "model_type": "llama",
            "num_blocks": num_blocks,
            "num_windows": 4,
            "num_tokens": 1024,
            "calibration": {"protocol": {"texts": ["some.txt"]}, "fingerprint": "f"},
            "seconds": 1.5,
            "bi": bi,
            "relative_update": [0.5] * num_blocks,
            "cosine": cosine,
            "angular": spans,
            "angular_last_token": spans,
            "attention": sublayer,
            "mlp": sublayer,
        }
    )


def plan(num_blocks: int = NUM_BLOCKS, **parts: Any) -> FoldPlan:
    """Two blocks removed and a group of two that share, chosen by gates."""
    steps = range(40)
    removed = parts.get("removed", [4, 5])
    trace = [
        {
            "step": step,
            "cost": 1 / (1 + step),
            "keep": [
                1 / (1 + math.exp((0.12 if block in removed else -0.1 - block / 100) * (step - 3)))
                for block in range(num_blocks)
            ],
        }
        for step in steps
    ]
    origin = {"selector": "gates", "seed": 0, "report": {"trace": trace}}
    chosen = {"removed": [4, 5], "groups": [Group(blocks=(7, 8)), Group(blocks=(9, 10))], "origin": origin, **parts}
    source = SourceModel(model="someone/tiny-llama", model_type="llama", num_blocks=num_blocks)
    return FoldPlan.create(source, **chosen)


def compensation() -> Compensation:
    """What a plan says that asks for compensation."""
    return Compensation(texts=("some.txt",), context=8, num_tokens=64, fingerprint="f")


def _score(accuracy: float, chance: float, seed: int) -> TaskScore:
    order = random.Random(seed)
    right = [order.random() < accuracy for _ in range(200)]
    protocol = {
        "harness": "lm_eval 1.0",
        "data": "rows.jsonl",
        "items": "all",
        "shots": 0,
        "dtype": "float32",
        "truncated_requests": 0,
    }
    return TaskScore({"acc": Accuracy.of(right)}, "acc", chance, 200, str(seed), protocol)


def _measured(name: str, num_blocks: int, perplexity: float, loss: float, text: str) -> Measured:
    rate = Rate(2900.4, 2800, 3000, 1)
    speed = {"prompt_tokens": 128, "decode_tokens": 32, "repeats": 5, "batch_size": 1, "device": "cpu"}
    chances = {"arc_easy": 0.25, "boolq": 0.5, "hellaswag": 0.25, "winogrande": 0.5}
    return Measured(
        name=name,
        size=ModelSize(
            num_blocks, 10_000_000 * num_blocks, 12_000_000 * num_blocks, 9_000_000 * num_blocks, 0, 1, 0, None
        ),
        bytes_on_disk=20_000_000 * num_blocks,
        perplexity=Perplexity(
            perplexity, math.log(perplexity), 0.01, 4000, 10, "float32", "f", {"texts": ["a.txt"], "context": 512}
        ),
        speed=Speed(rate, rate, {**speed, "dtype": "float32", "num_threads": 2}),
        peak_memory=PeakMemory(300_000_000, 700_000_000, None, "cpu", "float32"),
        tasks={task: _score(chance + 0.3 - loss, chance, seed) for seed, (task, chance) in enumerate(chances.items())},
        last_word=LastWord(0.4 - loss, 0.03, 20.0, 3.0, 0.1, 40, "float32", "f", {}),
        generations=[Generation("Once upon a time", text), Generation("The <b>sun</b> & the moon", text)],
    )


def evaluation() -> Evaluation:
    """Source and folded model with everything measured."""
    source = _measured("source", 12, 20.0, 0.0, "there was a house in the woods, and in it lived an old man.")
    folded = _measured("folded", 10, 25.0, 0.06, "there was a house, and a house, and a house.")
    assert folded.tasks is not None and source.tasks is not None
    kept = {task: retained(score, source.tasks[task]) for task, score in folded.tasks.items()}
    ratios = {name: value / source.figures()[name] for name, value in folded.figures().items()}  # type: ignore[operator]
    return Evaluation(folded, source, ratios, {**kept, "average": retained_on_average(folded.tasks, source.tasks)})


def recovery() -> dict[str, Any]:
    """What a recovery of 60 steps writes, measured every 20; the second measurement is the best."""
    losses = {20: 0.6, 40: 0.4, 60: 0.45}
    history: list[dict[str, float]] = []
    for step in range(1, 61):
        history.append({"loss": 1 - step / 100, "learning_rate": 0.001, "step": step})
        if step in losses:
            history.append({"eval_loss": losses[step], "eval_kl": losses[step] - 0.1, "step": step})
    history.append({"train_runtime": 3.0, "step": 60})
    return {
        "before": {"loss": 1.0, "kl": 0.9},
        "after": {"loss": 0.4, "kl": 0.3},
        "best_step": 40,
        "num_steps": 60,
        "num_tokens": 60_000,
        "ended": "tokens",
        "num_trained": 1_200_000,
        "seconds": 12.3,
        "history": history,
        "settings": {},
    }


def compensated(kept: bool) -> dict[str, Any]:
    """What folding writes of a compensation that was merged, or left out because it did not help."""
    after = 0.3 if kept else 0.6
    return {"kept": kept, "kl_before": 0.6, "kl_after": after, "num_tokens": 56, "num_held_out": 8, "cuts": []}


def write_run(folder: Path, **changes: Any) -> Path:
    """Write a whole run folder; a part given as None is left out."""
    parts: dict[str, Any] = {
        "plan": plan(),
        "analysis": analysis(),
        "evaluation": evaluation(),
        "recovery": recovery(),
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    parts["plan"].save(folder / "plan.json")
    if parts["analysis"] is not None:
        write_json(folder / "analysis.json", parts["analysis"].to_json_dict())
    if parts["recovery"] is not None:
        write_json(folder / "recovered" / "recovery.json", parts["recovery"])
    if parts["evaluation"] is not None:
        write_json(folder / "evaluation.json", parts["evaluation"].to_dict())
        write_json(folder / "environment.json", {"python": "3.11.0", "gpu": None, "date": "2026-01-31T00:00:00+00:00"})
        write_text(folder / "recipe.yaml", "model: someone/tiny-llama\n")
    return folder


def without_tasks(whole: Evaluation) -> Evaluation:
    """The evaluation that an earlier foldgpt would have made."""
    changes: dict[str, Any] = {"tasks": None, "last_word": None, "generations": None}
    baseline = None if whole.baseline is None else dataclasses.replace(whole.baseline, **changes)
    return Evaluation(dataclasses.replace(whole.folded, **changes), baseline, whole.ratios)

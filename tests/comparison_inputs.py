"""A comparison in which every part of its page has something to show."""

from __future__ import annotations

from foldgpt.comparison import Comparison, Method
from foldgpt.evaluation import Interval, Retained

_ROWS = (
    # name, recovered, perplexity, tasks, gap, perplexity difference, accuracy difference
    ("random", False, 41_234.0, 0.36, 0.0, Interval(41_000, 38_000, 44_000), Interval(-0.08, -0.1, -0.06)),
    ("bi", False, 65.4, 0.44, 0.0, None, None),
    ("gates", False, 61.1, 0.445, 0.0, Interval(-4.3, -5.6, -3.1), Interval(0.005, -0.01, 0.02)),
    ("gates + sharing", False, 60.0, 0.45, -0.05, Interval(-5.4, -6, -5), Interval(0.01, 0.005, 0.02)),
    ("bi", True, 31.0, 0.47, 0.0, None, None),
    ("gates", True, 27.5, 0.485, 0.0, Interval(-3.5, -3.9, -3.0), Interval(0.015, 0.004, 0.026)),
)


def comparison() -> Comparison:
    """Six runs of a made-up model."""
    source = Method(
        "source", False, None, None, [], 0, _figures(20.2, 0.52, 106_000_000), 1.0, None, None, True,
        {"wiki.test.raw": 20.2}, {}, None,
    )  # fmt: skip
    methods = [
        Method(
            name=name,
            recovered=recovered,
            run=f"rows/{name}{'-recovered' if recovered else ''}",
            seconds=340.0,
            removed=[4, 5, 14, 16, 17, 18],
            num_sharing=4 if "sharing" in name else 0,
            figures=_figures(perplexity, accuracy, round(85_000_000 * (1 + gap))),
            decode_ratio=1.22,
            retained=Retained(accuracy / 0.52, (accuracy - 0.35) / 0.17, accuracy - 0.52, 0.01),
            budget_gap=gap,
            is_fair=gap == 0,
            perplexities={"wiki.test.raw": perplexity},
            perplexity_differences={} if difference is None else {"wiki.test.raw": difference},
            accuracy_difference=points,
            trained_tokens=1_000_000 if recovered else None,
            training_ended="tokens" if recovered else None,
        )
        for name, recovered, perplexity, accuracy, gap, difference, points in _ROWS
    ]
    return Comparison(
        model="someone/tiny-llama",
        texts=["wiki.test.raw"],
        tasks={"piqa": 0.5, "arc_easy": 0.25},
        reference="bi",
        methods=[source, *methods],
        confidence=0.95,
        samples=10_000,
        seed=0,
        budget_tolerance=0.01,
        recovery_tokens=1_000_000,
        protocol=["Perplexity in bfloat16: context 512."],
        environment={"python": "3.11", "gpu": None, "date": "2026-01-31T00:00:00+00:00"},
    )


def _figures(perplexity: float, accuracy: float, block_parameters: int) -> dict[str, float | None]:
    return {
        "num_blocks": 24,
        "unique_parameters": block_parameters + 28_000_000,
        "block_parameters": block_parameters,
        "bytes_on_disk": 2 * (block_parameters + 28_000_000),
        "perplexity": perplexity,
        "decode_tokens_per_s": 28.0,
        "last_word_accuracy": accuracy - 0.2,
        "task.piqa": accuracy + 0.1,
        "task.arc_easy": accuracy - 0.1,
        "task_average": accuracy,
    }

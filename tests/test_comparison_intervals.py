"""'Better' is said only where it is certain: paired intervals cover the truth as often as they say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy
import pytest

from foldgpt.evaluation import (
    Interval,
    MeasurementError,
    Perplexity,
    TaskScore,
    accuracy_difference,
    perplexity_difference,
)
from foldgpt.evaluation.tasks import Accuracy


def perplexity_with(nlls: numpy.ndarray, tokens: int = 100, fingerprint: str = "f") -> Perplexity:
    mean = float(nlls.mean()) / tokens
    counts = [tokens] * len(nlls)
    return Perplexity(
        math.exp(mean), mean, None, tokens * len(nlls), len(nlls), "float32", fingerprint, {}, nlls.tolist(), counts
    )


def score_with(hits: numpy.ndarray, fingerprint: str = "f") -> TaskScore:
    return TaskScore({"acc": Accuracy.of([bool(hit) for hit in hits])}, "acc", 0.25, len(hits), fingerprint, {})


def test_pairing_sees_what_separate_errors_would_hide() -> None:
    """Windows differ by ten times the difference of the models; each window alone tells it."""
    generator = numpy.random.default_rng(0)
    windows = 300 + 50 * generator.standard_normal(40)
    worse = windows + 5 + generator.standard_normal(40)
    interval = perplexity_difference(perplexity_with(worse), perplexity_with(windows), samples=4000, confidence=0.95)
    assert interval.low > 0 and interval.is_certain
    assert interval.low < interval.difference < interval.high
    assert interval.difference == pytest.approx(math.exp(worse.mean() / 100) - math.exp(windows.mean() / 100))
    # By hand: the delta method on the mean difference, at the mean perplexity.
    spread = (worse - windows).std(ddof=1) / math.sqrt(40) / 100 * math.exp(windows.mean() / 100)
    assert interval.high - interval.low > 2 * 1.96 * spread


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = numpy.random.default_rng(1)
    covered = 0
    for seed in range(200):
        hits = generator.random((2, 150)) < numpy.array([[0.55], [0.5]])
        interval = accuracy_difference(
            {"t": score_with(hits[0])}, {"t": score_with(hits[1])}, samples=500, confidence=0.9, seed=seed
        )
        covered += interval.low <= 0.05 <= interval.high
    assert 0.84 <= covered / 200 <= 0.96


def test_tasks_count_the_same_and_are_resampled_apart() -> None:
    """Items of a large task must not be drawn into a small one: its own spread is all there is."""
    sure, other = numpy.ones(500), numpy.zeros(500)
    few = numpy.array([1, 0, 1, 1])
    interval = accuracy_difference(
        {"large": score_with(sure), "small": score_with(few)},
        {"large": score_with(other), "small": score_with(numpy.zeros(4))},
        samples=2000,
        confidence=0.95,
    )
    assert interval.difference == pytest.approx((1 + 0.75) / 2)
    # Resamples reach from one right answer in four to four; Student's quantile for four items over the normal one.
    wider = 3.182446 / 1.959964 * math.sqrt(4 / 3)
    assert interval.low == pytest.approx(0.875 - wider * (0.875 - (0.5 + 0.25 / 2)))
    assert interval.high == pytest.approx(0.875 + wider * (1.0 - 0.875))


@pytest.mark.parametrize(("num_windows", "plain"), [(5, 0.16), (8, 0.1)])
def test_equal_models_seldom_differ_for_certain_on_a_few_windows(
    num_windows: int, plain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def certain() -> float:
        generator = numpy.random.default_rng(num_windows)
        windows = perplexity_with(numpy.full(num_windows, 300.0))
        found = 0
        for seed in range(1000):
            own = perplexity_with(300 + generator.standard_normal(num_windows))
            found += perplexity_difference(own, windows, samples=300, confidence=0.95, seed=seed).is_certain
        return found / 1000

    assert certain() == pytest.approx(0.05, abs=0.02)
    monkeypatch.setattr("foldgpt.evaluation.bootstrap._widening", lambda *_: 1.0)
    assert certain() == pytest.approx(plain, abs=0.03), "without widening"


def test_a_task_of_a_single_item_leaves_all_open() -> None:
    """How the accuracy on it would vary is not known, however sure the other task is."""
    right, wrong = numpy.ones(50), numpy.zeros(50)
    right[0] = 0
    own = {"many": score_with(right), "one": score_with(numpy.ones(1))}
    other = {"many": score_with(wrong), "one": score_with(numpy.zeros(1))}
    interval = accuracy_difference(own, other, samples=200, confidence=0.95)
    assert interval.low == interval.high == interval.difference == pytest.approx(0.99)
    assert not interval.is_certain


def test_the_same_model_differs_from_itself_by_nothing_and_seeds_decide_the_rest() -> None:
    nlls = numpy.random.default_rng(2).random(10) * 100
    same = perplexity_difference(perplexity_with(nlls), perplexity_with(nlls), samples=100, confidence=0.95)
    assert same == Interval(0.0, 0.0, 0.0) and not same.is_certain
    other = perplexity_with(nlls[::-1] + numpy.arange(10))
    draws = [
        perplexity_difference(perplexity_with(nlls), other, samples=100, confidence=0.95, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_single_window_proves_nothing() -> None:
    """All its resamples are itself, so the interval excludes zero whatever the difference."""
    own, other = (perplexity_with(numpy.array([nll])) for nll in (300.0, 301.0))
    interval = perplexity_difference(own, other, samples=100, confidence=0.95)
    assert interval.low == interval.high < 0 and not interval.is_certain


def test_what_cannot_be_paired_is_refused() -> None:
    nlls = numpy.ones(4)
    how: dict[str, Any] = {"samples": 100, "confidence": 0.95}
    with pytest.raises(MeasurementError, match="different windows"):
        perplexity_difference(perplexity_with(nlls), perplexity_with(nlls, fingerprint="g"), **how)
    with pytest.raises(MeasurementError, match="measure it again"):
        perplexity_difference(perplexity_with(nlls), replace(perplexity_with(nlls), window_nlls=None), **how)
    with pytest.raises(MeasurementError, match="different items"):
        accuracy_difference({"t": score_with(nlls)}, {"t": score_with(nlls, "g")}, **how)

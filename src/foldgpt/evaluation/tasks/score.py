"""Accuracies, and how much of the source's accuracy is left: raw, and above what guessing gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from foldgpt.evaluation.errors import MeasurementError

#: A source is better than guessing when it is so by this many standard errors of guessing.
_CLEARLY = 2


@dataclass(frozen=True)
class Accuracy:
    """Accuracy by one metric.

    Attributes:
        value: fraction of the items answered rightly.
        standard_error: of the value; None for a single item.
        hits: one character for each item, in order: 1 where the answer was right, else 0.
    """

    value: float
    standard_error: float | None
    hits: str

    @classmethod
    def of(cls, right: Sequence[bool]) -> Accuracy:
        """The accuracy of a list of answers."""
        value = fmean(right)
        error = math.sqrt(value * (1 - value) / (len(right) - 1)) if len(right) > 1 else None
        return cls(value, error, "".join("1" if item else "0" for item in right))


@dataclass(frozen=True)
class TaskScore:
    """How a model did on one task.

    Attributes:
        metrics: metric → accuracy, as the harness defines them: `acc` takes the choice with the highest
            log-likelihood, `acc_norm` the one with the highest log-likelihood per character.
        headline: the metric that averages are made of.
        chance: what guessing would give: the mean over items of 1 / number of choices.
        num_items: how many items were scored.
        fingerprint: of prompts, choices and answers; two scores compare only if it is the same.
        protocol: harness, data, shots, limit, number format, truncated items.
    """

    metrics: dict[str, Accuracy]
    headline: str
    chance: float
    num_items: int
    fingerprint: str
    protocol: dict[str, Any]

    @property
    def accuracy(self) -> Accuracy:
        """By the headline metric."""
        return self.metrics[self.headline]


@dataclass(frozen=True)
class Retained:
    """What a folded model kept of its source's accuracy.

    Attributes:
        raw: folded / source; None where the source is always wrong.
        above_chance: (folded − chance) / (source − chance), negative below chance; None unless the source is
            better than chance by two standard errors of guessing, because noise would be divided by noise.
        difference: folded − source.
        standard_error: of the difference. Both answer the same items, so their luck cancels; None for a
            single item.
    """

    raw: float | None
    above_chance: float | None
    difference: float
    standard_error: float | None


def retained(folded: TaskScore, source: TaskScore) -> Retained:
    """Compare the headline accuracies of two models on one task.

    Raises:
        MeasurementError: they did not answer the same items.
    """
    if folded.fingerprint != source.fingerprint:
        raise MeasurementError("two accuracies on different items cannot be compared")
    own, other = folded.accuracy, source.accuracy
    differences = [int(mine) - int(theirs) for mine, theirs in zip(own.hits, other.hits, strict=True)]
    return _retained(own.value, other.value, source.chance, _guessing_error(source), _standard_error(differences))


def average(scores: Mapping[str, TaskScore]) -> float:
    """Mean headline accuracy over tasks, each counting the same however many items it has."""
    return fmean(score.accuracy.value for score in scores.values())


def retained_on_average(folded: Mapping[str, TaskScore], source: Mapping[str, TaskScore]) -> Retained:
    """Compare the mean headline accuracies of two models over the same tasks.

    Raises:
        MeasurementError: they did not answer the same items.
    """
    each = [retained(score, source[task]) for task, score in folded.items()]
    return _retained(
        average(folded),
        average(source),
        fmean(score.chance for score in source.values()),
        _of_mean([_guessing_error(score) for score in source.values()]),
        _of_mean([one.standard_error for one in each]),
    )


def _retained(own: float, other: float, chance: float, guessing_error: float | None, error: float | None) -> Retained:
    clear = guessing_error is not None and other - chance > _CLEARLY * guessing_error
    return Retained(
        raw=own / other if other else None,
        above_chance=(own - chance) / (other - chance) if clear else None,
        difference=own - other,
        standard_error=error,
    )


def _guessing_error(score: TaskScore) -> float | None:
    """Standard error that guessing would have; that of the answers is 0 where all are right. None for a single item."""
    if score.num_items < 2:
        return None
    return math.sqrt(score.chance * (1 - score.chance) / score.num_items)


def _standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean."""
    if len(values) < 2:
        return None
    mean = fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _of_mean(errors: Sequence[float | None]) -> float | None:
    """Standard error of the mean of independent values, from theirs."""
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(errors) if len(known) == len(errors) else None

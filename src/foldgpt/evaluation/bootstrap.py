"""What differs for certain: paired bootstrap intervals (Efron and Tibshirani 1993, percentile method).

Two models are measured on the same windows and the same items. What makes a window or an item hard is hard for both,
so it is drawn for both at once, and cancels in the difference.

Of few windows or items, resamples vary less than new ones would, and how much they vary is itself uncertain. So
intervals are widened about the difference: by √(n / (n − 1)), and by Student's quantile over the normal one (Hesterberg
2015, "What teachers should know about the bootstrap", which widens their levels by the same).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from foldgpt.evaluation.errors import MeasurementError
from foldgpt.evaluation.perplexity import Perplexity
from foldgpt.evaluation.tasks import TaskScore

#: Numbers drawn at once; all resamples of a large task would fill memory.
_DRAWN_AT_ONCE = 1 << 22

_Floats = NDArray[numpy.float64]
_Ints = NDArray[numpy.int64]


@dataclass(frozen=True)
class Interval:
    """A difference, own − other, and where it lies with the given confidence.

    Attributes:
        difference: as measured.
        low, high: the percentile interval, widened; the difference itself where nothing tells how it would vary.
    """

    difference: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """Whether the interval excludes zero. Only then may one say 'better' or 'worse'.

        One without width says nothing: there was a single window or item, or all said the same.
        """
        return self.low < self.high and (self.low > 0 or self.high < 0)


def perplexity_difference(
    own: Perplexity, other: Perplexity, *, samples: int, confidence: float, seed: int = 0
) -> Interval:
    """The difference of two perplexities on one text; windows are resampled.

    Raises:
        MeasurementError: they are not on the same windows, or their windows were not kept.
    """
    if own.fingerprint != other.fingerprint:
        raise MeasurementError("two perplexities on different windows cannot be compared")
    kept = (own.window_nlls, other.window_nlls, own.window_tokens)
    if any(values is None for values in kept):
        raise MeasurementError("a perplexity without the losses of its windows cannot be compared; measure it again")
    own_N, other_N, tokens_N = (numpy.asarray(values, dtype=numpy.float64) for values in kept)

    def differences(rows_SN: _Ints) -> _Floats:
        tokens_S = tokens_N[rows_SN].sum(1)
        result: _Floats = numpy.exp(own_N[rows_SN].sum(1) / tokens_S) - numpy.exp(other_N[rows_SN].sum(1) / tokens_S)
        return result

    drawn = numpy.concatenate([differences(rows_SN) for rows_SN in _resamples(len(own_N), samples, seed)])
    return _interval(own.value - other.value, drawn, confidence, [(len(own_N), 1.0)])


def accuracy_difference(
    own: Mapping[str, TaskScore], other: Mapping[str, TaskScore], *, samples: int, confidence: float, seed: int = 0
) -> Interval:
    """The difference of two mean headline accuracies over the same tasks; items are resampled within each task.

    Raises:
        MeasurementError: they did not answer the same items.
    """
    measured, drawn = 0.0, numpy.zeros(samples)
    variances: list[tuple[int, float]] = []
    for number, (task, score) in enumerate(own.items()):
        if task not in other or score.fingerprint != other[task].fingerprint:
            raise MeasurementError("two accuracies on different items cannot be compared")
        differences_N = _hits(score) - _hits(other[task])
        measured += float(differences_N.mean())
        resamples = _resamples(len(differences_N), samples, seed + number)
        drawn += numpy.concatenate([differences_N[rows_SN].mean(1) for rows_SN in resamples])
        variances.append((len(differences_N), float(differences_N.var())))
    return _interval(measured / len(own), drawn / len(own), confidence, variances)


def _hits(score: TaskScore) -> _Floats:
    return numpy.array([float(hit) for hit in score.accuracy.hits])


def _resamples(num_items: int, samples: int, seed: int) -> Iterator[_Ints]:
    """Row numbers [some samples, num_items], drawn with replacement, until there are enough samples."""
    generator = numpy.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // num_items)
    for start in range(0, samples, at_once):
        yield generator.integers(num_items, size=(min(at_once, samples - start), num_items))


def _interval(measured: float, drawn_S: _Floats, confidence: float, variances: Sequence[tuple[int, float]]) -> Interval:
    """The interval of a difference.

    Args:
        measured: the difference.
        drawn_S: the differences of the resamples.
        confidence: of the interval.
        variances: for each sample that is resampled by itself: how many there are in it, and their variance (over n),
            in any unit.
    """
    if any(number < 2 for number, _ in variances):
        return Interval(measured, measured, measured)
    outside = (1 - confidence) / 2
    low, high = numpy.quantile(drawn_S, [outside, 1 - outside])
    by = _widening(variances, outside)
    return Interval(measured, measured + by * float(low - measured), measured + by * float(high - measured))


def _widening(variances: Sequence[tuple[int, float]], outside: float) -> float:
    """By how much an interval of resamples is too narrow; the degrees of freedom are Welch's."""
    resampled = [variance / number for number, variance in variances]
    true = [variance / (number - 1) for number, variance in variances]
    if not sum(true):
        return 1.0
    freedom = sum(true) ** 2 / sum(each**2 / (number - 1) for each, (number, _) in zip(true, variances, strict=True))
    student = stdtrit(freedom, 1 - outside) / ndtri(1 - outside)
    return float(student * (sum(true) / sum(resampled)) ** 0.5)

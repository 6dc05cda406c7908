"""What is measured of what a selector removes, and how it is reported; and each unit alone, where searches begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from foldgpt.errors import FoldGPTError, first_line, is_out_of_memory
from foldgpt.progress import bar, note
from foldgpt.selection.cost import RemovalCost, Sample
from foldgpt.selection.selection import Request, Selection
from foldgpt.selection.units import Removed


def leave_one_out(
    cost: RemovalCost,
    sample: Sample | None = None,
    *,
    known: Sequence[float] = (),
    after_each: Callable[[list[float]], None] = lambda scores: None,
) -> list[float]:
    """The cost of removing each unit alone; infinite where the model could not exist.

    Args:
        cost: the measure.
        sample: where to measure; all windows by default.
        known: scores of the first units, measured before the search was stopped.
        after_each: called with the scores so far whenever a unit has been measured.
    """
    units = cost.units
    scores = list(known)
    with bar("each alone", len(units)) as progress:
        progress.advance(len(scores))
        for unit in range(len(scores), len(units)):
            allowed = units.is_allowed([unit])
            scores.append(cost.cost(frozenset([unit]), sample, keep=False) if allowed else float("inf"))
            after_each(scores)
            progress.advance()
    return scores


def capped(scores: Sequence[float]) -> list[float]:
    """Scores with the largest finite one in place of infinities; 0 where all are infinite."""
    largest = max((score for score in scores if score != float("inf")), default=0.0)
    return [min(score, largest) for score in scores]


def ranked(scores: Sequence[float]) -> list[int]:
    """Units from the one to remove first to the one to keep longest."""
    return sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))


def selection_of(
    method: str,
    cost: RemovalCost,
    removed: Removed,
    *,
    scores: Sequence[float] | None,
    order: Sequence[int],
    report: dict[str, Any],
) -> Selection:
    """The answer of a measured selector, with the cost of the search in its report.

    Args:
        method: the selector.
        cost: the measure it used.
        removed: the units to remove.
        scores: one a unit; infinities become the largest finite score, for JSON has none.
        order: units by removal.
        report: what else is to be reported.
    """
    whole, attention, mlp = cost.units.parts(removed)
    return Selection(
        method=method,
        scores=None if scores is None else tuple(capped(scores)),
        order=tuple(order),
        removed=whole,
        removed_attention=attention,
        removed_mlp=mlp,
        report=_report_of(cost, report),
    )


def _report_of(cost: RemovalCost, further: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured on, and what that took so far."""
    return {
        "objective": cost.objective,
        "compensated": cost.compensate,
        "num_windows": cost.replay.num_windows,
        "num_tokens": cost.replay.ids_WT.numel(),
        "num_positions": len(cost.everything.rows_R),
        "num_copied": int(cost.copied_R.sum()),
        "num_prior_tokens": cost.num_prior_tokens,
        "seconds": round(cost.seconds, 3),
        "forward_equivalents": round(cost.forward_equivalents, 2),
        **further,
    }


def with_cost(selection: Selection, request: Request) -> Selection:
    """What a selector chose that measures no set, with the cost of that set in its report as measured ones have it.

    The time and the passes in the report are those of measuring it. What cannot be measured is said and left out: the
    choice does not rest on it.

    Args:
        selection: whole blocks, chosen for this request.
        request: what was asked, with a model and windows.
    """
    if not selection.removed:
        return selection
    try:
        cost = request.need_cost(selection.method)
        value = cost.cost(frozenset(selection.removed), keep=False)
    except (FoldGPTError, MemoryError, RuntimeError) as error:
        if not isinstance(error, FoldGPTError) and not is_out_of_memory(error):
            raise
        note(f"what this removal costs was not measured: {first_line(error)}")
        return selection
    return replace(selection, report={**selection.report, **_report_of(cost, {"cost": value})})


def cost_passes(head: float) -> float:
    """About how many forward passes `with_cost` takes: the recording, the set from its first block on, and the head.

    Half of the blocks lie behind the first one on average. The source's own predictions take two passes of the head.

    Args:
        head: what the predictions of one set take, in forward passes of the blocks.
    """
    return 1.5 + 3 * head

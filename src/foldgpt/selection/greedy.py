"""Greedy: remove the block whose removal costs least, measure the rest again, and so on.

The search of SLEB (Song et al. 2024, arXiv 2402.09025), with the KL to the source in place of the language-modelling
loss unless that is asked for, and run from the candidate on instead of from the start.
"""

from __future__ import annotations

from typing import Any

from foldgpt.artifacts import with_infinity, without_infinity
from foldgpt.progress import bar
from foldgpt.selection.checkpoint import Checkpoint
from foldgpt.selection.cost import RemovalCost
from foldgpt.selection.measured import ranked, selection_of
from foldgpt.selection.selection import Request, Selection
from foldgpt.selection.units import Removed


def greedy(request: Request) -> Selection:
    """Remove one unit at a time, each time the one with which the model is nearest to the source.

    Raises:
        UsageError: the model or the windows are missing, or no set meets the budget.
        FoldGPTError: a cost is not a number.
        ArtifactError: the checkpoint cannot be written.
    """
    cost = request.need_cost("greedy")
    units = cost.units
    checkpoint = Checkpoint("greedy", request, cost)
    order: list[int] = checkpoint.found.get("order", [])
    trace: list[dict[str, Any]] = checkpoint.found.get("trace", [])
    first = with_infinity(checkpoint.found.get("first", []))
    removed: Removed = frozenset(order)

    def keep(*, now: bool = False) -> None:
        checkpoint.save({"order": order, "trace": trace, "first": without_infinity(first)}, now=now)

    with bar("greedy", units.target) as progress:
        progress.advance(sum(units.sizes[unit] for unit in order))
        while units.missing(removed) > 0:
            costs = _next_costs(cost, removed)
            first = first or costs
            best = ranked(costs)[0]
            if costs[best] == float("inf"):
                raise units.unreachable()
            removed |= {best}
            order.append(best)
            spent = {
                "seconds": round(cost.seconds, 3),
                "forward_equivalents": round(cost.forward_equivalents, 2),
            }
            trace.append({"removed": best, "cost": costs[best], **spent})
            keep()
            progress.advance(units.sizes[best])
    if order:
        keep(now=True)
    # A last unit may be larger than what was missing; what that makes unnecessary is put back.
    kept_out = units.fill(order) if order else removed
    scores = first or [0.0] * len(units)
    report = {"cost": trace[-1]["cost"] if trace else 0.0, "trace": trace}
    if kept_out != removed:
        report["cost"] = cost.cost(kept_out)
    return selection_of("greedy", cost, kept_out, scores=scores, order=order, report=report)


def removal_passes(num_units: int, num_removed: float, *, head: float) -> float:
    """About how many forward passes over its windows greedy removal takes, the recording of the source included.

    It tries every unit that is left, each time, and what it tries shares what lies before it: half of the units that
    are left run on average.

    Args:
        num_units: units that may be removed.
        num_removed: how many are, on average over those of unlike size.
        head: what the predictions of one set take, in forward passes of the blocks.
    """
    passes = 1.0
    left = num_units
    while num_removed > 0:
        passes += min(num_removed, 1.0) * (left * (0.5 * left / num_units + head))
        left -= 1
        num_removed -= 1
    return passes


def greedy_passes(request: Request, head: float) -> float:
    """What `greedy` takes if units are of one size; see `removal_passes`."""
    return removal_passes(request.num_units, request.per_block * request.num_remove, head=head)


def _next_costs(cost: RemovalCost, removed: Removed) -> list[float]:
    """The cost of also removing each further unit; infinite for those that cannot go."""
    cost.walk(removed)
    costs = []
    for unit in range(len(cost.units)):
        wider = removed | {unit}
        possible = unit not in removed and cost.units.is_allowed(wider)
        costs.append(cost.cost(wider, keep=False) if possible else float("inf"))
    return costs

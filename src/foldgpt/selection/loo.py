"""Leave-one-out: remove the blocks whose removal alone costs least. It does not see how blocks depend on each other."""

from __future__ import annotations

from foldgpt.artifacts import with_infinity, without_infinity
from foldgpt.selection.checkpoint import Checkpoint
from foldgpt.selection.measured import leave_one_out, ranked, selection_of
from foldgpt.selection.selection import Request, Selection


def loo(request: Request) -> Selection:
    """Measure the model without each unit in turn, and remove the cheapest ones.

    Raises:
        UsageError: the model or the windows are missing, or no set meets the budget.
        FoldGPTError: a cost is not a number.
        ArtifactError: the checkpoint cannot be written.
    """
    cost = request.need_cost("loo")
    checkpoint = Checkpoint("loo", request, cost)
    known = with_infinity(checkpoint.found.get("scores", []))
    scores = leave_one_out(
        cost, known=known, after_each=lambda scores: checkpoint.save({"scores": without_infinity(scores)})
    )
    checkpoint.save({"scores": without_infinity(scores)}, now=True)
    order = ranked(scores)
    removed = cost.units.fill(order)
    value = cost.cost(removed)
    return selection_of("loo", cost, removed, scores=scores, order=order, report={"cost": value})


def loo_passes(request: Request, head: float) -> float:
    """What `loo` takes: the recording, and each unit once, behind which half of the blocks lie on average."""
    return 1 + request.num_units * (0.5 + head)

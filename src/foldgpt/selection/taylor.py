"""First-order Taylor: remove the blocks on whose gate, at 1, the loss depends least (Molchanov et al. 2019,
arXiv 1906.10771; LLM-Pruner, Ma et al. 2023, arXiv 2305.11627).

The loss is always that of language modelling: the KL to the source is least when all gates are 1, so that its
gradient there is zero and says nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from foldgpt.progress import bar
from foldgpt.selection.gated_pass import gradient_of_gates
from foldgpt.selection.measured import ranked, selection_of
from foldgpt.selection.selection import Request, Selection


def taylor(request: Request) -> Selection:
    """Score each block by the mean over micro-batches of |∂ loss / ∂ gate|, and remove the lowest ones."""
    cost = replace(request, objective="lm").need_cost("taylor")
    open_N = torch.ones(request.num_blocks, dtype=torch.float64)
    total_N = torch.zeros_like(open_N)
    with bar("gradients", cost.num_batches) as progress:
        for batch in range(cost.num_batches):
            _, gradient_N = gradient_of_gates(cost, cost.sample(batch, batch + 1), open_N)
            total_N += gradient_N.abs() / cost.num_batches
            progress.advance()
    scores = total_N.tolist()
    order = ranked(scores)
    removed = cost.units.fill(order)
    return selection_of("taylor", cost, removed, scores=scores, order=order, report={"cost": cost.cost(removed)})


def taylor_passes(request: Request, head: float) -> float:
    """What `taylor` takes: there, back to the gates for about twice as much, and the cost of what it removes."""
    return 4 + 2 * head

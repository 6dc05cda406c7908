"""First-order Taylor: remove the blocks on whose gate, at 1, the loss depends least (Molchanov et al. 2019,
arXiv 1906.10771; LLM-Pruner, Ma et al. 2023, arXiv 2305.11627).

The loss is always that of language modelling: the KL to the source is least when all gates are 1, so that its
gradient there is zero and says nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from foldgpt.progress import bar
from foldgpt.selection.cost import num_positions
from foldgpt.selection.gated_pass import gradient_of_gates
from foldgpt.selection.measured import ranked, selection_of
from foldgpt.selection.selection import Request, Selection, windows_at_once


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
    """What `taylor` takes: the recording, there and back to the gates as three passes, the cost of what it removes.

    A set's cost is read at a limited number of positions, the gradient at half of those of each micro-batch. A request
    that has no windows is taken to be within the limit.
    """
    there_and_back = 3 + 2 * head * _times_as_many_positions(request)
    return 1 + there_and_back + 0.5 + head


def _times_as_many_positions(request: Request) -> float:
    """Positions at which the gradient is taken, compared with those at which the cost of a set is."""
    if request.ids_WT is None:
        return 1.0
    windows, context = request.ids_WT.shape
    # The last position of a window has no next token.
    tokens = context - 1
    size = windows_at_once(windows, context)
    batches = (min(size, windows - start) for start in range(0, windows, size))
    return sum(num_positions(batch * tokens) for batch in batches) / num_positions(windows * tokens)

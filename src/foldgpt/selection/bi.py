"""Block Influence: remove the blocks that turn the hidden state least (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from foldgpt.selection.selection import Request, Selection


def bi(request: Request) -> Selection:
    """Remove the blocks of lowest BI. BI rates each block alone, in the whole model.

    Raises:
        UsageError: no analysis, or one of another model.
        PlanError: the model cannot be folded without these blocks; others would not be the method's.
    """
    scores = request.need_analysis("bi").bi
    order = sorted(range(request.num_blocks), key=lambda index: (scores[index], index))
    return Selection("bi", tuple(scores), tuple(order), request.foldable(order[: request.num_remove]))

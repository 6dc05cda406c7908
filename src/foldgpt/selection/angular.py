"""Angular run: remove the one span of consecutive blocks that turns the hidden state least.

The similarity-informed strategy of "The Unreasonable Ineffectiveness of the Deeper Layers" (Gromov et al.,
arXiv 2403.17887), with angular distances averaged over all tokens.
"""

from __future__ import annotations

from foldgpt.selection.selection import Request, Selection


def angular(request: Request) -> Selection:
    """Remove the span of `num_remove` blocks whose input and output are nearest in angle.

    Raises:
        UsageError: no analysis, or one of another model.
        PlanError: the model cannot be folded without these blocks; others would not be the method's.
    """
    analysis = request.need_analysis("angular")
    scores = tuple(analysis.angular_span(1))
    if request.num_remove == 0:
        return Selection("angular", scores, (), ())
    start = analysis.best_angular_span(request.num_remove)
    span = request.foldable(range(start, start + request.num_remove))
    return Selection("angular", scores, span, span)

"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path

from foldgpt.analysis import Analysis
from foldgpt.plan import FoldPlan
from foldgpt.selection.units import closed_units, unit_names


def draw(analysis: Analysis | None, plan: FoldPlan | None, folder: Path) -> list[Path]:
    """Draw what there is into a folder, as PNG and SVG; returns the PNGs."""
    from foldgpt.figures import draw_gates, draw_plan, draw_redundancy, draw_similarity  # matplotlib takes a second

    drawn: list[Path] = []
    if analysis is not None:
        drawn.append(draw_redundancy(analysis, folder / "redundancy")[0])
        drawn.append(draw_similarity(analysis, folder / "similarity")[0])
    if plan is not None:
        bi = None if analysis is None else analysis.bi
        drawn.append(draw_plan(plan, folder / "plan", bi=bi)[0])
        trace = plan.origin.get("report", {}).get("trace")
        if trace and plan.origin.get("selector") == "gates":
            num_units, num_blocks = len(trace[0]["keep"]), plan.source.num_blocks
            names = unit_names(num_units, num_blocks)
            what = "block" if num_units == num_blocks else "sublayer"
            drawn.append(draw_gates(trace, closed_units(plan, num_units), folder / "gates", names, what)[0])
    return drawn

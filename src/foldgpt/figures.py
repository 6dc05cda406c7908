"""Pictures of an analysis, of a plan and of several, as PNG and SVG. Import it late: matplotlib takes a second."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from foldgpt.artifacts import write_bytes
from foldgpt.plan import FoldPlan
from foldgpt.strip import fates_of, group_letter

if TYPE_CHECKING:
    from foldgpt.analysis.result import Analysis, SublayerMeasures
    from foldgpt.comparison import Agreement

#: Okabe and Ito's palette, told apart by every kind of colour vision.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_GROUP_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00")
_KEPT_COLOUR, _INK, _PALE = "#4D5A66", "#222222", "#8A8F94"

#: How removed blocks are drawn.
_HOLLOW: dict[str, Any] = {"facecolor": "none", "edgecolor": _PALE, "linestyle": (0, (2, 1.5)), "linewidth": 0.9}

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _PALE,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "foldgpt",
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def draw_redundancy(analysis: Analysis, path_stem: str | Path) -> tuple[Path, Path]:
    """Draw how much each block, its attention and its MLP change the residual stream.

    Above block influence, on a logarithmic scale where the values are far apart: there the least influential
    blocks are told apart. Below the similarity (1 − BI) on a linear one: there the whole is seen.

    Args:
        analysis: what to draw; sublayers without measures are left out.
        path_stem: `figures/redundancy` makes `figures/redundancy.png` and `.svg`.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ArtifactError: the files cannot be written.
    """
    blocks = range(analysis.num_blocks)
    curves: list[tuple[str, Analysis | SublayerMeasures, str, str, float]] = []
    curves.append(("whole block", analysis, _BLUE, "o", 2.0))
    if analysis.attention is not None:
        curves.append(("attention", analysis.attention, _ORANGE, "^", 1.2))
    if analysis.mlp is not None:
        curves.append(("MLP", analysis.mlp, _GREEN, "s", 1.2))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_width(analysis.num_blocks), 5.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for label, measures, colour, marker, width in curves:
            upper.plot(blocks, measures.bi, label=label, color=colour, lw=width, marker=marker, ms=4)
            lower.plot(blocks, measures.similarity, color=colour, lw=width, marker=marker, ms=4)
        upper.set_title("Block influence: how much each block turns the residual stream")
        upper.set_ylabel("BI (1 − mean cosine)")
        _log_if_wide(upper, [value for _, measures, *_ in curves for value in measures.bi])
        lower.set_title("Similarity of each block's input and output")
        lower.set_ylabel("mean cosine")
        lower.set_xlabel("block (source index)")
        for axes in (upper, lower):
            axes.grid(axis="y", color="#E4E6E8", linewidth=0.8)
            axes.set_axisbelow(True)
            _block_ticks(axes, analysis.num_blocks)
        if len(curves) > 1:
            upper.legend(ncols=len(curves), loc="best")
        return save_figure(figure, path_stem)


def draw_similarity(analysis: Analysis, path_stem: str | Path) -> tuple[Path, Path]:
    """Draw the pairwise cosine similarity of the residual stream at all depths as a heat map.

    Args:
        analysis: what to draw. The stream at depth i has passed i blocks: 0 is the embeddings' output, i > 0 the
            output of block i − 1.
        path_stem: as in `draw_redundancy`.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ArtifactError: the files cannot be written.
    """
    cosine = np.asarray(analysis.cosine)
    num_depths = len(cosine)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.6, 5.6), layout="constrained")
        axes = figure.subplots()
        # The colours span what occurs, so that structure shows; the bar says what they mean.
        lowest = min(np.floor(cosine.min() * 10) / 10, 0.9)
        image = axes.imshow(cosine, cmap="viridis", vmin=lowest, vmax=1, interpolation="nearest")
        axes.set_title("Similarity of the residual stream between depths")
        axes.set_xlabel(f"blocks passed (0: embeddings, {num_depths - 1}: after the last block)")
        axes.set_ylabel("blocks passed")
        axes.spines[:].set_visible(False)
        axes.set_xticks(_ticks(num_depths))
        axes.set_yticks(_ticks(num_depths))
        colours = figure.colorbar(image, ax=axes, pad=0.02)
        colours.set_label("mean cosine similarity")
        colours.outline.set_visible(False)
        return save_figure(figure, path_stem)


def draw_plan(plan: FoldPlan, path_stem: str | Path, *, bi: Sequence[float] | None = None) -> tuple[Path, Path]:
    """Draw what a plan does with each block: kept, removed, or sharing weights with others.

    Args:
        plan: the plan. Attention and MLP get a row each where they fare differently.
        path_stem: as in `draw_redundancy`.
        bi: block influence [num_blocks], drawn as bars above the strip.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ArtifactError: the files cannot be written.
    """
    num_blocks = plan.source.num_blocks
    rows = fates_of(plan)
    strip_height = 0.42 * len(rows)
    with matplotlib.rc_context(_STYLE):
        heights = [strip_height] if bi is None else [1.1, strip_height]
        figure = Figure(figsize=(_width(num_blocks), sum(heights) + 1.15), layout="constrained")
        panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        panels[0].set_title(f"Fold plan: {num_blocks} → {len(plan.kept)} blocks")
        strip = panels[-1]
        for row, fates in enumerate(rows.values()):
            for block, fate in enumerate(fates):
                _draw_cell(strip, block, row, fate, num_blocks)
        strip.set_ylim(len(rows) - 0.5, -0.5)
        strip.set_yticks(range(len(rows)), list(rows))
        strip.set_xlabel("block (source index)")
        strip.spines[:].set_visible(False)
        _block_ticks(strip, num_blocks)
        strip.tick_params(which="both", length=0)
        if bi is not None:
            _draw_influence(panels[0], plan, bi)
        figure.legend(handles=_plan_legend(plan, rows), loc="outside lower left", ncols=3)
        return save_figure(figure, path_stem)


def draw_gates(
    trace: Sequence[Mapping[str, Any]],
    removed: Sequence[int],
    path_stem: str | Path,
    names: Sequence[str] | None = None,
    what: str = "block",
) -> tuple[Path, Path]:
    """Draw the paths of learned gates over training.

    Args:
        trace: one entry a step, `{"step": s, "cost": c, "keep": [probability of each unit to be kept]}`, as the
            selector `gates` reports it.
        removed: units that were removed in the end; their paths are drawn strong and named.
        path_stem: as in `draw_redundancy`.
        names: what the units are called; their numbers by default.
        what: what a unit is.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ArtifactError: the files cannot be written.
    """
    steps = [entry["step"] for entry in trace]
    keep = np.asarray([entry["keep"] for entry in trace])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.0, 4.4), layout="constrained")
        axes = figure.subplots()
        for unit in range(keep.shape[1]):
            strong = unit in removed
            axes.plot(steps, keep[:, unit], color=_ORANGE if strong else _PALE, lw=1.8 if strong else 0.7)
        # Labels at the right end, pushed apart where paths end together.
        height = -1.0
        for unit in sorted(removed, key=lambda unit: keep[-1, unit]):
            height = max(float(keep[-1, unit]), height + 0.045)
            said = str(unit) if names is None else names[unit]
            axes.annotate(said, (steps[-1], height), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_title(f"Gates: how surely each {what} is kept, as they are learned")
        axes.set_xlabel("step")
        axes.set_ylabel("probability to be kept")
        axes.set_ylim(-0.03, 1.03)
        axes.plot([], [], color=_ORANGE, lw=1.8, label="removed in the end")
        axes.plot([], [], color=_PALE, lw=0.7, label="kept")
        figure.legend(loc="outside lower left", ncols=2)
        return save_figure(figure, path_stem)


def draw_agreement(agreement: Agreement, path_stem: str | Path) -> tuple[Path, Path]:
    """Draw which blocks each of some methods removes, and what each two have in common.

    Args:
        agreement: the methods, the first one on top.
        path_stem: as in `draw_redundancy`.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ArtifactError: the files cannot be written.
    """
    names, num_blocks = list(agreement.removed), agreement.num_blocks
    overlap = np.asarray([[agreement.overlap(name, other) for other in names] for name in names])
    with matplotlib.rc_context(_STYLE):
        side = 0.42 * len(names)
        figure = Figure(figsize=(_width(num_blocks) + 1.6 + side, side + 1.5), layout="constrained")
        strips, common = figure.subplots(1, 2, width_ratios=[_width(num_blocks), side + 0.8])
        for row, blocks in enumerate(agreement.removed.values()):
            for block in range(num_blocks):
                _draw_cell(strips, block, row, "removed" if block in blocks else "kept", num_blocks)
        strips.set_ylim(len(names) - 0.5, -0.5)
        strips.set_yticks(range(len(names)), names)
        strips.set_xlabel("block (source index)")
        strips.set_title("Which blocks each method removes")
        strips.spines[:].set_visible(False)
        _block_ticks(strips, num_blocks)
        strips.tick_params(which="both", length=0)
        common.imshow(overlap, cmap="Blues", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(overlap):
            colour = "white" if value > 0.6 else _INK
            common.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        common.set_xticks([])
        common.set_yticks([])
        common.set_title("in common, %")
        common.spines[:].set_visible(False)
        handles = [Patch(facecolor=_KEPT_COLOUR, label="kept"), Patch(label="removed", **_HOLLOW)]
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
        return save_figure(figure, path_stem)


def _draw_influence(axes: Axes, plan: FoldPlan, bi: Sequence[float]) -> None:
    """Bars of block influence, hollow for removed blocks."""
    axes.bar(plan.kept, [bi[block] for block in plan.kept], width=0.8, color=_KEPT_COLOUR)
    axes.bar(plan.removed, [bi[block] for block in plan.removed], width=0.8, **_HOLLOW)
    axes.set_ylabel("BI")
    axes.spines["bottom"].set_color("#E4E6E8")
    axes.tick_params(axis="x", which="both", length=0, labelbottom=False)


def _draw_cell(axes: Axes, block: int, row: int, fate: int | Literal["kept", "removed"], num_blocks: int) -> None:
    """One block (or sublayer) of the strip."""
    look: dict[str, Any] = _HOLLOW
    if fate != "removed":
        colour = _KEPT_COLOUR if fate == "kept" else _GROUP_COLOURS[fate % len(_GROUP_COLOURS)]
        look = {"facecolor": colour, "edgecolor": colour, "linewidth": 0.9}
    box = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((block - 0.4, row - 0.38), 0.8, 0.76, boxstyle=box, **look))
    if isinstance(fate, int):
        size = 9.5 if num_blocks <= 48 else 7
        axes.text(block, row, group_letter(fate), ha="center", va="center_baseline", fontsize=size, color=_INK)


def _plan_legend(plan: FoldPlan, rows: Mapping[str, Sequence[int | str]]) -> list[Patch]:
    fates = {fate for row in rows.values() for fate in row}
    handles = []
    if "kept" in fates:
        handles.append(Patch(facecolor=_KEPT_COLOUR, label="kept"))
    if "removed" in fates:
        handles.append(Patch(label="removed", **_HOLLOW))
    if plan.groups:
        noun = "group" if len(plan.groups) == 1 else "groups"
        label = f"same letter: shared weights ({len(plan.groups)} {noun})"
        handles.append(Patch(facecolor=_GROUP_COLOURS[0], label=label))
    return handles


def _width(num_blocks: int) -> float:
    """Inches: wide enough that the cells of a strip stay readable, within a page."""
    return float(np.clip(2.0 + 0.22 * num_blocks, 7.0, 14.0))


def _ticks(num_blocks: int) -> list[int]:
    """Source indices to label: all of them when they fit, else every second, fifth or tenth."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, num_blocks) if num_blocks / step <= 20 or step == num_blocks)
    return list(range(0, num_blocks, step))


def _block_ticks(axes: Axes, num_blocks: int) -> None:
    axes.set_xticks(_ticks(num_blocks))
    axes.set_xticks(range(num_blocks), minor=True)
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_xlim(-0.7, num_blocks - 0.3)


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic scale when a linear one would press most values to the bottom."""
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())


def save_figure(figure: Figure, path_stem: str | Path) -> tuple[Path, Path]:
    """Write PNG (150 dpi) and SVG, each atomically. The same picture gives the same bytes."""
    stem = Path(path_stem)
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    for path, metadata in ((png, {"Software": None}), (svg, {"Date": None})):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:], dpi=150, metadata=metadata, facecolor="white")
        write_bytes(path, drawn.getvalue())
    return png, svg

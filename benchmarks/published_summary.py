"""One table and one picture of all results of published_comparison.py.

python benchmarks/published_summary.py benchmarks/results/published_*.json
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

from foldgpt.artifacts import write_text
from foldgpt.comparison import Comparison, Method, title_of
from foldgpt.comparison.bootstrap import Interval

_COLOURS = {"source": "#6b7280", "bi": "#d97706", "gates": "#2563eb"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON results of published_comparison.py")
    parser.add_argument("--name", default="published", help="stem of what is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    found = sorted(
        ((path, Comparison.load(path)) for path in arguments.results), key=lambda one: (one[1].model, removed(one[1]))
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / f"{arguments.name}.md", as_markdown(found))
    draw([comparison for _, comparison in found], arguments.out / f"{arguments.name}.svg")
    print(as_markdown(found))


def removed(comparison: Comparison) -> int:
    return len(comparison.methods[1].removed)


def heading(comparison: Comparison) -> str:
    """Model and size, as in "smollm2-135m, 6 blocks removed (−20 % of the parameters in blocks)"."""
    model = comparison.model.rpartition(":")[2]
    source, first = (method.figures["block_parameters"] for method in comparison.methods[:2])
    assert source and first
    return f"{model}, {removed(comparison)} blocks removed (−{1 - first / source:.0%} of the parameters in blocks)"


def perplexity_of(method: Method) -> float:
    return next(iter(method.perplexities.values()))


def as_markdown(found: list[tuple[Path, Comparison]]) -> str:
    parts = ["# The paper's experiment: all comparisons\n"]
    for path, comparison in found:
        lines = [
            f"## {heading(comparison)}\n",
            "| | blocks removed | perplexity | less that of bi | accuracy | above chance, retained | minutes |",
            "|---|---|---|---|---|---|---|",
        ]
        for method in comparison.methods:
            accuracy, kept = method.figures.get("task_average"), method.retained
            difference = next(iter(method.perplexity_differences.values()), None)
            blocks = ", ".join(map(str, method.removed))
            lines.append(
                f"| {title_of(method)} | {blocks} | {perplexity_of(method):.1f} | {interval(difference)} | "
                f"{'' if accuracy is None else f'{accuracy:.1%}'} | "
                f"{'' if kept is None or kept.above_chance is None else f'{kept.above_chance:.0%}'} | "
                f"{'' if method.seconds is None else f'{method.seconds / 60:.1f}'} |"
            )
        details = f"Recovery on {comparison.recovery_tokens:,} tokens. In full: `{path.stem}.md`."
        parts.append("\n".join([*lines, "", details]) + "\n")
    return "\n".join(parts)


def interval(difference: Interval | None) -> str:
    if difference is None:
        return ""
    return f"{difference.difference:+.1f} ({difference.low:+.1f} to {difference.high:+.1f})"


def draw(comparisons: list[Comparison], path: Path) -> None:
    """Perplexity of each row, one panel for each comparison: hollow as folded, filled once trained."""
    figure = Figure(figsize=(7.5, 0.9 + 0.95 * len(comparisons)), layout="constrained")
    for axes, comparison in zip(figure.subplots(len(comparisons), squeeze=False)[:, 0], comparisons, strict=True):
        names = list(dict.fromkeys(method.name for method in comparison.methods if method.name != "source"))
        source = perplexity_of(comparison.methods[0])
        axes.axvline(source, color=_COLOURS["source"], linestyle=":", label=f"source {source:.1f}")
        for row, name in enumerate(names):
            colour = _COLOURS.get(re.split(r"\W", name)[0], "#059669")
            ends = [method for method in comparison.methods if method.name == name]
            values = [perplexity_of(method) for method in ends]
            axes.plot(values, [row] * len(values), color=colour, linewidth=1.5, zorder=1)
            for method, value in zip(ends, values, strict=True):
                face = colour if method.recovered else "white"
                axes.scatter(value, row, s=36, facecolor=face, edgecolor=colour, zorder=2)
                axes.annotate(f"{value:.1f}", (value, row), (0, 6), textcoords="offset points", ha="center", fontsize=7)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        values = [perplexity_of(method) for method in comparison.methods]
        axes.set_xlim(min(values) * 0.92, max(values) * 1.12)
        axes.set_xticks([source])
        axes.set_xticklabels([f"{source:.1f}"])
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(len(names) - 0.4, -0.7)
        axes.set_title(heading(comparison), fontsize=9, loc="left")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(labelsize=8, left=False)
    figure.supxlabel("perplexity, log scale; hollow: folded, filled: trained; dotted: source", fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()

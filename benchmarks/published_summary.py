"""One table and one picture of all results of published_comparison.py.

cd benchmarks/results
python ../published_summary.py published_smollm2-135m_20.json published_*_all.json published_*_300k.json \\
    published_*_1m.json recovered_whole_tasks_smollm2-135m.json
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from foldgpt.artifacts import read_json, write_text
from foldgpt.comparison import Comparison, difference_text, title_of
from foldgpt.figures import save_figure

#: Rows with more than this many times the source's perplexity are left out of the picture.
_FAR = 12
_COLOURS = {"source": "#6b7280", "bi": "#d97706", "others": "#059669", "gates": "#2563eb"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON results of published_comparison.py")
    parser.add_argument("--name", default="published", help="stem of what is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    found = sorted(
        ((path, Comparison.load(path)) for path in arguments.results),
        key=lambda one: (one[1].model, removed(one[1]), one[1].recovery_tokens),
    )
    draw(found, arguments.out / arguments.name)
    write_text(arguments.out / f"{arguments.name}.md", as_markdown(found))
    print(as_markdown(found))


def removed(comparison: Comparison) -> int:
    return len(comparison.methods[1].removed)


def heading(path: Path, comparison: Comparison) -> str:
    """As in "smollm2-135m, 6 blocks removed (−20% of the parameters in blocks), 50,000 tokens, all blocks trained"."""
    model = comparison.model.rpartition(":")[2]
    source, first = (method.figures["block_parameters"] for method in comparison.methods[:2])
    assert source and first
    saved = f"−{1 - first / source:.0%} of the parameters in blocks"
    # The first result is of before the recipe stood beside it; it trained all blocks.
    settings = read_json(path).get("recipe", {}).get("recover", {}).get("settings", {})
    trained = "blocks behind the first cut" if settings.get("train_blocks") == "behind" else "all blocks"
    return (
        f"{model}, {removed(comparison)} blocks removed ({saved}), {comparison.recovery_tokens:,} tokens, "
        f"{trained} trained"
    )


def as_markdown(found: list[tuple[Path, Comparison]]) -> str:
    parts = ["# The paper's experiment: all comparisons\n"]
    for path, comparison in found:
        texts = comparison.texts
        heads = [part for text in texts for part in (f"perplexity, {text}", "against bi")]
        lines = [
            f"## {heading(path, comparison)}\n",
            f"| | blocks removed | {' | '.join(heads)} | accuracy | against bi, points | minutes |",
            "|---" * (5 + len(heads)) + "|",
        ]
        for method in comparison.methods:
            accuracy = method.figures.get("task_average")
            values = [
                part
                for text in texts
                for part in (
                    f"{method.perplexities[text]:.1f}",
                    difference_text(method, method.perplexity_differences.get(text), 1.0, less_is_better=True),
                )
            ]
            points = difference_text(method, method.accuracy_difference, 100.0, less_is_better=False)
            lines.append(
                f"| {title_of(method)} | {', '.join(map(str, method.removed))} | {' | '.join(values)} | "
                f"{'' if accuracy is None else f'{accuracy:.1%}'} | {points} | "
                f"{'' if method.seconds is None else f'{method.seconds / 60:.1f}'} |"
            )
        where = comparison.environment
        machine = ", ".join(filter(None, (where["cpu"], where.get("gpu"))))
        details = (
            f"Seed {comparison.seed}. In full: `{path.stem}.md`. "
            f"{machine}, {where['torch_threads']} threads, torch {where['torch']}, transformers "
            f"{where['transformers']}, {where['date']}."
        )
        parts.append("\n".join([*lines, "", details]) + "\n")
    return "\n".join(parts)


def draw(found: list[tuple[Path, Comparison]], path_stem: Path) -> None:
    """Perplexity of each row, a panel for each comparison and text: hollow as folded, filled once trained."""
    columns = max(len(comparison.texts) for _, comparison in found)
    heights = [0.5 + 0.23 * len(drawn_rows(comparison)) for _, comparison in found]
    figure = Figure(figsize=(4.6 * columns, 0.9 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(found), columns, squeeze=False, height_ratios=heights)
    for line, (path, comparison) in zip(panels, found, strict=True):
        for axes in line[len(comparison.texts) :]:
            axes.set_axis_off()
        for number, (axes, text) in enumerate(zip(line, comparison.texts, strict=False)):
            draw_panel(axes, comparison, text)
            axes.set_title(f"{'' if number else heading(path, comparison)}\n{text}", fontsize=8, loc="left")
            if number:
                axes.set_yticklabels([])
    figure.supxlabel("perplexity, log scale; hollow: folded, filled: trained; dotted: source", fontsize=8)
    save_figure(figure, path_stem)


def drawn_rows(comparison: Comparison) -> list[str]:
    """Names of the rows; those that are beyond all bounds would take the room of the others."""
    source = comparison.methods[0]
    near = [
        method.name
        for method in comparison.methods[1:]
        if all(method.perplexities[text] < _FAR * source.perplexities[text] for text in comparison.texts)
    ]
    kinds = list(_COLOURS)
    return sorted(dict.fromkeys(near), key=lambda name: (kinds.index(kind_of(name)), name))


def kind_of(name: str) -> str:
    """By which rows are ordered and coloured."""
    first = re.split(r"\W", name)[0]
    return first if first in _COLOURS else "others"


def draw_panel(axes: Axes, comparison: Comparison, text: str) -> None:
    names = drawn_rows(comparison)
    source = comparison.methods[0].perplexities[text]
    axes.axvline(source, color=_COLOURS["source"], linestyle=":")
    for row, name in enumerate(names):
        colour = _COLOURS[kind_of(name)]
        ends = [(method.recovered, method.perplexities[text]) for method in comparison.methods if method.name == name]
        axes.plot([value for _, value in ends], [row] * len(ends), color=colour, linewidth=1.5, zorder=1)
        for recovered, value in ends:
            axes.scatter(value, row, s=36, facecolor=colour if recovered else "white", edgecolor=colour, zorder=2)
            # At the side on which no other point of the row is.
            is_last = value == max(end for _, end in ends)
            axes.annotate(
                f"{value:,.1f}",
                (value, row),
                (6 if is_last else -6, 0),
                textcoords="offset points",
                ha="left" if is_last else "right",
                va="center",
                fontsize=7,
            )
    values = [source, *(method.perplexities[text] for method in comparison.methods if method.name in names)]
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    margin = (max(values) / min(values)) ** 0.12
    axes.set_xlim(min(values) / margin**0.5, max(values) * margin)
    axes.set_xticks([source], [f"{source:.1f}"])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8, left=False)


if __name__ == "__main__":
    main()

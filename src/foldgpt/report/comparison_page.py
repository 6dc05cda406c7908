"""comparison.html and its like: a comparison for people, on a page, in Markdown and as a sheet."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rich.table import Table

from foldgpt.artifacts import write_json, write_text
from foldgpt.comparison import (
    Comparison,
    Method,
    agreement_of,
    agreement_table,
    difference_table,
    method_table,
    notes_of,
    rows_for_csv,
    task_accuracy_table,
    title_of,
    verdict,
)
from foldgpt.evaluation import Interval
from foldgpt.formats import block_ranges
from foldgpt.report.build import REPORT
from foldgpt.report.headline import short_name
from foldgpt.report.rows import Rows, markdown_row, rows_of
from foldgpt.report.templating import templates

#: Heading of the table of what methods have in common.
_IN_COMMON = "Removed in common"

STEM = "comparison"
#: Of an interval in a chart, in percent of the width.
_LEAST_WIDTH = 0.4


def write_comparison(comparison: Comparison, folder: str | Path) -> dict[str, Path]:
    """Write comparison.json, .csv, .md and .html into a folder, each atomically.

    The page loads nothing; it links to the reports of the rows, which lie below the folder.

    Returns:
        Suffix → path.

    Raises:
        ArtifactError: a file cannot be written.
    """
    paths = {suffix: Path(folder) / f"{STEM}.{suffix}" for suffix in ("json", "csv", "md", "html")}
    write_json(paths["json"], comparison.to_dict())
    write_text(paths["csv"], _csv(comparison))
    write_text(paths["md"], as_markdown(comparison))
    write_text(paths["html"], _page(comparison))
    return paths


def as_markdown(comparison: Comparison) -> str:
    """The tables and what they mean, as Markdown."""
    parts = [f"# {short_name(comparison.model)}: methods side by side"]
    for heading, table in _tables(comparison):
        parts.append(f"## {heading}")
        lines = [table.headings, ["---", *["---:"] * (len(table.headings) - 1)], *table.cells]
        parts.append("\n".join(markdown_row(cells) for cells in lines))
    parts.append("\n".join(f"- {note}" for note in notes_of(comparison)))
    removed = [method for method in comparison.methods if method.removed]
    if removed:
        parts.append("## What was removed")
        parts.append("\n".join(f"- {title_of(method)}: {block_ranges(method.removed)}" for method in removed))
    return "\n\n".join(parts) + "\n"


def _tables(comparison: Comparison) -> list[tuple[str, Rows]]:
    """The tables that have rows, with their headings."""
    named: list[tuple[str, Table]] = [
        ("Cost and quality", method_table(comparison)),
        (f"Differences to {comparison.reference}", difference_table(comparison)),
        ("Accuracy on each task", task_accuracy_table(comparison)),
    ]
    agreement = agreement_of(comparison)
    if agreement is not None:
        named.append((_IN_COMMON, agreement_table(agreement)))
    found = [(heading, rows_of(table)) for heading, table in named]
    return [(heading, rows) for heading, rows in found if rows is not None]


def _csv(comparison: Comparison) -> str:
    records = rows_for_csv(comparison)
    written = io.StringIO()
    columns = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(written, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return written.getvalue()


def _page(comparison: Comparison) -> str:
    date = str(comparison.environment.get("date") or "")[:10]
    return (
        templates(html=True)
        .get_template("comparison.html")
        .render(
            comparison=comparison,
            name=short_name(comparison.model),
            date=date,
            tables=_tables(comparison),
            links={title_of(method): f"{method.run}/{REPORT}" for method in comparison.methods if method.run},
            charts=_charts(comparison),
            agreement=agreement_of(comparison),
            removed=[
                {"title": title_of(method), "blocks": block_ranges(method.removed)}
                for method in comparison.methods
                if method.removed
            ],
            notes=notes_of(comparison),
        )
    )


def _charts(comparison: Comparison) -> list[dict[str, Any]]:
    """Intervals to be drawn: one chart for each text, and one for the mean accuracy."""
    charts = []
    for text in comparison.texts:
        intervals = [(method, method.perplexity_differences.get(text)) for method in comparison.methods]
        charts.append(_chart(f"Perplexity, {text}", "less is better", intervals, less_is_better=True))
    intervals = [(method, method.accuracy_difference) for method in comparison.methods]
    charts.append(_chart("Mean accuracy on tasks", "more is better", intervals, less_is_better=False))
    return [chart for chart in charts if chart is not None]


def _chart(
    title: str, hint: str, intervals: list[tuple[Method, Interval | None]], *, less_is_better: bool
) -> dict[str, Any] | None:
    """Positions in percent of the width. Rows far off at the bad end are cut there, or they would hide the others."""
    rows = [(method, interval) for method, interval in intervals if interval is not None]
    if not rows:
        return None
    good = max((-each.low if less_is_better else each.high) for _, each in rows)
    widths = sorted(abs(each.difference) for _, each in rows)
    reach = max(good, 2 * widths[len(widths) // 2], 1e-9) * 1.1

    def place(value: float) -> float:
        return round(50 + 50 * max(-1.0, min(1.0, value / reach)), 2)

    return {
        "title": title,
        "hint": hint,
        "rows": [
            {
                "title": title_of(method),
                # A short interval is still to be seen, on the page.
                "low": min(place(each.low), 100 - _LEAST_WIDTH),
                "width": max(round(place(each.high) - place(each.low), 2), _LEAST_WIDTH),
                "is_high": each.high > reach,
                "at": place(each.difference),
                "is_cut": max(abs(each.low), abs(each.high)) > reach,
                "verdict": verdict(method, each, less_is_better=less_is_better),
            }
            for method, each in rows
        ],
    }

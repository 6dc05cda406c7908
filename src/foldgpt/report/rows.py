"""A terminal's table as plain text cells, so that page, card and terminal say the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Rows:
    """Headings, and one list of cells for each row."""

    headings: list[str]
    cells: list[list[str]]


def markdown_row(cells: Iterable[str]) -> str:
    """One line of a Markdown table; a | in a cell is no border."""
    return f"| {' | '.join(cell.strip().replace('|', chr(92) + '|') for cell in cells)} |"


def rows_of(table: Table) -> Rows | None:
    """The cells of a table; None if it has no rows."""
    if not table.row_count:
        return None
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return Rows([str(column.header) for column in table.columns], [list(row) for row in zip(*columns, strict=True)])

"""Tables in a terminal that is too narrow for them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

#: Columns that a heading may have where a table is too wide; what is longer goes on in the next line.
_HEADING_WIDTH = 16


def natural_width(table: Table) -> int:
    """Columns that a table takes where nothing is wrapped or cut."""
    console = Console(width=1 << 20, markup=False, emoji=False)
    return console.measure(table).maximum


def split_to_width(table: Table, width: int) -> list[Table]:
    """A table, or several that have its columns in turn, each behind the first one, so that they fit into `width`.

    Names and headings go on in a next line where that is needed; numbers never do. A single column that is wider than
    what is left beside the names makes a table that is wider than `width`.

    Args:
        table: its first column holds names.
        width: columns of the terminal.
    """
    if natural_width(table) <= width:
        return [table]
    first, *others = table.columns
    tables = []
    chosen: list[Column] = []
    for column in others:
        if chosen and natural_width(_with_columns([first, *chosen, column], width)) > width:
            tables.append(_with_columns([first, *chosen], width))
            chosen = []
        chosen.append(column)
    return [*tables, _with_columns([first, *chosen], width)]


def _with_columns(columns: Sequence[Column], width: int) -> Table:
    """A table of some columns of another; the first one takes at most half of `width`, the others what cells need."""
    table = Table()
    for column in columns:
        longest = max((cell_len(str(cell)) for cell in column.cells), default=0)
        widest = width // 2 if column is columns[0] else max(longest, _HEADING_WIDTH)
        table.add_column(column.header, justify=column.justify, max_width=widest, overflow="fold")
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table

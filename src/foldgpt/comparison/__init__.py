"""Methods side by side: which rows there are, what differs for certain, and how it is written down."""

from foldgpt.comparison.agreement import Agreement, agreement_of, agreement_table
from foldgpt.comparison.result import COMPARISON, COMPARISON_FORMAT, Comparison, Finished, Method
from foldgpt.comparison.rows import Row, rows_of_recipe
from foldgpt.comparison.tables import (
    difference_table,
    difference_text,
    method_table,
    notes_of,
    rows_for_csv,
    task_accuracy_table,
    title_of,
    verdict,
)
from foldgpt.comparison.training import Training

__all__ = [
    "COMPARISON",
    "COMPARISON_FORMAT",
    "Agreement",
    "Comparison",
    "Finished",
    "Method",
    "Row",
    "Training",
    "agreement_of",
    "agreement_table",
    "difference_table",
    "difference_text",
    "method_table",
    "notes_of",
    "rows_for_csv",
    "rows_of_recipe",
    "task_accuracy_table",
    "title_of",
    "verdict",
]

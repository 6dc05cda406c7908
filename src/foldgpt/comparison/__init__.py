"""Methods side by side: which rows there are, what differs for certain, and how it is written down."""

from foldgpt.comparison.agreement import Agreement, agreement_of, agreement_table
from foldgpt.comparison.bootstrap import Interval, accuracy_difference, perplexity_difference
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
    "Interval",
    "Method",
    "Row",
    "Training",
    "accuracy_difference",
    "agreement_of",
    "agreement_table",
    "difference_table",
    "difference_text",
    "method_table",
    "notes_of",
    "perplexity_difference",
    "rows_for_csv",
    "rows_of_recipe",
    "task_accuracy_table",
    "title_of",
    "verdict",
]

"""A run shown to people: one HTML page that needs nothing else, and the model card of the folded checkpoint."""

from foldgpt.report.build import REPORT, build_report
from foldgpt.report.comparison_page import as_markdown, write_comparison
from foldgpt.report.model_card import CARD, write_model_card

__all__ = ["CARD", "REPORT", "as_markdown", "build_report", "write_comparison", "write_model_card"]

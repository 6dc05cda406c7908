"""A run shown to people: one HTML page that needs nothing else, and the model card of the folded checkpoint."""

from foldgpt.report.build import REPORT, build_report
from foldgpt.report.model_card import CARD, write_model_card

__all__ = ["CARD", "REPORT", "build_report", "write_model_card"]

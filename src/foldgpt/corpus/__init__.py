"""Text to packed token ids: where text comes from, and how it becomes windows of equal length."""

from foldgpt.corpus.texts import read_documents
from foldgpt.corpus.windows import Windows, calibration_windows, evaluation_windows

__all__ = ["Windows", "calibration_windows", "evaluation_windows", "read_documents"]

"""Text to packed token ids: where text comes from, and how it becomes windows of equal length."""

from foldgpt.corpus.own_text import OwnText
from foldgpt.corpus.texts import absolute, identity_of, read_documents, reused_texts
from foldgpt.corpus.windows import Windows, calibration_windows, evaluation_windows

__all__ = [
    "OwnText",
    "Windows",
    "absolute",
    "calibration_windows",
    "evaluation_windows",
    "identity_of",
    "read_documents",
    "reused_texts",
]

"""Other forms of a folded model: an ordinary checkpoint without shared weights, and a file for llama.cpp."""

from __future__ import annotations

from foldgpt.export.dense import export_dense
from foldgpt.export.gguf import OUTTYPES, ExportedGGUF, export_gguf

__all__ = ["OUTTYPES", "ExportedGGUF", "export_dense", "export_gguf"]

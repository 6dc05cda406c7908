"""Where a model is redundant in depth: one sweep over calibration text, read by every ranking method."""

from foldgpt.analysis.result import Analysis, CalibrationIdentity, SourceIdentity, SublayerMeasures
from foldgpt.analysis.sweep import analyze

__all__ = ["Analysis", "CalibrationIdentity", "SourceIdentity", "SublayerMeasures", "analyze"]

"""The steps of a run, one function each: from analysis to evaluation, and the pictures."""

from foldgpt.steps.analysing import check_analysis, make_analysis, read_analysis
from foldgpt.steps.drawing import draw
from foldgpt.steps.evaluating import make_evaluation, make_evaluation_before_recovery, make_source_evaluation
from foldgpt.steps.folding import make_folded
from foldgpt.steps.recovering import check_recovery, drop_recovery_work, make_recovered

__all__ = [
    "check_analysis",
    "check_recovery",
    "draw",
    "drop_recovery_work",
    "make_analysis",
    "make_evaluation",
    "make_evaluation_before_recovery",
    "make_folded",
    "make_recovered",
    "make_source_evaluation",
    "read_analysis",
]

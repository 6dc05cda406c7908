"""Closed-form compensation: the blocks before a cut take over, linearly, what the removed ones did."""

from foldgpt.compensation.compensate import carrying_blocks, compensate, why_not
from foldgpt.compensation.compensator import RIDGES, Compensator
from foldgpt.compensation.correction import Correction, CutReport
from foldgpt.compensation.judge import COMPENSATION, Compensated, compensate_, compensate_and_judge_
from foldgpt.compensation.merge import merge_, merged, set_parameters_

__all__ = [
    "COMPENSATION",
    "RIDGES",
    "Compensated",
    "Compensator",
    "Correction",
    "CutReport",
    "carrying_blocks",
    "compensate",
    "compensate_",
    "compensate_and_judge_",
    "merge_",
    "merged",
    "set_parameters_",
    "why_not",
]

"""Closed-form compensation: the blocks before a cut take over, linearly, what the removed ones did."""

from foldgpt.compensation.compensate import compensate, why_not
from foldgpt.compensation.compensator import RIDGES, Compensator
from foldgpt.compensation.correction import Correction, CutReport, Start
from foldgpt.compensation.judge import COMPENSATION, HELD_OUT, Compensated, compensate_, compensate_and_judge_
from foldgpt.compensation.merge import merge_, merged, set_parameters_
from foldgpt.compensation.priors import Priors
from foldgpt.compensation.walk import Walk

__all__ = [
    "COMPENSATION",
    "HELD_OUT",
    "RIDGES",
    "Compensated",
    "Compensator",
    "Correction",
    "CutReport",
    "Priors",
    "Start",
    "Walk",
    "compensate",
    "compensate_",
    "compensate_and_judge_",
    "merge_",
    "merged",
    "set_parameters_",
    "why_not",
]

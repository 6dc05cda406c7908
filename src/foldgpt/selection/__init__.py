"""Which blocks to remove."""

from foldgpt.selection.budget import flops_of, number_for_target, number_to_remove, parameters_of, seconds_of
from foldgpt.selection.cost import Objective, RemovalCost
from foldgpt.selection.gating.gates import gates_effort
from foldgpt.selection.registry import (
    ANALYSIS_FREE,
    BY_SUBLAYER,
    MEASURED,
    SELECTORS,
    check_name,
    check_request,
    select,
)
from foldgpt.selection.selection import Request, Selection, Selector
from foldgpt.selection.units import Units

__all__ = [
    "ANALYSIS_FREE",
    "BY_SUBLAYER",
    "MEASURED",
    "SELECTORS",
    "Objective",
    "RemovalCost",
    "Request",
    "Selection",
    "Selector",
    "Units",
    "check_name",
    "check_request",
    "flops_of",
    "gates_effort",
    "number_for_target",
    "number_to_remove",
    "parameters_of",
    "seconds_of",
    "select",
]

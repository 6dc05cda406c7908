"""Which blocks to remove."""

from foldgpt.selection.budget import (
    Share,
    flops_of,
    number_for_target,
    number_for_wish,
    number_to_remove,
    parameters_of,
    seconds_of,
    share_for,
)
from foldgpt.selection.cost import Objective, RemovalCost, search_windows
from foldgpt.selection.further_windows import last_stage_windows
from foldgpt.selection.registry import (
    ANALYSIS_FREE,
    BY_SUBLAYER,
    MEASURED,
    SELECTORS,
    WITH_OBJECTIVE,
    check_name,
    check_request,
    search_passes,
    select,
)
from foldgpt.selection.selection import Request, Selection, Selector
from foldgpt.selection.units import Units

__all__ = [
    "ANALYSIS_FREE",
    "BY_SUBLAYER",
    "MEASURED",
    "SELECTORS",
    "WITH_OBJECTIVE",
    "Objective",
    "RemovalCost",
    "Request",
    "Selection",
    "Selector",
    "Share",
    "Units",
    "check_name",
    "check_request",
    "flops_of",
    "last_stage_windows",
    "number_for_target",
    "number_for_wish",
    "number_to_remove",
    "parameters_of",
    "search_passes",
    "search_windows",
    "seconds_of",
    "select",
    "share_for",
]

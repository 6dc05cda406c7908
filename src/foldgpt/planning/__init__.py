"""What is cut: from an analysis to a selection, and from a selection to a plan."""

from foldgpt.planning.expected_size import expected_parameters
from foldgpt.planning.groups import check_rank
from foldgpt.planning.plans import make_plan
from foldgpt.planning.selecting import drop_search, make_selection, num_removed, will_read_text

__all__ = [
    "check_rank",
    "drop_search",
    "expected_parameters",
    "make_plan",
    "make_selection",
    "num_removed",
    "will_read_text",
]

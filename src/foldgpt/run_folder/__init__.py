"""The folder of a run or a comparison: what it holds, what that was made from, and who may work in it."""

from foldgpt.run_folder.folder import RunFolder, command_to_go_on, final_model
from foldgpt.run_folder.layout import (
    AGREEMENT,
    ANALYSIS,
    ANALYSIS_CHECKPOINT,
    BEFORE_RECOVERY,
    ENVIRONMENT,
    EVALUATION,
    FIGURES,
    FOLDED,
    LEDGER,
    PLAN,
    RECIPE,
    RECOVERED,
    ROWS,
    SEARCH_CHECKPOINT,
    SELECTION,
    SHARING_CHECKPOINT,
    SOURCE,
)
from foldgpt.run_folder.opening import check_is_no_runs, open_run

__all__ = [
    "AGREEMENT",
    "ANALYSIS",
    "ANALYSIS_CHECKPOINT",
    "BEFORE_RECOVERY",
    "ENVIRONMENT",
    "EVALUATION",
    "FIGURES",
    "FOLDED",
    "LEDGER",
    "PLAN",
    "RECIPE",
    "RECOVERED",
    "ROWS",
    "SEARCH_CHECKPOINT",
    "SELECTION",
    "SHARING_CHECKPOINT",
    "SOURCE",
    "RunFolder",
    "check_is_no_runs",
    "command_to_go_on",
    "final_model",
    "open_run",
]

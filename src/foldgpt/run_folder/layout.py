"""What the folder of a run or a comparison holds, by name."""

from __future__ import annotations

from foldgpt.comparison import COMPARISON
from foldgpt.report import REPORT

RECIPE, LEDGER, ENVIRONMENT = "recipe.yaml", "run.json", "environment.json"
ANALYSIS, SELECTION, PLAN, EVALUATION = "analysis.json", "selection.json", "plan.json", "evaluation.json"
SOURCE, BEFORE_RECOVERY = "source.json", "before_recovery.json"
FOLDED, RECOVERED, FIGURES = "folded", "recovered", "figures"
#: Folder of the runs of a comparison.
ROWS = "rows"
#: How far a stage is; whoever has its result in the ledger removes it.
ANALYSIS_CHECKPOINT, SEARCH_CHECKPOINT = ".analysis-checkpoint.json", ".search-checkpoint.json"
SHARING_CHECKPOINT = ".sharing-checkpoint.json"
LOCK = ".lock"
#: All that stages make.
MADE = (ANALYSIS, SELECTION, PLAN, FOLDED, RECOVERED, SOURCE, BEFORE_RECOVERY, EVALUATION, ENVIRONMENT, FIGURES, REPORT)
#: The picture of where the methods of a comparison agree, without its suffix.
AGREEMENT = "comparison.agreement"
#: The files of a comparison, last the one by which it is known.
COMPARED = (f"{AGREEMENT}.png", f"{AGREEMENT}.svg", "comparison.csv", "comparison.md", "comparison.html", COMPARISON)
#: What else is written there.
WRITTEN = (RECIPE, LEDGER, ANALYSIS_CHECKPOINT, SEARCH_CHECKPOINT, SHARING_CHECKPOINT, *COMPARED)

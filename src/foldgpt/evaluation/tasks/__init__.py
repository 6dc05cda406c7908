"""Multiple-choice tasks through lm-evaluation-harness, with rows from the hub or from local files."""

from foldgpt.evaluation.tasks.catalog import TASKS
from foldgpt.evaluation.tasks.score import Accuracy, Retained, TaskScore, retained, retained_on_average
from foldgpt.evaluation.tasks.suite import Suite, check_task_names, load_suite

__all__ = [
    "TASKS",
    "Accuracy",
    "Retained",
    "Suite",
    "TaskScore",
    "check_task_names",
    "load_suite",
    "retained",
    "retained_on_average",
]

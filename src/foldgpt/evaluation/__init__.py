"""What a model costs and how well it still predicts: perplexity, size, speed, memory, tasks, in one result."""

from foldgpt.evaluation.bootstrap import Interval, accuracy_difference, perplexity_difference
from foldgpt.evaluation.errors import MeasurementError, NotEnoughMemoryError
from foldgpt.evaluation.evaluate import Subject, evaluate
from foldgpt.evaluation.generations import Generation, generations
from foldgpt.evaluation.last_word import LastWord, last_word
from foldgpt.evaluation.memory import PeakMemory, peak_memory
from foldgpt.evaluation.performance import Rate, Speed, measure_speed
from foldgpt.evaluation.perplexity import Perplexity, perplexity
from foldgpt.evaluation.result import Evaluation, Measured
from foldgpt.evaluation.size import ModelSize, folder_bytes, size_of
from foldgpt.evaluation.tasks import TASKS, Retained, Suite, TaskScore, load_suite

__all__ = [
    "TASKS",
    "Evaluation",
    "Generation",
    "Interval",
    "LastWord",
    "Measured",
    "MeasurementError",
    "ModelSize",
    "NotEnoughMemoryError",
    "PeakMemory",
    "Perplexity",
    "Rate",
    "Retained",
    "Speed",
    "Subject",
    "Suite",
    "TaskScore",
    "accuracy_difference",
    "evaluate",
    "folder_bytes",
    "generations",
    "last_word",
    "load_suite",
    "measure_speed",
    "peak_memory",
    "perplexity",
    "perplexity_difference",
    "size_of",
]

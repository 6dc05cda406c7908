"""What a model costs and how well it still predicts: perplexity, size, speed and memory, in one result."""

from foldgpt.evaluation.errors import MeasurementError
from foldgpt.evaluation.evaluate import Evaluation, Measured, Subject, evaluate
from foldgpt.evaluation.memory import PeakMemory, peak_memory
from foldgpt.evaluation.performance import Rate, Speed, measure_speed
from foldgpt.evaluation.perplexity import Perplexity, perplexity
from foldgpt.evaluation.size import ModelSize, folder_bytes, size_of

__all__ = [
    "Evaluation",
    "Measured",
    "MeasurementError",
    "ModelSize",
    "PeakMemory",
    "Perplexity",
    "Rate",
    "Speed",
    "Subject",
    "evaluate",
    "folder_bytes",
    "measure_speed",
    "peak_memory",
    "perplexity",
    "size_of",
]

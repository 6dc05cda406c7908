"""Recovery: train a folded model, briefly, to do again what its source does."""

from foldgpt.recovery.compiled import check_compiler
from foldgpt.recovery.cuts import check_plan_suits
from foldgpt.recovery.errors import DivergenceError
from foldgpt.recovery.inputs import check_device, check_trainable
from foldgpt.recovery.loggers import check_loggers
from foldgpt.recovery.packing import packed_windows
from foldgpt.recovery.recover import recover
from foldgpt.recovery.settings import RecoverySettings
from foldgpt.recovery.trainable import make_trainable_, merge_trained_
from foldgpt.recovery.windows import TrainingWindows
from foldgpt.recovery.work_folder import check_apart, remove_work, work_beside
from foldgpt.recovery_result import RECOVERY, RecoveryResult

__all__ = [
    "RECOVERY",
    "DivergenceError",
    "RecoveryResult",
    "RecoverySettings",
    "TrainingWindows",
    "check_apart",
    "check_compiler",
    "check_device",
    "check_loggers",
    "check_plan_suits",
    "check_trainable",
    "make_trainable_",
    "merge_trained_",
    "packed_windows",
    "recover",
    "remove_work",
    "work_beside",
]

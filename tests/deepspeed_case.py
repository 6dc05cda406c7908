"""A tiny recovery under DeepSpeed, for processes of their own.

DeepSpeed runs on CPUs as it does on GPUs. transformers and accelerate ask for it on GPUs alone, so here they are told
that there are some. What a launcher would say stands in VARIABLES.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from recovery_case import tiny_recovery
from sharded_case import die_at

#: What `accelerate launch` sets for the recipe in docs/recovery.md.
VARIABLES = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "DS_ACCELERATOR": "cpu",
}


def recover_by_deepspeed(folder: Path, changes: dict[str, Any]) -> None:
    """Recover it, by settings that differ from those of a tiny recovery."""
    module: Any = sys.modules["foldgpt.recovery.recover"]
    arguments = module.TrainingArguments
    module.TrainingArguments = lambda **given: arguments(**{**given, "use_cpu": False})
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    step = module.RecoveryTrainer._clip_grad_norm

    def seen(self: Any, model: Any) -> Any:
        assert type(self.model_wrapped).__name__ == "DeepSpeedEngine"
        return step(self, model)

    module.RecoveryTrainer._clip_grad_norm = seen
    if "DIE_AT" in os.environ:
        die_at(int(os.environ["DIE_AT"]))
    tiny_recovery(folder, **{"shared": False, **changes})

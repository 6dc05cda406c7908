"""A tiny recovery under FSDP, for processes of their own.

torch shards on CPUs as it does on GPUs. accelerate turns FSDP on for GPUs alone, so here it is told that it is on. What
a launcher would say stands in VARIABLES. With DIE_AT in the environment the processes end behind the checkpoint of that
step, as if they had been killed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from recovery_case import tiny_recovery

#: What `accelerate launch` sets for the recipe in docs/recovery.md.
VARIABLES = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def shard_on_cpus() -> None:
    """Let accelerate use FSDP here."""
    made = AcceleratorState.__init__

    def sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = sharded


def die_at(step: int) -> None:
    """End behind the checkpoint of a step."""
    from foldgpt.recovery.trainer import RecoveryTrainer

    save = RecoveryTrainer._save_checkpoint

    def save_and_die(self: Any, *args: Any) -> None:
        save(self, *args)
        if self.state.global_step == step:
            self.accelerator.wait_for_everyone()
            os._exit(9)

    RecoveryTrainer._save_checkpoint = save_and_die  # type: ignore[method-assign]


def recover_sharded(folder: Path, changes: dict[str, Any]) -> None:
    """Recover it, by settings that differ from those of a tiny recovery."""
    shard_on_cpus()
    if "DIE_AT" in os.environ:
        die_at(int(os.environ["DIE_AT"]))
    tiny_recovery(folder, **{"shared": False, **changes})

"""What watches a training: its time, its last step, and what the user sees of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from foldgpt.progress import note


class TimeBudget(TrainerCallback, ExportableState):
    """Counts the time of training over interruptions, and stops after some minutes of it.

    All processes go by the first one's clock.

    Args:
        minutes: the budget; None for none.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.spent = 0.0
        self.is_over = False
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Time so far; of an interrupted part that up to the checkpoint from which the training goes on."""
        return self.spent if self._since is None else self.spent + time.monotonic() - self._since

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent, self._since = self.seconds, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.minutes is None:
            return
        over = torch.tensor(float(self.has_spent(self.minutes)), device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(over, src=0)
        if bool(over):
            self.is_over = True
            control.should_training_stop = control.should_evaluate = control.should_save = True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"args": {"minutes": self.minutes}, "attributes": {"spent": self.seconds, "is_over": self.is_over}}

    def has_spent(self, minutes: float | None) -> bool:
        """Whether the time so far is more than this."""
        return minutes is not None and self.seconds > 60 * minutes


def step_of_end(checkpoint: Path, minutes: float | None) -> int | None:
    """The step at which a training ended, if it had when this checkpoint was saved; what is left is to save the model.

    Args:
        checkpoint: the last one.
        minutes: how long the call that goes on may take: one that ended by its time goes on if it is given more.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    kept = state.stateful_callbacks
    if not kept["TrainerControl"]["args"]["should_training_stop"]:
        return None
    clock = TimeBudget(minutes)
    # What another version left may know of no time.
    spent = kept.get(TimeBudget.__name__, {}).get("attributes", {})
    clock.spent, clock.is_over = spent.get("spent", 0.0), spent.get("is_over", False)
    return None if clock.is_over and not clock.has_spent(minutes) else state.global_step


class MeasureAtEnd(TrainerCallback):
    """The last step is measured and saved, whether or not it falls on the usual interval."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


class Narrator(TrainerCallback):
    """One line for each measurement on the held-out windows."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            metrics = kwargs["metrics"]
            parts = ", ".join(
                f"{name.removeprefix('eval_')} {value:.4f}" for name, value in metrics.items() if name != "epoch"
            )
            note(f"step {state.global_step} of {state.max_steps}: held-out {parts}")

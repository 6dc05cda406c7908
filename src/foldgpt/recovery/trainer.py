"""Hugging Face's Trainer, on a student that learns from its teacher.

What is not here comes with it: accelerate, DDP, gradient accumulation, checkpoints, resuming, loggers.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from foldgpt.artifacts import remove, write_json
from foldgpt.errors import ArtifactError, VerificationError, first_line
from foldgpt.modeling.modeling_foldgpt import PrivateTerms
from foldgpt.recovery.callbacks import MeasureAtEnd, Narrator, TimeBudget
from foldgpt.recovery.distillation import IGNORED, Distillation
from foldgpt.recovery.errors import DivergenceError
from foldgpt.recovery.masters import parameters_called
from foldgpt.recovery.teacher import Teacher, TeacherStates
from foldgpt.recovery.teacher_cache import CachedStates
from foldgpt.recovery.windows import TrainingWindows

#: Written last into a checkpoint: without it, the process was killed while it saved.
COMPLETE = "complete.json"
#: What torch's writer says where the disk is full; it raises RuntimeError, as much else does.
_TORCH_CANNOT_WRITE = (
    "iostream error",
    "PytorchStreamWriter",
    "file write failed",
    "inline_container",
    "unexpected pos",
)


class RecoveryTrainer(Trainer):
    """Trains a `Distillation` on windows in their order.

    Args:
        module: the student and its losses.
        args: transformers' training arguments.
        train: training windows.
        held_out: windows that are never trained on.
        teacher: the source; None where nothing is compared with it.
        cache: what the student is compared with on the training windows, if it was computed before.
        minutes: how long the training may take; None for as long as it does.
        callbacks: further callbacks.
    """

    control: Any

    def __init__(
        self,
        module: Distillation,
        args: TrainingArguments,
        *,
        train: TrainingWindows,
        held_out: TrainingWindows,
        teacher: Teacher | None,
        cache: CachedStates | None = None,
        minutes: float | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        super().__init__(
            model=module,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=default_collate,
            callbacks=[TimeBudget(minutes), *(callbacks or []), MeasureAtEnd(), Narrator()],
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        # The loss is a sum divided by the scored tokens of the whole step, over micro-batches and processes.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = True
        self._held_out = held_out
        self._teacher = teacher
        self._cache = cache
        self._kept_states: dict[int, TeacherStates] = {}
        self._start: float | None = None
        self._rate, self._at_rate = 1.0, set[int]()
        if self.is_fsdp_enabled:
            _keep_losses_exact_(self.accelerator.state.fsdp_plugin)
        if teacher is not None:
            teacher.model.to(args.device)

    # ------------------------------------------------------------------------------------------------ training

    def learn_at(self, rate: float, parameters: Sequence[Tensor]) -> None:
        """Let some parameters learn at a multiple of the learning rate; called before training."""
        self._rate, self._at_rate = rate, {id(parameter) for parameter in parameters}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in transformers, with the parameters of `learn_at` in groups of their own."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new:
            for group in list(optimizer.param_groups):
                apart = [parameter for parameter in group["params"] if id(parameter) in self._at_rate]
                if apart:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in self._at_rate]
                    optimizer.add_param_group({**group, "params": apart, "lr": group["lr"] * self._rate})
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in transformers, without private scales: decay would draw them to 0, where they add nothing."""
        scales = {
            f"{name}.{place}"
            for name, module in model.named_modules()
            if isinstance(module, PrivateTerms)
            for place, _ in parameters_called(module, "scale")
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in scales]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This process's part of the step's mean loss, times the number of processes, as DDP averages gradients."""
        num_scored = (inputs["labels"][:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        sums = model(**self._arguments(inputs, self._teacher_states(inputs)))
        # A step may have nothing to score (chats whose replies lie beyond the context): then its loss is 0, not NaN.
        loss = sums["loss"] * self.accelerator.num_processes / torch.as_tensor(num_scored).clamp(min=1)
        return (loss, sums) if return_outputs else loss

    def _teacher_states(self, inputs: dict[str, Tensor]) -> TeacherStates | None:
        if self._teacher is None:
            return None
        if self._cache is not None:
            return self._cache.states(inputs["window"], inputs["input_ids"].device)
        return self._computed(self._teacher, inputs)

    def _computed(self, teacher: Teacher, inputs: dict[str, Tensor]) -> TeacherStates:
        """The teacher's states, in the mixed precision in which the student runs."""
        with self.accelerator.autocast():
            return teacher.states(inputs["input_ids"], inputs.get("positions"))

    @staticmethod
    def _arguments(inputs: dict[str, Tensor], theirs: TeacherStates | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {name: value for name, value in inputs.items() if name != "window"}
        return arguments if theirs is None else arguments | theirs.arguments()

    def _load_callback_state(self) -> None:
        """As in transformers; but how long it may take is said by the call that goes on, not by the stopped one.

        And the best checkpoint is looked for in this folder, which may have had another name when it was saved.

        Raises:
            ArtifactError: it is gone.
        """
        step = self.state.best_global_step
        if step:
            best = self._checkpoint(step)
            if not (best / COMPLETE).is_file():
                raise ArtifactError(f"the checkpoint of the best state, {best}, is gone. Remove {best.parent}.")
            self.state.best_model_checkpoint = str(best)
        minutes = self.clock.minutes
        # A checkpoint in which no time was kept would fail when the next one is written.
        self.state.stateful_callbacks.setdefault(TimeBudget.__name__, self.clock.state())
        super()._load_callback_state()
        clock = self.clock
        clock.minutes = minutes
        clock.is_over = clock.is_over and clock.has_spent(minutes)

    @property
    def clock(self) -> TimeBudget:
        """How long the training has taken. Callbacks are made anew when a training is resumed."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, TimeBudget))

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        # Gradients are those of all processes by now, so each of them stops here or none. A scaler (of fp16) looks for
        # the largest factor that they bear, and leaves out the steps in which they do not.
        if self.accelerator.scaler is None and not bool(torch.isfinite(torch.as_tensor(norm))):
            raise DivergenceError(
                f"the gradient is not finite in step {self.state.global_step + 1}; {self._what_is_kept()}"
            )
        return norm

    # ------------------------------------------------------------------------------------------------ measuring

    @torch.no_grad()
    def measure(self, *, whole: bool = False) -> dict[str, float]:
        """The mean of each loss on the held-out windows, over all processes.

        Args:
            whole: let the student run the blocks that it has in common with the teacher as well: its own may have been
                rounded since.
        """
        size, count, rank = self.args.per_device_train_batch_size, self.args.world_size, self.args.process_index
        module = self.model
        was_training = module.training
        module.eval()
        sums: dict[str, Tensor] = {}
        num_scored = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for round_start in range(0, len(self._held_out), count * size):
            start = round_start + rank * size
            # A process without windows of its own in the last round runs along: under FSDP all have to.
            is_own = start < len(self._held_out)
            start = start if is_own else 0
            items = range(start, min(start + size, len(self._held_out)))
            inputs = self._prepare_inputs(default_collate([self._held_out[item] for item in items]))
            arguments = self._arguments(inputs, self._teacher_on_held_out(start, inputs))
            if whole:
                arguments.pop("teacher_entry", None)
            with self.accelerator.autocast():
                found = module(**arguments)
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.double() * is_own
            num_scored += (inputs["labels"][:, 1:] != IGNORED).sum() * is_own
        module.train(was_training)
        table = torch.stack([num_scored, *sums.values()])
        if count > 1:
            table = self.accelerator.reduce(table, "sum")
        return {name: float(value / table[0]) for name, value in zip(sums, table[1:], strict=True)}

    def _teacher_on_held_out(self, start: int, inputs: dict[str, Tensor]) -> TeacherStates | None:
        """The teacher's states on the held-out windows from `start` on; computed once."""
        if self._teacher is None:
            return None
        if start not in self._kept_states:
            # Between two measurements the device needs its memory for the training.
            self._kept_states[start] = self._computed(self._teacher, inputs).to("cpu")
        return self._kept_states[start].to(inputs["input_ids"].device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure, log, and stop if the training has gone wrong.

        Raises:
            DivergenceError: the held-out loss is not finite, or far above what it was at the start.
        """
        metrics = {f"eval_{name}": value for name, value in self.measure().items()}
        loss = metrics["eval_loss"]
        start = loss if self._start is None else self._start
        if not loss <= max(2 * start, start + 1):
            raise DivergenceError(
                f"the held-out loss is {loss:.4g} in step {self.state.global_step}, from {start:.4g} at the start; "
                f"{self._what_is_kept()}"
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure_start(self) -> dict[str, float]:
        """Measure the student as it is given; what comes later is judged by this.

        Raises:
            DivergenceError: its loss is not finite.
        """
        found = self.measure()
        if not found["loss"] < float("inf"):
            raise DivergenceError(f"the held-out loss is {found['loss']} before any training; the model is broken")
        self._start = found["loss"]
        return found

    def _what_is_kept(self) -> str:
        best = self.state.best_model_checkpoint
        kept = (
            f"the best state so far (held-out loss {self.state.best_metric:.4g}) is kept in {best}"
            if best is not None
            else "no better state than the one at the start was reached"
        )
        return f"{kept}. A lower learning rate may help."

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save what is trained, and not the frozen weights, which are the folded model's own."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        state = self.model.state_dict() if state_dict is None else state_dict
        save_file(
            {name: value.contiguous() for name, value in state.items() if name in trained}, folder / SAFE_WEIGHTS_NAME
        )
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Frozen weights are missing in a checkpoint by design; a trained one must not be."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        wrong = [*load_result.unexpected_keys, *(trained & set(load_result.missing_keys))]
        if wrong:
            raise VerificationError(f"the checkpoint does not fit the student: {', '.join(sorted(wrong)[:3])}")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in transformers, complete or not there; the best and the last one are kept.

        Raises:
            ArtifactError: it cannot be written.
        """
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TORCH_CANNOT_WRITE):
                raise
            step = self.state.global_step
            shutil.rmtree(self._checkpoint(step), ignore_errors=True)
            is_kept = any(Path(self.args.output_dir).glob(f"checkpoint-*/{COMPLETE}"))
            rest = "The one before it is kept; the same call goes on there." if is_kept else "There was none before it."
            raise ArtifactError(
                f"cannot write the checkpoint of step {step} into {self.args.output_dir}: {first_line(error)}. {rest}"
            ) from error
        self.accelerator.wait_for_everyone()  # each process saves its own random state
        if self.state.best_global_step:
            # transformers looks whether it is there, before FSDP has written its shards.
            self.state.best_model_checkpoint = str(self._checkpoint(self.state.best_global_step))
        if self.args.should_save:
            last = self._checkpoint(self.state.global_step)
            write_json(last / COMPLETE, {"step": self.state.global_step})
            # Not by transformers: it drops others before this one is complete, and file by file.
            kept = {last, self._checkpoint(self.state.best_global_step or self.state.global_step)}
            for older in set(last.parent.glob("checkpoint-*")) - kept:
                remove(older)

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"


def _keep_losses_exact_(plugin: Any) -> None:
    """Let FSDP's mixed precision hand over what a forward pass returns, here losses, in fp32.

    In 16 bits the best of two checkpoints would often not be told from the other.
    """
    policy = plugin.mixed_precision_policy
    if getattr(policy, "output_dtype", None) is not None:  # FSDP2; the first version leaves outputs alone
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=torch.float32)

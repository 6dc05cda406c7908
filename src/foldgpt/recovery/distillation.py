"""The student and what is asked of it, in one module, so that DDP and FSDP see one forward pass that ends in a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from foldgpt.families import brings_own_code, decoder_of
from foldgpt.objectives import (
    DivergenceLoss,
    Head,
    ReducedPredictions,
    Teaching,
    compare_products,
    cosine_distance,
    fused_logit_losses,
    product_rows,
    relative_error,
)
from foldgpt.recovery.compiled import compiled
from foldgpt.recovery.settings import RecoverySettings
from foldgpt.recovery.states import Body, States

#: A position with this label is not scored, as everywhere in transformers.
IGNORED = -100


class Distillation(nn.Module):
    """Sums of the weighted losses over the scored positions of a batch.

    A position is scored if it has a next token in the window whose label is not `IGNORED`; all losses are taken on
    the same positions, each in the mean over them once the caller divides by their number.

    Args:
        student: the folded model, with its trainable parameters in place.
        settings: the losses and their weights.
        head: the student's head, made before LoRA was attached.
        teacher_head: the teacher's; None where nothing is compared with it.
        behind: positions of the blocks behind which states are compared.
        common: how many blocks, from the first on, are the teacher's own and are not trained.
        num_places: of how many places the error of states is the mean; by default those of `behind`. Behind the common
            blocks there is none, and nothing is compared.

    Attributes:
        head: the student's head.
    """

    def __init__(
        self,
        student: nn.Module,
        settings: RecoverySettings,
        head: Head,
        teacher_head: Head | None,
        behind: Sequence[int] = (),
        common: int = 0,
        num_places: int | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self._settings = settings
        self.head = head
        self._teacher_head = teacher_head
        self._num_places = len(behind) if num_places is None else num_places
        self._body = Body(student, behind, common)
        self._compare = compiled(compare_products) if settings.compile else compare_products
        self._rows = product_rows(head) if settings.compile else None
        # By these FSDP knows the blocks.
        self._no_split_modules = sorted({type(block).__name__ for block in decoder_of(student).blocks})

    def train(self, mode: bool = True) -> Self:
        """As in torch, but the student's modules stay as they are when it is measured; some draw experts in training.

        Where activations are computed again, the modules that do so go by their own mode, and are put in it. Code that
        comes with a checkpoint may run without gradients when it is not in training, so that is left to do as it does.
        """
        super().train(mode)
        if mode and not brings_own_code(self.student):
            for module in self.student.modules():
                module.training = bool(getattr(module, "gradient_checkpointing", False))
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        teacher_last: Tensor | None = None,
        teacher_between: Sequence[Tensor] = (),
        teacher_entry: Tensor | None = None,
        teacher_predictions: ReducedPredictions | None = None,
    ) -> dict[str, Tensor]:
        """Losses on a batch.

        Args:
            input_ids: [B, T].
            labels: [B, T], `input_ids` where a token is to be predicted and `IGNORED` elsewhere.
            positions: places in the documents, or None.
            teacher_last: the teacher's last hidden states, [B, T, H]; where there are predictions, needed only by the
                losses that compare them.
            teacher_between: its states that those behind the student's blocks are compared with.
            teacher_entry: its stream behind the common blocks; without it the student runs them itself.
            teacher_predictions: its predictions at all positions, [B, T], for a student with its head.

        Returns:
            "loss", the weighted sum, with a gradient, and each loss by itself without; fp64 sums over positions.
        """
        settings = self._settings
        found: States = self._body(input_ids, positions, teacher_entry)
        targets = labels[:, 1:]
        scored = targets != IGNORED
        student_RH = _rows(found.last_BTH, scored)
        targets_R = targets[scored]
        teacher_RH = None if teacher_last is None else _rows(teacher_last, scored)
        parts: dict[str, Tensor] = {}
        loss = student_RH.new_zeros((), dtype=torch.float64)
        if settings.kl or settings.lm:
            compares = settings.kl > 0
            if teacher_predictions is not None:
                teacher: Teaching | None = teacher_predictions[:, :-1][scored]
            elif teacher_RH is not None and self._teacher_head is not None:
                teacher = self._teacher_head, teacher_RH
            else:
                teacher = None
            total, kl, lm = fused_logit_losses(
                self.head,
                student_RH,
                targets_R,
                teacher=teacher,
                divergence=DivergenceLoss(settings.divergence, settings.temperature, settings.skew)
                if compares
                else None,
                divergence_weight=settings.kl,
                lm_weight=settings.lm,
                compare=self._compare,
                rows=self._rows,
            )
            loss = loss + total
            parts |= {"kl": kl} if compares else {}
            parts |= {"lm": lm} if settings.lm else {}
        if teacher_RH is not None:
            for name, weight, distance in (
                ("last_error", settings.last_error, relative_error),
                ("last_cosine", settings.last_cosine, cosine_distance),
            ):
                if weight:
                    value = distance(teacher_RH, student_RH).sum(dtype=torch.float64)
                    loss = loss + weight * value
                    parts[name] = value.detach()
        if settings.states and teacher_between:
            pairs = zip(teacher_between, found.between, strict=True)
            errors = [relative_error(_rows(theirs, scored), _rows(ours, scored)) for theirs, ours in pairs]
            value = torch.stack(errors).sum(dtype=torch.float64) / self._num_places
            loss = loss + settings.states * value
            parts["states"] = value.detach()
        return {"loss": loss, **parts}


def _rows(states_BTH: Tensor, scored: Tensor) -> Tensor:
    """The states from which scored tokens are predicted, [rows, H]."""
    return states_BTH[:, :-1][scored]

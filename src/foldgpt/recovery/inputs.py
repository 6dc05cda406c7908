"""Whether models, plan, windows and settings of a recovery fit each other, before anything is changed."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from foldgpt.errors import UnsupportedModelError, UsageError
from foldgpt.families import decoder_of, num_positions
from foldgpt.families.plain import is_plain
from foldgpt.plan import FoldPlan
from foldgpt.progress import note
from foldgpt.recovery.settings import RecoverySettings
from foldgpt.recovery.states import Body
from foldgpt.recovery.windows import TrainingWindows

#: Tokens of each of the two documents that are run together and apart.
_NUM_TOKENS = 8
#: Part of the second one's states that may differ: in bf16 it is 0.01 to 0.02, and where documents mix about 1.
_TOLERANCE = 0.1


def check_trainable(model: nn.Module) -> None:
    """Check that a model's weights are of a kind that can be trained.

    Raises:
        UnsupportedModelError: they are quantised or in float16.
    """
    if any(not is_plain(parameter) for parameter in model.parameters()):
        raise UnsupportedModelError("the model is quantised; recover the plain model, and quantise the result")
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise UnsupportedModelError(
            "the model is in float16, in which the gradient of a mean over many tokens rounds to nothing; recover it "
            "in bfloat16 or float32 (dtype)"
        )


def check_device(device: torch.device) -> None:
    """Refuse devices on which transformers would not train: a process by itself takes the first accelerator.

    Raises:
        UsageError: another one is named.
    """
    if device.index not in (None, 0) and "LOCAL_RANK" not in os.environ:
        raise UsageError(
            f"device {device}: transformers trains on {device.type}:0 only. Let {device.index} be the first, with "
            f"CUDA_VISIBLE_DEVICES={device.index} in front of the command and device {device.type}"
        )


def check_inputs(
    student: nn.Module,
    teacher: nn.Module | None,
    plan: FoldPlan,
    settings: RecoverySettings,
    train: TrainingWindows,
    held_out: TrainingWindows,
) -> None:
    """Check what `recover` is given.

    Raises:
        UsageError: it does not fit together.
        UnsupportedModelError: documents are to be kept apart, and a model mixes them.
    """
    config: Any = student.config
    vocabulary = config.get_text_config().vocab_size
    for name, windows in (("training", train), ("held-out", held_out)):
        least, largest = _range_of(windows.ids_WT)
        if least < 0 or largest >= vocabulary:
            wrong = least if least < 0 else largest
            raise UsageError(f"the {name} windows hold the id {wrong:,}; the model's vocabulary has {vocabulary:,}")
    longest = num_positions(config)
    context = max(train.ids_WT.shape[1], held_out.ids_WT.shape[1])
    if longest is not None and context > longest:
        raise UsageError(f"the windows have {context:,} tokens, and the model has {longest:,} positions")
    if settings.needs_teacher:
        _check_teacher(student, teacher, plan, settings)
    if train.begins_WT is not None or held_out.begins_WT is not None:
        for model in (student, teacher):
            if model is not None:
                _check_keeps_documents_apart(model)


def _range_of(ids_WT: Tensor) -> tuple[int, int]:
    """The least and the largest id, some windows at a time: they may be on disk, in types that torch cannot compare."""
    parts = [torch.aminmax(part.long()) for part in ids_WT.split(4096)]
    return min(int(part.min) for part in parts), max(int(part.max) for part in parts)


def _check_teacher(student: nn.Module, teacher: nn.Module | None, plan: FoldPlan, settings: RecoverySettings) -> None:
    if teacher is None:
        raise UsageError("a loss compares with the teacher, and there is none")
    if teacher is student:
        raise UsageError("teacher and student are one model in memory; load the teacher by itself")
    ours, theirs = decoder_of(student), decoder_of(teacher)
    if theirs.config.vocab_size != ours.config.vocab_size:
        raise UsageError(
            f"the teacher's vocabulary has {theirs.config.vocab_size:,} entries, the student's "
            f"{ours.config.vocab_size:,}; their predictions cannot be compared"
        )
    compared = [name for name in ("last_error", "last_cosine", "states") if getattr(settings, name)]
    if compared and theirs.config.hidden_size != ours.config.hidden_size:
        raise UsageError(
            f"the teacher's hidden states have {theirs.config.hidden_size:,} channels, the student's "
            f"{ours.config.hidden_size:,}, so {' and '.join(compared)} cannot compare them; set 0, and learn by kl"
        )
    if len(theirs.blocks) != plan.source.num_blocks:
        raise UsageError(
            f"the teacher has {len(theirs.blocks)} blocks, the plan's source {plan.source.num_blocks}; the teacher is "
            f"the model that was folded ({plan.source.model})"
        )
    if not _have_one_embedding(student, teacher):
        note(
            "the teacher's embeddings are not the student's, so the student was hardly folded from it "
            f"({plan.source.model} is the source); it learns from this teacher all the same"
        )


@torch.no_grad()
def _have_one_embedding(student: Any, teacher: Any) -> bool:
    """Whether the token embeddings are the same, which neither folding nor recovery changes, or cannot be compared."""
    ours, theirs = (model.get_input_embeddings().weight for model in (student, teacher))
    if ours.is_meta or theirs.is_meta:
        return True
    # Either may have been loaded in another format.
    coarse = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    return ours.shape == theirs.shape and torch.equal(ours.to(coarse), theirs.to(ours.device, coarse))


@torch.no_grad()
def _check_keeps_documents_apart(model: Any) -> None:
    """Run two documents in one window, as `places_in_documents` places them, and the second one by itself.

    Most models of transformers see by the places where a document begins. OPT does not, and would go on mixing.
    """
    device = model.get_input_embeddings().weight.device
    # Two rows: there are attentions that look at the places of a single one only.
    ids_BT = torch.arange(1, 2 * _NUM_TOKENS + 1, device=device).repeat(2, 1)
    ids_BT = ids_BT % model.config.get_text_config().vocab_size
    places_BT = torch.arange(_NUM_TOKENS, device=device).repeat(2, 2)
    body, was_training = Body(model), model.training
    model.eval()
    try:
        together_BTH = body(ids_BT, places_BT).last_BTH[:, _NUM_TOKENS:].float()
        alone_BTH = body(ids_BT[:, _NUM_TOKENS:]).last_BTH.float()
    finally:
        model.train(was_training)
    # Not "more than": NaN is no agreement.
    if not (together_BTH - alone_BTH).norm() <= _TOLERANCE * alone_BTH.norm():
        raise UnsupportedModelError(
            f"{type(model).__name__} does not keep the documents of a window apart by their positions, so "
            "separate_documents would not do what it says; leave it out"
        )

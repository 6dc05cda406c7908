"""What teacher and student have in common: the blocks in front of all that folding changed and training will change.

Where these are frozen, the student's stream in front of the first other block is the teacher's, so it is computed once,
and the backward pass ends there.
"""

from __future__ import annotations

import torch
from torch import nn

from foldgpt.families import decoder_of
from foldgpt.fingerprints import have_same_tensors
from foldgpt.plan import FoldPlan


def first_changed(plan: FoldPlan) -> int:
    """Position of the first block whose work folding changed; 0 if it changed nothing.

    That is the block before the first cut, which has to take over, or one that lost a sublayer or shares weights.
    """
    touched = {*plan.removed_attention, *plan.removed_mlp}.union(*(group.blocks for group in plan.groups))
    for position, source in enumerate(plan.kept):
        if source != position:
            return max(0, position - 1)
        if source in touched:
            return position
    return len(plan.kept) - 1 if plan.removed else 0


@torch.no_grad()
def common_blocks(student: nn.Module, teacher: nn.Module, plan: FoldPlan) -> int:
    """How many blocks, from the first on, are the teacher's own in the student and are not trained.

    Args:
        student: the student, made trainable.
        teacher: its source.
        plan: the plan it was folded by.
    """
    if not _is_frozen_copy(student.get_input_embeddings(), teacher.get_input_embeddings()):  # type: ignore[operator]
        return 0
    pairs = zip(decoder_of(student).blocks, decoder_of(teacher).blocks, strict=False)
    count = 0
    for ours, theirs in pairs:
        if count >= first_changed(plan) or not _is_frozen_copy(ours, theirs):
            break
        count += 1
    return count


def _is_frozen_copy(ours: nn.Module, theirs: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in ours.parameters()) and have_same_tensors(ours, theirs)

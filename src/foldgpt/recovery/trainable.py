"""What is trained of a folded model, and how it becomes ordinary weights again."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from foldgpt.errors import UnsupportedModelError, UsageError
from foldgpt.families import decoder_of
from foldgpt.folding import is_linear_layer, private_modules
from foldgpt.plan import FoldPlan
from foldgpt.recovery.common import first_changed
from foldgpt.recovery.cuts import blocks_beside_cuts
from foldgpt.recovery.inputs import check_trainable
from foldgpt.recovery.lora import attach_lora_, merge_lora_
from foldgpt.recovery.masters import merge_masters_, parameters_called, train_
from foldgpt.recovery.settings import RecoverySettings


def make_trainable_(student: nn.Module, plan: FoldPlan, settings: RecoverySettings) -> int:
    """Freeze a folded model but for what the settings train, in place.

    LoRA goes on every linear layer of the blocks, once for each set of shared weights. Embeddings and head are left
    out: they are often one matrix, and are the teacher's own (a LoRA on one of the two would untie them). Experts of
    a mixture that are held as one parameter stay as they are.

    Args:
        student: the folded model.
        plan: the plan it was folded by.
        settings: what is trained.

    Returns:
        The number of trainable parameters.

    Raises:
        UsageError: blocks at the cuts are to be trained, and there is no cut; or private terms alone, and there are
            none.
        UnsupportedModelError: the weights are quantised or in float16, or nothing in the blocks can be trained.
    """
    decoder = decoder_of(student)
    check_trainable(student)
    fixed = _fixed(student)
    student.requires_grad_(False)
    first = first_changed(plan) if settings.train_blocks == "behind" else 0
    kept = {id(module) for block in decoder.blocks[:first] for module in block.modules()}
    terms = private_modules(student)
    apart = kept.union(id(module) for module in terms)
    full = [
        module
        for block in _trained_fully(decoder.blocks, plan, settings)
        for module in block.modules()
        if _matrices(module) and id(module) not in apart
    ]
    if settings.rank:
        taken = {id(module) for module in full}
        names = [
            name
            for name, module in decoder.blocks.named_modules()
            if is_linear_layer(module) and id(module) not in taken and id(module) not in kept
        ]
        if names:
            alpha = settings.alpha or settings.rank
            attach_lora_(decoder.blocks, names, rank=settings.rank, alpha=alpha, seed=settings.seed)
    train_(full, fixed)
    if not (terms or settings.rank or settings.norms or full):
        raise UsageError("nothing is trained: no position has private terms; set rank or norms")
    if settings.norms:
        body = decoder.body
        if settings.train_blocks == "behind":
            # In front of the blocks the student does what the teacher does, and is not run.
            apart |= {id(module) for name, module in body.named_modules() if "embed" in name}
        train_(module for module in _norms(body) if id(module) not in apart)
    if settings.private_terms:
        train_(terms)
    count = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    if not count:
        raise UnsupportedModelError(f"{type(student).__name__} has no linear layer or norm in its blocks to train")
    return count


def merge_trained_(student: nn.Module) -> None:
    """Turn what was trained into ordinary weights, in place: no parameter more than before `make_trainable_`."""
    merge_lora_(student)
    merge_masters_(student)
    student.requires_grad_(False)


def trained_scales(student: nn.Module, plan: FoldPlan) -> list[nn.Parameter]:
    """What is trained of the private scales, and of the norms that stand for them where a position starts at zero.

    Args:
        student: the folded model, after `make_trainable_`.
        plan: the plan it was folded by.
    """
    decoder = decoder_of(student)
    modules: list[tuple[nn.Module, str]] = [(terms, "scale") for terms in private_modules(student)]
    for group in plan.groups:
        for sublayer in group.sublayers:
            name = None if decoder.sublayers is None else decoder.sublayers.norm_behind(sublayer)
            if name is not None:
                positions = [plan.position_of[block] for block in group.started_at_zero]
                modules += [(decoder.blocks[position].get_submodule(name), "weight") for position in positions]
    return [
        parameter
        for module, kind in modules
        for _, parameter in parameters_called(module, kind)
        if parameter.requires_grad
    ]


def _trained_fully(blocks: nn.ModuleList, plan: FoldPlan, settings: RecoverySettings) -> list[nn.Module]:
    if settings.train_fully == "none":
        return []
    if settings.train_fully == "all":
        return list(blocks)
    return [blocks[position] for position in blocks_beside_cuts(plan)]


def _fixed(student: nn.Module) -> set[int]:
    """Ids of the parameters that the model itself does not train, such as a router's correction of its scores.

    They get no gradient. Where all are frozen it was not the model that did it.
    """
    frozen = {id(parameter) for parameter in student.parameters() if not parameter.requires_grad}
    return frozen if len(frozen) < sum(1 for _ in student.parameters()) else set()


def _matrices(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _norms(body: nn.Module) -> Iterator[nn.Module]:
    """Modules whose weight is a vector.

    Other vectors are none of a norm: rates of decay in linear attention, biases by which a router chooses (they get no
    gradient), the shape of an activation.
    """
    for module in body.modules():
        own = dict(module.named_parameters(recurse=False))
        if (
            "weight" in own
            and own.keys() <= {"weight", "bias"}
            and all(p.ndim <= 1 and p.is_leaf for p in own.values())
        ):
            yield module

"""Private terms: which a plan gives each position, what they begin as, and how they become part of ordinary weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from foldgpt.errors import PlanError, UnsupportedModelError, did_you_mean
from foldgpt.families import Decoder, decoder_of
from foldgpt.families.plain import is_plain
from foldgpt.folding.fitted import LowRank, MemberFit
from foldgpt.folding.kinds import low_rank_leaves, output_bias, output_parameter, scale_leaves, shareable_leaves
from foldgpt.modeling.modeling_foldgpt import PrivateTerms
from foldgpt.plan import SUBLAYERS, Group


@dataclass(frozen=True)
class LeafTerms:
    """What stands beside one shared leaf at the position of one member.

    Attributes:
        block: source index of the member.
        leaf: name of the leaf inside the block.
        inputs: size of its inputs; 0 where only a scale stands, which does not need it.
        outputs: size of its outputs.
        rank: of the low-rank term; 0 for none.
        scale: whether there is a scale.
    """

    block: int
    leaf: str
    inputs: int
    outputs: int
    rank: int
    scale: bool

    @property
    def num_parameters(self) -> int:
        """How many parameters they are."""
        return self.rank * (self.inputs + self.outputs) + self.outputs * self.scale


def terms_of_group(decoder: Decoder, group: Group) -> list[LeafTerms]:
    """The private scales and low-rank terms of a group's members.

    Raises:
        PlanError: ranks for what the group does not share, what is not linear, or larger than the matrix.
        UnsupportedModelError: scales where the family does not say what a sublayer ends in.
    """
    return list(_terms_of_group(decoder, group))


def _terms_of_group(decoder: Decoder, group: Group) -> Iterator[LeafTerms]:
    shared = shareable_leaves(decoder, group.holder, group.sublayers)
    linear = low_rank_leaves(decoder, group.holder, group.sublayers)
    if not isinstance(group.ranks, int):
        for leaf in group.ranks:
            if leaf not in shared:
                raise PlanError(f"group {list(group.blocks)} does not share {leaf!r}.{did_you_mean(leaf, shared)}")
            if leaf not in linear:
                kind = type(decoder.blocks[group.holder].get_submodule(leaf)).__name__
                raise PlanError(
                    f"group {list(group.blocks)}: a low-rank term stands beside a linear layer of several outputs; "
                    f"{leaf} is a {kind}"
                )
    scaled = scale_leaves(decoder, group.holder, group.sublayers) if "scales" in group.private else []
    for block in group.fitted_members:
        for leaf in shared:
            rank = group.rank_of(leaf, block) if leaf in linear else 0
            if not rank and leaf not in scaled:
                continue
            inputs, outputs = sizes_of_leaf(decoder.blocks[block].get_submodule(leaf), leaf)
            if rank > min(inputs, outputs) and leaf in linear:
                raise PlanError(
                    f"group {list(group.blocks)}: rank {rank} for {leaf}, which is a matrix of {outputs} × {inputs}"
                )
            yield LeafTerms(block, leaf, inputs, outputs, rank, leaf in scaled)


def sizes_of_leaf(module: nn.Module, leaf: str) -> tuple[int, int]:
    """Sizes of a leaf's inputs and outputs; inputs are 0 for what is not a linear layer."""
    if isinstance(module, nn.Linear):
        return module.weight.shape[1], module.weight.shape[0]
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    key, dimension = _output_parameter(module, leaf)
    return 0, module.get_parameter(key).shape[dimension]


def _output_parameter(module: nn.Module, leaf: str) -> tuple[str, int]:
    """See `output_parameter`; for a leaf that is known to end a sublayer."""
    found = (output_parameter(sublayer, leaf, module) for sublayer in SUBLAYERS)
    return next(parameter for parameter in found if parameter is not None)


def private_modules(model: nn.Module) -> list[Any]:
    """The `PrivateTerms` of a folded model, in order of its layout; none where nothing is private but norms."""
    layout = getattr(model.config, "fold_layout", None) or {}
    blocks = decoder_of(model).blocks
    return [blocks[entry["position"]].get_submodule(entry["module"]) for entry in layout.get("private", [])]


@torch.no_grad()
def write_terms_(module: PrivateTerms, terms: LeafTerms, fit: MemberFit, *, zero: bool) -> None:
    """Give private terms the values they begin with: those of a fit, else values that have no effect.

    Args:
        module: the terms, in place at their position.
        terms: which they are.
        fit: what was fitted for the member.
        zero: whether the position starts at zero.
    """
    if module.scale is not None:
        scale_O = fit.scales.get(terms.leaf)
        module.scale.fill_(0.0 if zero else 1.0)
        if scale_O is not None:
            module.scale.copy_(scale_O)
    if module.up is not None and module.down is not None:
        low_rank = fit.low_rank.get(terms.leaf) or _without_effect(terms)
        module.up.copy_(low_rank.up_OR)
        module.down.copy_(low_rank.down_RI)


def _without_effect(terms: LeafTerms) -> LowRank:
    """As LoRA begins: U is zero, and D random, always the same for one leaf of one block."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{terms.block} {terms.leaf}".encode()))
    down_RI = torch.randn((terms.rank, terms.inputs), generator=generator) / terms.inputs**0.5
    return LowRank(torch.zeros(terms.outputs, terms.rank), down_RI)


def check_mergeable(terms: Any, leaf: str) -> None:
    """Refuse private terms that cannot be merged into the weights that they stand beside.

    Args:
        terms: the `PrivateTerms`.
        leaf: name of the leaf inside the block, for the message.

    Raises:
        UnsupportedModelError: the weights are quantised, or offloaded.
    """
    if any(parameter.is_meta for parameter in terms.parameters()):
        raise UnsupportedModelError(f"the weights of {leaf} are offloaded; load the whole model in memory to unfold it")
    if any(not is_plain(parameter) for parameter in terms.shared.parameters()):
        raise UnsupportedModelError(f"{leaf} is quantised; unfold the plain model, and quantise the result")


@torch.no_grad()
def merged(terms: Any, leaf: str) -> nn.Module:
    """The leaf that computes by itself what it does together with its private terms.

    Products are made in fp64 and rounded once.

    Args:
        terms: the `PrivateTerms`, on weights of their own that `check_mergeable` lets pass; these are changed.
        leaf: name of the leaf inside the block.
    """
    module: nn.Module = terms.shared
    if isinstance(module, (nn.Linear, Conv1D)):
        key, dimension = "weight", -1 if isinstance(module, Conv1D) else -2
    else:
        key, dimension = _output_parameter(module, leaf)
    weight = module.get_parameter(key)
    bias = output_bias(module, key)
    value = weight.double()
    if terms.scale is not None:
        scale_O = terms.scale.double()
        value = value * (scale_O[:, None] if dimension == -2 else scale_O)
        if bias is not None:
            bias.copy_((bias.double() * scale_O).to(bias.dtype))
    if terms.up is not None:
        term_OI = terms.up.double() @ terms.down.double()
        value = value + (term_OI if dimension == -2 else term_OI.T)
    weight.copy_(value.to(weight.dtype))
    return module

"""Random fits of groups, and what they come to in plain weights, written without foldgpt's own merging."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from foldgpt.families import decoder_of
from foldgpt.folding import GroupFit, LowRank, MemberFit
from foldgpt.folding.private import terms_of_group
from foldgpt.plan import Group
from reference import blocks_of


def random_fit(model: Any, group: Group, seed: int = 0) -> GroupFit:
    """A fit with a random value for each private term of a group's members, and for their norms."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    terms = terms_of_group(decoder_of(model), group)
    members = {}
    for index in group.fitted_members:
        own = [entry for entry in terms if entry.block == index]
        block = blocks_of(model)[index]
        members[index] = MemberFit(
            scales={entry.leaf: 1 + 0.5 * drawn(entry.outputs) for entry in own if entry.scale},
            low_rank={
                entry.leaf: LowRank(0.3 * drawn(entry.outputs, entry.rank), 0.3 * drawn(entry.rank, entry.inputs))
                for entry in own
                if entry.rank
            },
            norms={
                name: parameter.detach() + 0.1 * drawn(*parameter.shape)
                for name, parameter in block.named_parameters()
                if "norm" in name or name.startswith("ln_")
            },
        )
    return GroupFit(members=members)


@torch.no_grad()
def with_merged_terms(model: nn.Module, group: Group, fit: GroupFit) -> nn.Module:
    """A copy of a model whose members of a group have the terms of the fit in their weights."""
    model = copy.deepcopy(model)
    for index, member in fit.members.items():
        block = blocks_of(model)[index]
        for leaf, scale in member.scales.items():
            module = block.get_submodule(leaf)
            if isinstance(module, Conv1D):
                module.weight.mul_(scale)
            elif isinstance(module, nn.Linear):
                module.weight.mul_(scale[:, None])
            else:
                module.down_proj.mul_(scale[:, None])
            if getattr(module, "bias", None) is not None:
                module.bias.mul_(scale)
        for leaf, term in member.low_rank.items():
            module = block.get_submodule(leaf)
            delta = term.up_OR.double() @ term.down_RI.double()
            module.weight.add_(delta.T if isinstance(module, Conv1D) else delta)
        for name, value in member.norms.items():
            block.get_parameter(name).copy_(value)
    return model

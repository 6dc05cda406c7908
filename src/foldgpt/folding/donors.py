"""Donors: how the weights that a group shares are made from those of its members."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

#: Takes one parameter of every member, in order of depth and of equal shape; returns the shared one.
Donor = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def first(members: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weights of the first member."""
    return members[0]


def last(members: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weights of the last member."""
    return members[-1]


def mean(members: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of all members, accumulated in fp32 at least and rounded once."""
    dtype = torch.promote_types(members[0].dtype, torch.float32)
    total = torch.zeros_like(members[0], dtype=dtype)
    for member in members:
        total += member.to(total.device, dtype)
    return (total / len(members)).to(members[0].dtype)


DONORS: dict[str, Donor] = {"first": first, "last": last, "mean": mean}

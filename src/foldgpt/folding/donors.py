"""Donors: how the weights that a group shares are made from those of its members."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

#: Takes one parameter of every member, in order of depth and of equal shape; returns the shared one.
Donor = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def mean(members: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of all members, accumulated in fp32 at least and rounded once."""
    dtype = torch.promote_types(members[0].dtype, torch.float32)
    total = torch.zeros_like(members[0], dtype=dtype)
    for member in members:
        total += member.to(total.device, dtype)
    return (total / len(members)).to(members[0].dtype)


#: Donor by its name in a plan; of the others one member gives its own weights, or they are fitted on a text.
DONORS: dict[str, Donor] = {"mean": mean}

"""What fitting a group comes to: shared weights, and for each member the terms that are private to its position.

This is all that passes from the maths of sharing to folding: `fold_(model, plan, fits)` writes it into the model.

A leaf (a linear layer, say) with shared weight W and bias b computes at a member's position

    y = s ∘ (W x + b) + U D x

with the member's own scale s and low-rank term U D. Scales stand only on the leaves that `scale_leaves` names,
low-rank terms only on those that `low_rank_leaves` names; `Group.rank_of` says how large they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A low-rank term U D, fp32.

    Attributes:
        up_OR: U, outputs × rank.
        down_RI: D, rank × inputs.
    """

    up_OR: Tensor
    down_RI: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.down_RI.shape[0]


@dataclass(frozen=True)
class MemberFit:
    """What is private to the position of one member, fp32. What is left out stays as it would be without a fit.

    Attributes:
        scales: leaf → s, one for each output [O].
        low_rank: leaf → U D.
        norms: name of a parameter inside the block → its new value, of the shape it has. Any parameter of the block
            that the group does not share may stand here, such as a norm's weight that takes in a scale of the
            inputs of the matrices behind it.
    """

    scales: Mapping[str, Tensor] = field(default_factory=dict)
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupFit:
    """The fit of one group. Names are those inside a block, such as "self_attn.q_proj" or "mlp.up_proj.weight".

    Attributes:
        weights: name of a shared parameter → its value, fp32, of the shape it has. Parameters that are left out are
            made as the group's donor says.
        members: source index → what is private to that member.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    members: Mapping[int, MemberFit] = field(default_factory=dict)

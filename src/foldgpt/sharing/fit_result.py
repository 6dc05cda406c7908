"""What fitting the groups of a plan came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from foldgpt.artifacts import without_infinity
from foldgpt.folding.fitted import GroupFit
from foldgpt.plan import Sublayer

#: The file beside a folded model that says what the fits of shared weights did.
SHARING = "sharing.json"


@dataclass(frozen=True)
class SublayerReport:
    """How well the private terms of one sublayer at one position fit.

    Attributes:
        sublayer: which.
        rank: of the output layer's low-rank term.
        before: squared error of what the position adds to the stream over that of adding nothing, as it starts.
        after: with the fit; both on tokens that the ridge was chosen on and nothing else.
    """

    sublayer: Sublayer
    rank: int
    before: float
    after: float


@dataclass(frozen=True)
class MemberReport:
    """What fitting one member of a group came to.

    Attributes:
        group: number of the group in the plan, of its first sublayer.
        block: source index.
        kept: whether the fit was kept.
        kl_before: mean KL(source ‖ folded so far) in nats per token on held-out windows, without this member's fit.
        kl_after: with it.
        sublayers: the fits.
    """

    group: int
    block: int
    kept: bool
    kl_before: float
    kl_after: float
    sublayers: tuple[SublayerReport, ...]


@dataclass(frozen=True)
class SharingFit:
    """The fits of all groups of a plan, and what they came to.

    Attributes:
        fits: number of the group → its fit, for `fold_`.
        members: one report for each member that has something private, in order of depth.
        kl: mean KL(source ‖ folded) on the held-out windows, as it will be folded.
        num_tokens: tokens fitted on.
        num_held_out: tokens judged on.
        passes: forward passes over all windows that it took.
    """

    fits: Mapping[int, GroupFit]
    members: tuple[MemberReport, ...]
    kl: float
    num_tokens: int
    num_held_out: int
    passes: float

    def to_json_dict(self) -> dict[str, Any]:
        """Figures alone, without the weights; None for those that are not finite, which JSON cannot hold."""
        figures: dict[str, Any] = without_infinity(
            {
                "kl": self.kl,
                "num_tokens": self.num_tokens,
                "num_held_out": self.num_held_out,
                "passes": self.passes,
                "members": [asdict(member) for member in self.members],
            }
        )
        return figures

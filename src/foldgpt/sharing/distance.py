"""How far blocks are from each other as donors: what one block's weights do to another's inputs.

Two measures. `weight_distances` is read off the second moments in one pass: the error of each layer's outputs if it
had the other block's weights, relative to the outputs. `SharingCost` is the truth at a higher price: the KL to the
source of a model in which one block borrows from another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from foldgpt.families import Decoder
from foldgpt.folding import same_kind
from foldgpt.objectives import Head, SourcePredictions
from foldgpt.plan import SUBLAYERS, Sublayer
from foldgpt.progress import bar
from foldgpt.replay import Replay
from foldgpt.sharing.covariance import input_moments
from foldgpt.sharing.donors import relative_error
from foldgpt.sharing.linears import linears_of, weight_of
from foldgpt.sharing.student import Position, Student

Part = Literal["attention", "mlp", "both"]

#: Positions at most at which predictions are compared, the same for all pairs; with a large vocabulary the head would
#: take most of the time, and what counts is the order of the pairs.
_MOST_POSITIONS = 512


@torch.no_grad()
def weight_distances(replay: Replay, *, reach: int | None = None) -> dict[Part, Tensor]:
    """Relative output errors of each block's layers under the weights of each other one, from moments alone.

    Entry [d, m] is the mean over layers of tr((W_d − W_m) C_m (W_d − W_m)ᵀ) / tr(W_m C_m W_mᵀ), with C_m the second
    moments of the inputs of block m: 0 for equal weights, about 2 for unrelated ones. Blocks of different kinds are
    infinitely far apart.

    Args:
        replay: the source; `boundaries=[0]` is enough.
        reach: leave out pairs that are more than so many blocks apart; they count as infinitely far.

    Returns:
        For attention, MLP and both, fp64 [N, N] (donor, member).
    """
    decoder = replay.decoder
    num_blocks = replay.num_blocks
    parts: dict[Part, Tensor] = {
        "attention": torch.full((num_blocks, num_blocks), float("inf"), dtype=torch.float64),
        "mlp": torch.full((num_blocks, num_blocks), float("inf"), dtype=torch.float64),
    }
    with bar("distances", num_blocks) as progress:
        for member, moments in input_moments(replay, range(num_blocks)):
            for sublayer in SUBLAYERS:
                names = [linear.name for linear in linears_of(decoder, member, (sublayer,))]
                for donor in _donors(decoder, member, sublayer, reach):
                    errors = [
                        relative_error(
                            weight_of(decoder.blocks[donor].get_submodule(name)),
                            weight_of(decoder.blocks[member].get_submodule(name)),
                            moments[name],
                        )
                        for name in names
                    ]
                    parts[sublayer][donor, member] = sum(errors) / len(errors)
                parts[sublayer][member, member] = 0
            progress.advance()
    parts["both"] = (parts["attention"] + parts["mlp"]) / 2
    return parts


class SharingCost:
    """Measured costs of sharing: KL(source ‖ model in which some blocks borrow the weights of others).

    Args:
        replay: the source, with all states.
        num_batches: micro-batches to measure on, from the first; all by default.
        seed: seed of the positions at which predictions are compared.
    """

    def __init__(self, replay: Replay, *, num_batches: int | None = None, seed: int = 0) -> None:
        self.replay = replay
        self.student = Student(replay)
        self.batches = list(replay.batches())[:num_batches]
        num_tokens = sum(rows.stop - rows.start for rows in self.batches) * replay.ids_WT.shape[1]
        generator = torch.Generator().manual_seed(seed)
        self._rows_R = torch.randperm(num_tokens, generator=generator)[:_MOST_POSITIONS].sort().values
        self._source = SourcePredictions(
            Head(replay.model), self._finished([replay.end_WTH[rows] for rows in self.batches])
        )

    @torch.no_grad()
    def pair(self, donor: int, member: int, sublayers: Sequence[Sublayer] = SUBLAYERS) -> float:
        """The cost of one block's sublayers having another's weights, its norms being its own, in nats per token."""
        if donor == member:
            return 0.0
        decoder = self.replay.decoder
        lent = {
            linear.name: decoder.blocks[donor].get_submodule(linear.name)
            for linear in linears_of(decoder, member, sublayers)
        }
        self.student.positions = {member: Position(lent)}
        later = range(member, self.replay.num_blocks)
        ends = [self.student.run(self.replay.states[member][rows], later) for rows in self.batches]
        return float(self._source.kl(self._finished(ends)).mean())

    def pairs(self, blocks: Sequence[int], *, reach: int, sublayers: Sequence[Sublayer] = SUBLAYERS) -> Tensor:
        """The cost of every pair of some blocks of one kind that are at most `reach` places apart among them.

        Args:
            blocks: source indices, increasing.
            reach: as places in `blocks`.
            sublayers: what is shared.

        Returns:
            fp64 [N, N] (donor, member) by source index, infinite where nothing was measured and 0 on the diagonal.
        """
        num_blocks = self.replay.num_blocks
        costs = torch.full((num_blocks, num_blocks), float("inf"), dtype=torch.float64)
        costs.fill_diagonal_(0)
        wanted = [
            (donor, member)
            for place, member in enumerate(blocks)
            for donor in blocks[max(0, place - reach) : place + reach + 1]
            if donor != member and same_kind(self.replay.decoder, donor, member, sublayers)
        ]
        with bar("pairs", len(wanted)) as progress:
            for donor, member in wanted:
                costs[donor, member] = self.pair(donor, member, sublayers)
                progress.advance()
        return costs

    def _finished(self, streams: Sequence[Tensor]) -> Tensor:
        """Inputs of the head [R, H] at the chosen positions. What follows the last block acts token by token."""
        hidden_RH = torch.cat([stream.flatten(0, 1) for stream in streams])[self._rows_R]
        return self.replay.finish(hidden_RH[None])[0]


def _donors(decoder: Decoder, member: int, sublayer: Sublayer, reach: int | None) -> list[int]:
    return [
        donor
        for donor in range(len(decoder.blocks))
        if donor != member
        and (reach is None or abs(donor - member) <= reach)
        and same_kind(decoder, donor, member, (sublayer,))
    ]

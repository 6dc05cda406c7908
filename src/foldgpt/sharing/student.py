"""The model that is being folded, block by block: the source's blocks with some modules and parameters exchanged.

A fit needs the stream that the folded model will have long before there is a folded model. So each position that
differs from its source block is described by what stands in for what, put in place for the length of a call, and taken
out again: the source stays as it was, and no weights are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from foldgpt.folding.fitted import LowRank
from foldgpt.modeling.modeling_foldgpt import PrivateTerms
from foldgpt.plan import Sublayer
from foldgpt.replay import Replay
from foldgpt.sharing.linears import weight_of


@dataclass(frozen=True)
class Position:
    """What is exchanged in one block.

    Attributes:
        modules: name inside the block → what stands there instead.
        parameters: name inside the block → its value instead.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)


class Student:
    """Calls blocks as the folded model would.

    Args:
        replay: the source on the calibration windows.
        absent: blocks that lose a sublayer.

    Attributes:
        positions: source index → what is exchanged there; may be changed at any time.
        absent: source index → the sublayer that is missing there; likewise.
    """

    def __init__(self, replay: Replay, absent: Mapping[int, Sublayer] | None = None) -> None:
        self.replay = replay
        self.positions: dict[int, Position] = {}
        self.absent: dict[int, Sublayer] = dict(absent or {})

    def block(self, index: int, hidden_BTH: Tensor) -> Tensor:
        """What the position of block `index` makes of a stream [B, T, H]."""
        with exchanged(self.replay.decoder.blocks[index], self.positions.get(index, Position())):
            return self.replay.block(index, hidden_BTH, without=self.absent.get(index))

    def run(self, hidden_BTH: Tensor, blocks: Sequence[int]) -> Tensor:
        """Pass a stream [B, T, H] through the positions of the given blocks in order."""
        for index in blocks:
            hidden_BTH = self.block(index, hidden_BTH)
        return hidden_BTH


@contextmanager
def exchanged(block: nn.Module, position: Position) -> Iterator[nn.Module]:
    """The block while what a position says is in it."""
    modules = {name: block.get_submodule(name) for name in position.modules}
    values = {name: block.get_parameter(name).data for name in position.parameters}
    try:
        for name, value in position.parameters.items():
            block.get_parameter(name).data = value.to(values[name])
        for name, module in position.modules.items():
            block.set_submodule(name, module)
        yield block
    finally:
        for name, module in modules.items():
            block.set_submodule(name, module)
        for name, value in values.items():
            block.get_parameter(name).data = value


def linear_like(leaf: nn.Module, weight_OI: Tensor, bias_O: Tensor | None) -> nn.Module:
    """A linear layer with another weight and bias, of a leaf's kind and dtype, on its device."""
    own = weight_of(leaf)
    made = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
    made.weight = nn.Parameter(weight_OI.to(own), requires_grad=False)
    if bias_O is not None:
        made.bias = nn.Parameter(bias_O.to(own), requires_grad=False)
    return made


def with_terms(shared: nn.Module, *, scale_O: Tensor | None = None, low_rank: LowRank | None = None) -> nn.Module:
    """A linear layer with a scale and a low-rank term beside it, in the layer's own dtype."""
    if scale_O is None and low_rank is None:
        return shared
    weight = weight_of(shared)
    outputs, inputs = weight.shape
    rank = 0 if low_rank is None else low_rank.rank
    terms = PrivateTerms(shared, inputs=inputs, outputs=outputs, rank=rank, scale=scale_O is not None)
    if scale_O is not None:
        terms.scale = nn.Parameter(scale_O.to(weight), requires_grad=False)
    if low_rank is not None:
        terms.up = nn.Parameter(low_rank.up_OR.to(weight), requires_grad=False)
        terms.down = nn.Parameter(low_rank.down_RI.to(weight), requires_grad=False)
    return terms

"""The linear layers of a block, which are what a fit works on: their weights as [outputs, inputs]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from foldgpt.errors import UnsupportedModelError
from foldgpt.families import Decoder
from foldgpt.folding.kinds import output_parameter, shareable_leaves, sublayer_modules
from foldgpt.plan import SUBLAYERS, Sublayer


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block.

    Attributes:
        name: its name inside the block, e.g. "mlp.down_proj".
        sublayer: the sublayer it belongs to.
        writes: whether it makes the sublayer's output; the others read the stream or what is made of it.
    """

    name: str
    sublayer: Sublayer
    writes: bool


def linears_of(decoder: Decoder, index: int, sublayers: Sequence[Sublayer] = SUBLAYERS) -> list[Linear]:
    """The linear layers of block `index` in the given sublayers, in order.

    Args:
        decoder: the model.
        index: the block.
        sublayers: which.

    Raises:
        UnsupportedModelError: the family's sublayers are not known, or one of them holds shareable parameters that
            are not plain linear layers (the experts of a mixture).
    """
    block = decoder.blocks[index]
    found = []
    for sublayer in sublayers:
        sublayer_modules(decoder, index, sublayer)  # refuses families without an entry
        for name in shareable_leaves(decoder, index, (sublayer,)):
            module = block.get_submodule(name)
            if not is_linear(module):
                raise UnsupportedModelError(
                    f"{name} in block {index} is a {type(module).__name__}, not a linear layer: its {sublayer} can be "
                    "shared as it is, but nothing can be fitted for it"
                )
            found.append(Linear(name, sublayer, output_parameter(sublayer, name, module) is not None))
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input with one matrix, and perhaps adds a bias."""
    return type(module).__name__ in ("Linear", "Conv1D") and isinstance(getattr(module, "weight", None), nn.Parameter)


def weight_of(module: nn.Module) -> Tensor:
    """A linear layer's weight as [outputs, inputs]; GPT-2's Conv1D keeps it the other way round."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight.data.T if type(module).__name__ == "Conv1D" else weight.data

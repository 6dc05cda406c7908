"""Which matrices can carry a correction: those that make a sublayer's output, and what stands behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foldgpt.compensation.correction import Correction
from foldgpt.errors import UnsupportedModelError
from foldgpt.families import OUTPUT_MATRICES, Decoder
from foldgpt.families.plain import is_plain
from foldgpt.folding.kinds import output_bias, output_parameter, sublayer_modules
from foldgpt.plan import Sublayer


@dataclass(frozen=True)
class OutputMatrix:
    """One matrix that makes a sublayer's output, or one parameter that holds those of all experts.

    Attributes:
        weight: [H, I], [I, H] if transposed, with the experts in front if there are several.
        bias: [H], or None.
        transposed: whether the output runs along the last dimension (GPT-2's Conv1D).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool

    @torch.no_grad()
    def corrected(self, correction: Correction, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias that make M + X D + b of M, in `dtype`."""
        weight = self.weight.to(dtype)
        map_KH = correction.map_KH.to(weight)
        inner = correction.features == "inner"
        if inner:
            weight = weight + (map_KH if self.transposed else map_KH.T)
        else:
            weight = weight + (weight @ map_KH if self.transposed else map_KH.T @ weight)
        if self.bias is None:
            return weight, None
        bias = self.bias.to(weight)
        if not inner:
            bias = bias + bias @ map_KH
        return weight, bias if correction.bias_H is None else bias + correction.bias_H.to(bias)


def output_module(decoder: Decoder, index: int, sublayer: Sublayer) -> nn.Module:
    """The module of block `index` that returns the sublayer's output.

    Raises:
        UnsupportedModelError: the family's sublayers are not known.
    """
    return decoder.blocks[index].get_submodule(sublayer_modules(decoder, index, sublayer)[-1])


def norm_behind(decoder: Decoder, index: int, sublayer: Sublayer) -> nn.Module | None:
    """The norm between a sublayer's output and the residual stream, if the family has one there."""
    name = None if decoder.sublayers is None else decoder.sublayers.norm_behind(sublayer)
    return None if name is None else decoder.blocks[index].get_submodule(name)


def output_matrices(decoder: Decoder, index: int, sublayer: Sublayer, module: nn.Module) -> list[OutputMatrix]:
    """The matrices that make what `module` returns.

    Args:
        decoder: the model.
        index: the block, for the message.
        sublayer: which sublayer `module` is the output of.
        module: what `output_module` gives, or a copy of it.

    Raises:
        UnsupportedModelError: the family's sublayers are not known, there are none with a known name, or they are not
            plain matrices in memory.
    """
    found = _matrices(module, sublayer_modules(decoder, index, sublayer)[-1], sublayer)
    place = f"the {sublayer} of block {index} of model type {decoder.model_type!r}"
    if not found:
        known = ", ".join(sorted(OUTPUT_MATRICES[sublayer]))
        raise UnsupportedModelError(f"{place} has no output matrix of a known name ({known}); it cannot be corrected")
    for matrix in found:
        if matrix.weight.is_meta or not is_plain(matrix.weight):
            raise UnsupportedModelError(f"{place} is offloaded or quantised; correct the plain model in memory first")
    return found


def inner_width(decoder: Decoder, index: int, sublayer: Sublayer) -> int | None:
    """How much the sublayer's one output matrix is given for each token; None for several. Nothing has to be in memory.

    Raises:
        UnsupportedModelError: the family's sublayers are not known.
    """
    module = output_module(decoder, index, sublayer)
    matrices = _matrices(module, sublayer_modules(decoder, index, sublayer)[-1], sublayer)
    if len(matrices) != 1 or matrices[0].weight.ndim != 2:
        return None
    return matrices[0].weight.shape[0 if matrices[0].transposed else 1]


def _matrices(root: nn.Module, root_name: str, sublayer: Sublayer) -> list[OutputMatrix]:
    matrices = []
    for path, module in root.named_modules():
        found = output_parameter(sublayer, path or root_name, module)
        if found is not None:
            name, dimension = found
            matrices.append(OutputMatrix(module.get_parameter(name), output_bias(module, name), dimension == -1))
    return matrices


def inner_module(module: nn.Module, matrices: Sequence[OutputMatrix]) -> nn.Module | None:
    """The module inside (or equal to) `module` whose input the one output matrix multiplies; None for several.

    Args:
        module: what `output_module` gives.
        matrices: its output matrices.
    """
    if len(matrices) != 1 or matrices[0].weight.ndim != 2:
        return None
    return next(m for m in module.modules() if any(p is matrices[0].weight for p in m.parameters(recurse=False)))

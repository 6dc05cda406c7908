"""Writing corrections into the weights: the same matrices, changed; nothing is added."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from foldgpt.compensation.carriers import inner_module, norm_behind, output_matrices, output_module
from foldgpt.compensation.correction import Correction
from foldgpt.errors import UnsupportedModelError, UsageError
from foldgpt.families import Decoder, decoder_of
from foldgpt.families.norms import weight_for

#: How far the merged module may be from the corrected one on random inputs, in fp32, relative to its output.
_TOLERANCE = 1e-3


@torch.no_grad()
def merge_(model: nn.Module, corrections: Mapping[int, Correction]) -> None:
    """Merge corrections into a model in place, before it is folded.

    Products are made in fp32 (fp64 for a model in fp64) and cast once. Each changed module is tried on random
    inputs before anything is written: a model that is refused is as it was.

    Args:
        model: the source that the corrections were fitted for, not yet folded.
        corrections: source index → correction, as `compensate` returns them.

    Raises:
        UsageError: the corrections are for a model of another shape, or the model is folded already.
        UnsupportedModelError: the matrices cannot be found, or do not act as expected.
    """
    decoder = decoder_of(model)
    if getattr(model.config, "fold_layout", None) is not None:
        raise UsageError("this model is folded already; corrections are merged before folding")
    written: list[tuple[nn.Parameter, Tensor]] = []
    for index, correction in corrections.items():
        if not 0 <= index < len(decoder.blocks):
            raise UsageError(f"there is a correction for block {index}; the model has {len(decoder.blocks)} blocks")
        written += _merged(decoder, index, correction)
    for parameter, value in written:
        parameter.copy_(value)


@contextmanager
def merged(model: nn.Module, corrections: Mapping[int, Correction]) -> Iterator[None]:
    """The model with corrections merged; afterwards its parameters are what they were.

    Args:
        model: as for `merge_`.
        corrections: likewise.

    Raises:
        UsageError: as `merge_` says.
        UnsupportedModelError: likewise.
    """
    own = values_of_carriers(model, corrections)
    try:
        merge_(model, corrections)
        yield
    finally:
        set_parameters_(model, own)


def values_of_carriers(model: nn.Module, corrections: Mapping[int, Correction]) -> dict[str, Tensor]:
    """Copies of all parameters of the blocks that carry a correction, by name."""
    path = decoder_of(model).blocks_path
    prefixes = tuple(f"{path}.{index}." for index in corrections)
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.startswith(prefixes)}


@torch.no_grad()
def set_parameters_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters these values, by name."""
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def _merged(decoder: Decoder, index: int, correction: Correction) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter of block `index` that changes, and its new value in the parameter's dtype."""
    module = output_module(decoder, index, correction.sublayer)
    matrices = output_matrices(decoder, index, correction.sublayer, module)
    weight = matrices[0].weight
    outputs = weight.shape[-1 if matrices[0].transposed else -2]
    wanted = (weight.numel() // outputs if correction.features == "inner" else outputs, outputs)
    if correction.map_KH.shape != wanted:
        raise UsageError(
            f"the correction of block {index} is {list(correction.map_KH.shape)}, but its {correction.sublayer} needs "
            f"{list(wanted)}. Was it fitted on another model?"
        )
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    written: list[tuple[nn.Parameter, Tensor]] = []
    trial = copy.deepcopy(module).to(dtype)
    inner_RI, before_RH = _tried(decoder, index, correction, trial, outputs)
    for own, tried in zip(matrices, output_matrices(decoder, index, correction.sublayer, trial), strict=True):
        new_weight, new_bias = tried.corrected(correction, dtype)
        written.append((own.weight, new_weight.to(own.weight.dtype)))
        tried.weight.copy_(new_weight)
        if own.bias is not None and tried.bias is not None and new_bias is not None:
            written.append((own.bias, new_bias.to(own.bias.dtype)))
            tried.bias.copy_(new_bias)
    features_RK = inner_RI if correction.features == "inner" else before_RH
    expected_RH = before_RH + features_RK @ correction.map_KH.to(before_RH)
    if correction.bias_H is not None:
        expected_RH += correction.bias_H.to(before_RH)
    _, after_RH = _tried(decoder, index, correction, trial, outputs)
    missed = torch.linalg.vector_norm(after_RH - expected_RH)
    if not missed <= _TOLERANCE * torch.linalg.vector_norm(expected_RH):
        raise UnsupportedModelError(
            f"the {correction.sublayer} of block {index} of model type {decoder.model_type!r} does not end in the "
            "matrices that foldgpt knows; its correction cannot be merged."
        )
    norm = norm_behind(decoder, index, correction.sublayer)
    if correction.scale_H is not None:
        if norm is None:
            raise UsageError(f"the correction of block {index} is for a norm that this model does not have")
        written.append((norm.weight, weight_for(norm, correction.scale_H)))  # type: ignore[arg-type]
    return written


def _tried(
    decoder: Decoder, index: int, correction: Correction, module: nn.Module, num_outputs: int
) -> tuple[Tensor, Tensor]:
    """Let a sublayer's module, in fp32 or fp64, work on some random rows.

    An attention cannot be called without its masks and positions; there the projection alone is tried.

    Returns:
        What its output matrix was given, [R, I] (meaningless if there are several), and what came out, [R, H].
    """
    matrices = output_matrices(decoder, index, correction.sublayer, module)
    holder = inner_module(module, matrices)
    if correction.sublayer == "attention" and holder is not None:
        module = holder
    num_inputs = matrices[0].weight.numel() // num_outputs if module is holder else num_outputs
    generator = torch.Generator().manual_seed(0)
    rows_BTH = torch.randn((1, 16, num_inputs), generator=generator).to(matrices[0].weight)
    given: list[Tensor] = [rows_BTH]
    watched = module if holder is None else holder
    handle = watched.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    try:
        output: Tensor = module(rows_BTH)
    finally:
        handle.remove()
    return given[-1].flatten(0, -2), output.flatten(0, -2)

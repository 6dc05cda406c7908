"""What can be shared between blocks, and what can stand beside it: leaf modules with matrices, by kind and shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from torch import nn
from transformers.pytorch_utils import Conv1D

from foldgpt.errors import PlanError, UnsupportedModelError
from foldgpt.families import OUTPUT_MATRICES, Decoder
from foldgpt.plan import SUBLAYERS, Sublayer

#: Config fields with one entry per block that make blocks of equal shape compute different things.
_KIND_FIELDS: dict[Sublayer, tuple[str, ...]] = {
    "attention": (
        "layer_types",
        "layers_block_type",
        "attention_layers",
        "no_rope_layers",
        "layer_rope_theta",
    ),
    "mlp": ("mlp_layer_types", "activation_sparsity_pattern"),
}


def sublayer_modules(decoder: Decoder, index: int, sublayer: Sublayer) -> tuple[str, ...]:
    """Names inside block `index` of the modules of one sublayer; the last one returns its output.

    Raises:
        UnsupportedModelError: the family has no entry, so its sublayers are not known.
    """
    if decoder.sublayers is None:
        raise UnsupportedModelError(
            f"the sublayers of model type {decoder.model_type!r} are not known (with this config), so its blocks can "
            "be removed and shared whole, but not attention and MLP apart, and what is removed cannot be compensated. "
            "Add a row to foldgpt/families/table.py, or switch off what needs them."
        )
    return decoder.modules(index, sublayer)


def shareable_leaves(decoder: Decoder, index: int, sublayers: Sequence[Sublayer]) -> list[str]:
    """Names, inside block `index`, of the leaf modules that a group can share in the given sublayers.

    A leaf is the outermost module that itself holds a parameter of two or more dimensions (a linear layer,
    the experts of a mixture, a router). Norms and other vectors stay private.
    """
    block = decoder.blocks[index]
    if set(sublayers) == set(SUBLAYERS) and decoder.sublayers is None:
        roots = [name for name, _ in block.named_children()]
    else:
        roots = [name for sublayer in sublayers for name in sublayer_modules(decoder, index, sublayer)]
    return [leaf for root in roots for leaf in _leaves(block.get_submodule(root), root)]


def _leaves(module: nn.Module, name: str) -> list[str]:
    # Of norms with a weight for each head (Cohere), and of short convolutions, whose weight the model reads past the
    # module and so past what moves it to its device, each position keeps its own.
    if "Norm" in type(module).__name__ or isinstance(module, nn.Conv1d):
        return []
    if any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):
        return [name]
    return [leaf for child, sub in module.named_children() for leaf in _leaves(sub, f"{name}.{child}")]


def low_rank_leaves(decoder: Decoder, index: int, sublayers: Sequence[Sublayer]) -> list[str]:
    """The shareable leaves of block `index` that a low-rank term can stand beside: linear layers.

    Not those of one output, such as the gate of a shared expert: a term of rank 1 would be all of it.
    """
    block = decoder.blocks[index]
    leaves = {name: block.get_submodule(name) for name in shareable_leaves(decoder, index, sublayers)}
    return [name for name, leaf in leaves.items() if is_linear_layer(leaf) and min(leaf.weight.shape) > 1]


def is_linear_layer(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a module is a linear layer, and none that is derived from one and puts out something else than a product.

    So do routers, which put out their choice (PhiMoE, Llama 4), and layers in groups (DeepSeek V4).
    """
    is_derived = any(word in type(module).__name__ for word in ("Router", "Grouped"))
    return isinstance(module, (nn.Linear, Conv1D)) and not is_derived


def scale_leaves(decoder: Decoder, index: int, sublayers: Sequence[Sublayer]) -> list[str]:
    """The shareable leaves of block `index` whose outputs a private scale multiplies.

    A scale stands where what a sublayer makes joins the stream: on the leaves that the sublayer ends in, such as
    `self_attn.o_proj` and `mlp.down_proj`. Where a norm stands behind the sublayer (Gemma, OLMo 2) there is no such
    leaf: the norm's weight is that scale, and private in any case.

    Raises:
        UnsupportedModelError: the family's sublayers are not known, or end in no matrix of a known name.
    """
    block = decoder.blocks[index]
    found: list[str] = []
    for sublayer in sublayers:
        modules = sublayer_modules(decoder, index, sublayer)
        assert decoder.sublayers is not None
        if decoder.sublayers.norm_behind(sublayer) is not None:
            continue
        ends = [
            leaf
            for root in modules
            for leaf in _leaves(block.get_submodule(root), root)
            if output_parameter(sublayer, leaf, block.get_submodule(leaf)) is not None
        ]
        if not ends:
            raise UnsupportedModelError(
                f"the {sublayer} of block {index} of model type {decoder.model_type!r} ends in no matrix of a known "
                f"name ({', '.join(sorted(OUTPUT_MATRICES[sublayer]))}); it can have no private scale"
            )
        found += ends
    return found


def output_parameter(sublayer: Sublayer, name: str, leaf: nn.Module) -> tuple[str, int] | None:
    """The parameter of a leaf that makes its sublayer's output, if there is one.

    Args:
        sublayer: whose leaf it is.
        name: the leaf's name inside the block, or any end of it.
        leaf: the leaf itself; only parameters that it holds itself count.

    Returns:
        The parameter's name inside the leaf, and its dimension along which the outputs run.
    """
    names = OUTPUT_MATRICES[sublayer]
    own = [key for key, _ in leaf.named_parameters(recurse=False)]
    # What only has the name may hold its matrix in another form (quantised), or be a container.
    if name.rpartition(".")[2] in names and "weight" in own:
        return "weight", -1 if isinstance(leaf, Conv1D) else -2
    for key in own:
        if key in names:  # the experts of a mixture as one parameter
            return key, -1 if getattr(leaf, "is_transposed", False) else -2
    return None


def output_bias(leaf: nn.Module, name: str) -> nn.Parameter | None:
    """The bias beside a leaf's matrix, if it has one.

    Args:
        leaf: the leaf.
        name: the matrix's name inside it: "weight", or that of the experts of a mixture, such as "down_proj".
    """
    bias: nn.Parameter | None = getattr(leaf, "bias" if name == "weight" else f"{name}_bias", None)
    return bias


def kind_of(decoder: Decoder, index: int, sublayers: Sequence[Sublayer]) -> dict[str, Any]:
    """All that two blocks must agree on to share the given sublayers, by name.

    Args:
        decoder: the source model.
        index: source index of the block.
        sublayers: what would be shared.
    """
    kind: dict[str, Any] = {}
    for sublayer in sublayers:
        for field in _KIND_FIELDS[sublayer]:
            per_block = getattr(decoder.config, field, None)
            if isinstance(per_block, (list, tuple)) and len(per_block) == len(decoder.blocks):
                kind[field] = per_block[index]
    block = decoder.blocks[index]
    for name in shareable_leaves(decoder, index, sublayers):
        leaf = block.get_submodule(name)
        shapes = {key: tuple(p.shape) for key, p in (*leaf.named_parameters(), *leaf.named_buffers())}
        kind[name] = (type(leaf).__name__, shapes)
    return kind


def same_kind(decoder: Decoder, first: int, second: int, sublayers: Sequence[Sublayer]) -> bool:
    """Whether two blocks can share the given sublayers."""
    return kind_of(decoder, first, sublayers) == kind_of(decoder, second, sublayers)


def check_group(decoder: Decoder, blocks: Sequence[int], sublayers: Sequence[Sublayer]) -> None:
    """Refuse a group of mixed kinds.

    Raises:
        PlanError: names the two blocks and what differs.
    """
    reference = kind_of(decoder, blocks[0], sublayers)
    for index in blocks[1:]:
        kind = kind_of(decoder, index, sublayers)
        for name in sorted(reference.keys() | kind.keys()):
            if reference.get(name) != kind.get(name):
                raise PlanError(
                    f"group {list(blocks)} mixes kinds: {name} is {reference.get(name)} in block {blocks[0]} and "
                    f"{kind.get(name)} in block {index}. Blocks that share weights must be of one kind and shape."
                )

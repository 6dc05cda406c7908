"""`fold_`: make a loaded model what its plan says, in place. `unfold_`: give every position its own weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from foldgpt.errors import PlanError, UnsupportedModelError
from foldgpt.families import (
    Decoder,
    attending_blocks,
    attention_kinds,
    brings_own_code,
    check_config,
    check_kept,
    decoder_of,
    first_of_each_kind,
    remap_config_,
)
from foldgpt.folding.fits import check_fits, check_start, check_weights, write_fit_
from foldgpt.folding.fitted import GroupFit, MemberFit
from foldgpt.folding.kinds import check_group, shareable_leaves, sublayer_modules
from foldgpt.folding.private import LeafTerms, check_mergeable, merged, terms_of_group, write_terms_
from foldgpt.modeling.configuration_foldgpt import folded_config_class
from foldgpt.modeling.modeling_foldgpt import (
    AUTO_MAP,
    LAYOUT_VERSION,
    apply_layout_,
    folded_model_class,
    give_back_,
)
from foldgpt.plan import FoldPlan, SourceModel

#: Attributes by which transformers' modules know their place in the KV cache.
_INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number")


def source_model_of(
    model: nn.Module, name: str | None = None, revision: str | None = None, fingerprint: str | None = None
) -> SourceModel:
    """What a plan needs to know of a loaded model.

    Args:
        model: a causal language model.
        name: how the user named it; the config's `name_or_path` by default.
        revision: its revision on the hub.
        fingerprint: identity of its files; see `foldgpt.sources.model_fingerprint`.
    """
    decoder = decoder_of(model)
    config: Any = model.config
    return SourceModel(
        model=name or config.name_or_path or type(model).__name__,
        revision=revision,
        model_type=decoder.model_type,
        num_blocks=len(decoder.blocks),
        fingerprint=fingerprint,
    )


def fold_(model: nn.Module, plan: FoldPlan, fits: Mapping[int, GroupFit] | None = None) -> None:
    """Fold a model in place: remove what the plan removes and let its groups share weights.

    Private terms that no fit speaks of begin without effect: what starts at zero then contributes nothing, and the
    model computes what that of `plan.at_start` does.

    Whole blocks removed: the model stays of its own class. Anything shared, or a sublayer removed: its class
    becomes `Folded<source class>`, a subclass of it. All checks come first: a model that is refused is as it
    was.

    Args:
        model: the source, a causal language model in full precision.
        plan: what to do.
        fits: index of a group in the plan → shared weights and private terms fitted for it.

    Raises:
        PlanError: the plan is for another model, or cannot be carried out on this one, or a fit is for another plan.
        UnsupportedModelError: the model has something that depends on the block index and has no rule, its config
            names a quantiser, or weights that are to be made are offloaded or quantised.
    """
    decoder = decoder_of(model)
    _check(decoder, plan)
    fits = fits or {}
    check_fits(decoder, plan, fits)
    for number, group in enumerate(plan.groups):
        check_weights(decoder, group, fits.get(number, GroupFit()))
    terms = [terms_of_group(decoder, group) for group in plan.groups]
    layout = _layout_of(decoder, plan, terms)  # while source indices still hold
    remap_config_(decoder.config, plan.kept)
    for number, group in enumerate(plan.groups):
        write_fit_(decoder, group, fits.get(number, GroupFit()))
    _keep_(decoder, plan.kept)
    _forget_unused_code_(model)
    if not plan.is_removal_only:
        apply_layout_(model, layout)
        _write_terms_(model, plan, terms, fits)
        _become_folded_(model, plan, layout)


def check_foldable(model: nn.Module, plan: FoldPlan) -> None:
    """What `fold_` would refuse of a model and a plan, before anything is fitted for it.

    Args:
        model: the source.
        plan: the plan; what it says is to be fitted is taken to be.

    Raises:
        PlanError: as `fold_`.
        UnsupportedModelError: likewise.
    """
    decoder = decoder_of(model)
    _check(decoder, plan)
    if plan.fitting is None:
        check_fits(decoder, plan, {})
    for group in plan.groups:
        check_weights(decoder, group, GroupFit())


def check_same_architecture(plan: FoldPlan, model_type: str, num_blocks: int, name: str) -> None:
    """Refuse to apply a plan to a model that its config alone shows to be another one.

    Args:
        plan: the plan.
        model_type: of the model's decoder.
        num_blocks: of the model.
        name: what the message calls it.

    Raises:
        PlanError: it is of another architecture or depth than the plan's source.
    """
    if plan.source.num_blocks != num_blocks:
        raise PlanError(
            f"the plan is for a model of {plan.source.num_blocks} blocks ({plan.source.model}); {name} has {num_blocks}"
        )
    if plan.source.model_type != model_type:
        raise PlanError(
            f"the plan is for model type {plan.source.model_type!r} ({plan.source.model}); {name} is {model_type!r}"
        )


def unfold_(model: nn.Module) -> None:
    """Give every position weights of its own, in place: copies of what it borrows, its private terms merged into them.

    Sharing alone changes the logits not by a bit. Private terms are merged in fp64 and rounded once. A model without
    removed sublayers becomes one of the source's own class; one with them stays folded, by its plan without groups.

    Raises:
        PlanError: the model shares nothing.
        UnsupportedModelError: weights with private terms are quantised or offloaded; the model is as it was.
    """
    config: Any = model.config
    layout = getattr(config, "fold_layout", None)
    if layout is None:
        raise PlanError(f"this {type(model).__name__} shares no weights; there is nothing to unfold")
    decoder = decoder_of(model)
    private = [(decoder.blocks[entry["position"]], entry["module"]) for entry in layout.get("private", [])]
    for block, name in private:
        check_mergeable(block.get_submodule(name), name)
    for entry in layout["borrowed"]:
        for name in entry["modules"]:
            give_back_(decoder.blocks[entry["position"]], name)
    for block, name in private:
        block.set_submodule(name, merged(block.get_submodule(name), name))
    if layout["absent"]:
        config.fold_layout = {**layout, "borrowed": [], "private": []}
        config.fold_plan = {**config.fold_plan, "groups": [], "fitting": None}
        return
    config.__class__ = type(config).__mro__[1]
    # Read from a file it stands in the config itself, in front of the class's own.
    config.__dict__.pop("model_type", None)
    # What folding said of the names in files holds no longer.
    model.__dict__.pop("_weight_conversions", None)
    for name in ("fold_layout", "fold_plan", "source_model_type", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    model.__class__ = type(model).__mro__[2]


def predicted_parameters(model: nn.Module, plan: FoldPlan) -> int:
    """Unique parameters that the folded model will have.

    Args:
        model: the source, not yet folded.
        plan: the plan.
    """
    decoder = decoder_of(model)
    _check_plan(decoder, plan)
    total = sum(parameter.numel() for parameter in model.parameters())
    for index in plan.removed:
        total -= _count(decoder.blocks[index])
    gone = _absent_modules(decoder, plan)
    for index, (zeroed, passed_through) in gone.items():
        total -= sum(_count(decoder.blocks[index].get_submodule(name)) for name in (*zeroed, *passed_through))
    for group in plan.groups:
        total += sum(entry.num_parameters for entry in terms_of_group(decoder, group))
        for index in group.blocks:
            if index != group.holder:
                names = shareable_leaves(decoder, index, group.sublayers)
                total -= sum(_count(decoder.blocks[index].get_submodule(name)) for name in names)
    return total


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check(decoder: Decoder, plan: FoldPlan) -> None:
    _check_plan(decoder, plan)
    _check_in_memory(decoder, plan)
    for group in plan.groups:
        check_start(decoder, group)


def _check_plan(decoder: Decoder, plan: FoldPlan) -> None:
    if (layout := getattr(decoder.model.config, "fold_layout", None)) is not None:
        if layout["absent"]:
            raise PlanError("sublayers of this model are removed already; fold the source itself, by one plan")
        raise PlanError("this model is folded already; fold its source by one plan, or unfold_ it first (in Python)")
    check_same_architecture(plan, decoder.model_type, len(decoder.blocks), f"this {type(decoder.model).__name__}")
    # Saved, it would have the weights looked for in the quantiser's format.
    if getattr(decoder.model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"the config of this {type(decoder.model).__name__} says that it is quantised (quantization_config). Fold "
            "full-precision weights and quantise the result; if it was dequantised since, delete that field first"
        )
    check_config(decoder.config)
    check_kept(decoder.config, plan.kept)
    if not plan.is_removal_only and brings_own_code(decoder.model):
        raise UnsupportedModelError(
            f"{type(decoder.model).__name__} comes with code of its own: whole blocks can be removed, but sharing and "
            "removing sublayers build on transformers' own classes"
        )
    for group in plan.groups:
        check_group(decoder, group.blocks, group.sublayers)
    _check_first_attention(decoder, plan)


def _check_in_memory(decoder: Decoder, plan: FoldPlan) -> None:
    """Donors are made of weights, and offloaded blocks have none to read."""
    for group in plan.groups:
        if any(parameter.is_meta for index in group.blocks for parameter in decoder.blocks[index].parameters()):
            raise UnsupportedModelError(
                f"the weights of blocks {list(group.blocks)} are offloaded; "
                "load the whole model in memory to share them"
            )


def _check_first_attention(decoder: Decoder, plan: FoldPlan) -> None:
    """The KV cache's length is read from the first block of each attention type, so that one must attend.

    Blocks of other kinds (convolutions, linear attention) have no length to read.
    """
    kinds = attention_kinds(decoder.config)
    attending = attending_blocks(kinds)
    if attending and not set(attending) & set(plan.kept):
        raise PlanError(
            "cannot remove all blocks that attend: transformers reads the length of the KV cache from one of them. "
            f"Keep at least one of {attending}."
        )
    for index in plan.removed_attention:
        if decoder.sublayers is not None and not decoder.attends(index):
            (mixer,) = decoder.modules(index, "attention")
            raise PlanError(
                f"cannot remove the attention of block {index}: it has none, but {mixer} in its place, which can only "
                "go with its block"
            )
    for kind, index in first_of_each_kind(kinds, plan.kept).items():
        if index in plan.removed_attention:
            raise PlanError(
                f"cannot remove the attention of block {index}: it is the first kept block with {kind}, from which "
                "transformers reads the length of the KV cache. Remove the whole block, or another attention."
            )


def _absent_modules(decoder: Decoder, plan: FoldPlan) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Source index → (modules replaced by zero, modules replaced by the identity) for removed sublayers."""
    absent: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for index, sublayer in plan.absent_sublayers.items():
        *before, output = sublayer_modules(decoder, index, sublayer)
        assert decoder.sublayers is not None
        absent[index] = ((output,), (*before, *decoder.sublayers.norms(sublayer)))
    return absent


def _layout_of(decoder: Decoder, plan: FoldPlan, terms: list[list[LeafTerms]]) -> dict[str, Any]:
    """The layout (see `apply_layout_`) that a plan with these private terms gives its folded model."""
    position_of = plan.position_of
    borrowed = [
        {
            "position": position_of[index],
            "owner": position_of[group.holder],
            "modules": shareable_leaves(decoder, index, group.sublayers),
        }
        for group in plan.groups
        for index in group.blocks
        if index != group.holder
    ]
    private = [
        {
            "position": position_of[entry.block],
            "module": entry.leaf,
            "inputs": entry.inputs,
            "outputs": entry.outputs,
            "rank": entry.rank,
            "scale": entry.scale,
        }
        for of_group in terms
        for entry in of_group
    ]
    absent = [
        {
            "position": position_of[index],
            "returns_pair": list(zeroed) if index in plan.removed_attention else [],
            "returns_tensor": list(zeroed) if index in plan.removed_mlp else [],
            "passed_through": list(passed_through),
        }
        for index, (zeroed, passed_through) in _absent_modules(decoder, plan).items()
    ]
    return {
        "version": LAYOUT_VERSION,
        "blocks": decoder.blocks_path,
        "borrowed": borrowed,
        "private": private,
        "absent": absent,
    }


def _write_terms_(model: nn.Module, plan: FoldPlan, terms: list[list[LeafTerms]], fits: Mapping[int, GroupFit]) -> None:
    """Give the private terms of a folded model their first values."""
    blocks = decoder_of(model).blocks
    for number, (group, of_group) in enumerate(zip(plan.groups, terms, strict=True)):
        members = fits.get(number, GroupFit()).members
        for entry in of_group:
            module: Any = blocks[plan.position_of[entry.block]].get_submodule(entry.leaf)
            write_terms_(module, entry, members.get(entry.block, MemberFit()), zero=group.start == "zero")


def _keep_(decoder: Decoder, kept: tuple[int, ...]) -> None:
    """Drop all but the kept blocks and tell the rest their new place."""
    blocks = [decoder.blocks[index] for index in kept]
    for position, block in enumerate(blocks):
        for module in block.modules():
            for name in _INDEX_ATTRIBUTES:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, position)
    decoder.set_blocks(nn.ModuleList(blocks))


def _forget_unused_code_(model: nn.Module) -> None:
    """Drop what the config says of code of its own, where the model was loaded without it.

    That code is not saved with the model, and whoever trusts remote code would be sent to files that are not there.
    """
    config: Any = model.config
    if hasattr(config, "auto_map") and not brings_own_code(model):
        del config.auto_map


def _become_folded_(model: nn.Module, plan: FoldPlan, layout: dict[str, Any]) -> None:
    """Give a folded model the class and the config that save and load its structure."""
    config: Any = model.config
    model_type = config.model_type
    source_class: Any = type(model)
    config.__class__ = folded_config_class(model_type)
    config.source_model_type = model_type
    config.fold_plan = plan.to_json_dict()
    config.fold_layout = layout
    config.auto_map = dict(AUTO_MAP)
    model.__class__ = folded_model_class(source_class, model_type)

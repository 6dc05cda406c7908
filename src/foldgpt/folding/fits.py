"""Fits of groups: whether they go with plan and model, which is asked before anything is changed, and writing them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from foldgpt.errors import PlanError, UnsupportedModelError, did_you_mean
from foldgpt.families import Decoder
from foldgpt.families.norms import weight_for
from foldgpt.families.plain import is_plain
from foldgpt.folding.donors import DONORS
from foldgpt.folding.fitted import GroupFit, MemberFit
from foldgpt.folding.kinds import scale_leaves, shareable_leaves, sublayer_modules
from foldgpt.folding.private import LeafTerms, terms_of_group
from foldgpt.formats import dtype_name
from foldgpt.plan import SUBLAYERS, FoldPlan, Group


def check_fits(decoder: Decoder, plan: FoldPlan, fits: Mapping[int, GroupFit]) -> None:
    """Refuse fits that do not go with the plan.

    Args:
        decoder: the source.
        plan: the plan.
        fits: index of a group in the plan → its fit.

    Raises:
        PlanError: names the group, and what does not fit.
    """
    for number in fits:
        if not 0 <= number < len(plan.groups):
            raise PlanError(f"there is a fit for group {number}; the plan has {len(plan.groups)} groups")
    for number, group in enumerate(plan.groups):
        fit = fits.get(number, GroupFit())
        place = f"the fit of group {list(group.blocks)}"
        shared = _shared_parameters(decoder, group, group.holder)
        if group.donor == "least_squares" and (missing := sorted(shared.keys() - fit.weights.keys())):
            why = "the plan has no 'fitting', which says on which text" if plan.fitting is None else "there is no fit"
            raise PlanError(
                f"the weights of group {list(group.blocks)} are to be fitted (donor 'least_squares'), but {why} (of "
                f"{missing[0]})"
            )
        if group.start == "zero" and fit.weights:
            raise PlanError(f"{place} has shared weights; it starts at zero, so block {group.holder} keeps its own")
        _check_shapes(f"{place}: shared weight", fit.weights, {name: tuple(p.shape) for name, p in shared.items()})
        terms = terms_of_group(decoder, group)
        for index, member in fit.members.items():
            if index not in (group.fitted_members if group.start == "zero" else group.blocks):
                raise PlanError(f"{place} has private values for block {index}, which has none in this group")
            of_member = {entry.leaf: entry for entry in terms if entry.block == index}
            _check_member(f"{place}, block {index}", decoder, group, index, member, of_member)


def _check_member(
    place: str, decoder: Decoder, group: Group, index: int, member: MemberFit, terms: Mapping[str, LeafTerms]
) -> None:
    _check_shapes(f"{place}: scale", member.scales, {leaf: (t.outputs,) for leaf, t in terms.items() if t.scale})
    ups = {leaf: (t.outputs, t.rank) for leaf, t in terms.items() if t.rank}
    downs = {leaf: (t.rank, t.inputs) for leaf, t in terms.items() if t.rank}
    _check_shapes(f"{place}: up of the low-rank term", {n: term.up_OR for n, term in member.low_rank.items()}, ups)
    _check_shapes(f"{place}: down of the low-rank term", {n: t.down_RI for n, t in member.low_rank.items()}, downs)
    _check_shapes(
        f"{place}: norm", member.norms, {n: tuple(p.shape) for n, p in own_parameters(decoder, group, index).items()}
    )


def _check_shapes(what: str, given: Mapping[str, Tensor], known: Mapping[str, tuple[int, ...]]) -> None:
    for name, value in given.items():
        if name not in known:
            raise PlanError(f"{what} of {name!r}: the plan has none there.{did_you_mean(name, known)}")
        if tuple(value.shape) != known[name]:
            raise PlanError(f"{what} of {name!r} is {list(value.shape)}; the model needs {list(known[name])}")


def check_start(decoder: Decoder, group: Group) -> None:
    """Refuse a group that starts at zero where nothing can make its positions contribute nothing.

    Raises:
        UnsupportedModelError: a norm behind a sublayer is not an RMSNorm.
    """
    if group.start != "zero":
        return
    for name in _norms_behind(decoder, group):
        for index in group.started_at_zero:
            _zero_of(decoder.blocks[index].get_submodule(name))


def check_weights(decoder: Decoder, group: Group, fit: GroupFit) -> None:
    """Refuse to make shared weights of integers, which stand for numbers that only a quantiser knows.

    Raises:
        UnsupportedModelError: names the block and the weight.
    """
    if group.giver is not None and not fit.weights:
        return
    for index in group.blocks:
        for name, parameter in _shared_parameters(decoder, group, index).items():
            if not is_plain(parameter):
                raise UnsupportedModelError(
                    f"group {list(group.blocks)}: {name} of block {index} is quantised "
                    f"({dtype_name(parameter.dtype)}), so donor {group.donor!r} cannot make shared "
                    "weights of it. Take donor 'first', or share the plain model and quantise the result."
                )


@torch.no_grad()
def write_fit_(decoder: Decoder, group: Group, fit: GroupFit) -> None:
    """Write a group's shared weights into its holder and the private norms into its members, in place.

    Args:
        decoder: the source; its blocks still stand at their source indices.
        group: the group.
        fit: its fit; what is not in it is made by the group's donor, and norms stay or begin as the group says.
    """
    for name, owned in _shared_parameters(decoder, group, group.holder).items():
        owned.copy_(fit.weights[name] if name in fit.weights else _of_donor(decoder, group, name))
    if group.donor in DONORS:
        for name, buffer in _shared_buffers(decoder, group).items():
            buffer.copy_(_of_donor(decoder, group, name))
    if group.giver is not None or group.donor in DONORS:
        for name in _beside_experts(decoder, group, group.holder):
            value = _of_donor(decoder, group, name)
            for index in group.blocks:
                _tensor(decoder.blocks[index], name).copy_(value)
    for index in group.blocks:
        # A norm's fit comes last: one that helps from the start takes the place of nothing.
        norms = {**_norms_at_start(decoder, group, index), **fit.members.get(index, MemberFit()).norms}
        for name, value in norms.items():
            decoder.blocks[index].get_parameter(name).copy_(value)


@torch.no_grad()
def values_without_fit(decoder: Decoder, group: Group, index: int) -> dict[str, Tensor]:
    """What a member that nothing is fitted for computes with in place of its own parameters.

    Args:
        decoder: the source.
        group: its group; the donor is not one that has to be fitted.
        index: source index of the member, one that does not give its weights.

    Returns:
        Name inside the block → value. A position that starts at zero puts out nothing with these.
    """
    shared = _shared_parameters(decoder, group, index)
    values = {name: _of_donor(decoder, group, name) for name in shared}
    if group.start == "zero":
        for leaf in scale_leaves(decoder, index, group.sublayers):
            values.update({name: torch.zeros_like(shared[name]) for name in shared if name.startswith(f"{leaf}.")})
    return {**values, **_norms_at_start(decoder, group, index)}


def _of_donor(decoder: Decoder, group: Group, name: str) -> Tensor:
    """A shared parameter or buffer as the group's donor makes it."""
    members = group.blocks if group.giver is None else (group.giver,)
    values = [_tensor(decoder.blocks[index], name) for index in members]
    return values[0] if group.giver is not None else DONORS[group.donor](values)


def _norms_at_start(decoder: Decoder, group: Group, index: int) -> dict[str, Tensor]:
    """Norms of a member that begin with other values than its own block's, by name inside the block."""
    values: dict[str, Tensor] = {}
    if group.norms == "owner" and index != group.giver:
        values = {name: parameter.data for name, parameter in own_parameters(decoder, group, group.holder).items()}
    if index in group.started_at_zero:
        block = decoder.blocks[index]
        values.update({f"{name}.weight": _zero_of(block.get_submodule(name)) for name in _norms_behind(decoder, group)})
    return values


def _shared_parameters(decoder: Decoder, group: Group, index: int) -> dict[str, nn.Parameter]:
    """Name inside the block → parameter, of all that a group shares, in block `index`."""
    block = decoder.blocks[index]
    return {
        f"{leaf}.{name}": parameter
        for leaf in shareable_leaves(decoder, index, group.sublayers)
        for name, parameter in block.get_submodule(leaf).named_parameters()
    }


def _shared_buffers(decoder: Decoder, group: Group) -> dict[str, Tensor]:
    """Name inside the block → buffer, of the numbers that shared leaves save beside their parameters, in the holder.

    Such as the correction that a DeepSeek router adds to its scores.
    """
    block = decoder.blocks[group.holder]
    return {
        f"{leaf}.{name}": buffer
        for leaf in shareable_leaves(decoder, group.holder, group.sublayers)
        for name, buffer in block.get_submodule(leaf).named_buffers()
        if buffer.is_floating_point() and name in block.get_submodule(leaf).state_dict()
    }


def _beside_experts(decoder: Decoder, group: Group, index: int) -> dict[str, Tensor]:
    """Name inside the block → vector, of those that stand in a mixture beside experts that the group shares.

    By such a vector the router chooses among them (AFMoE, LFM2, MiniMax M2), so it goes with the experts, although
    each position has one of its own.
    """
    block = decoder.blocks[index]
    leaves = shareable_leaves(decoder, index, group.sublayers)
    experts = [leaf for leaf in leaves if any(p.ndim > 2 for p in block.get_submodule(leaf).parameters(recurse=False))]
    found: dict[str, Tensor] = {}
    for mixture in sorted({leaf.rpartition(".")[0] for leaf in experts} - {""}):
        module = block.get_submodule(mixture)
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if value.is_floating_point() and name in module.state_dict():
                found[f"{mixture}.{name}"] = value.data
    return found


def _tensor(block: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a block, by its name inside it."""
    module, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(block.get_submodule(module), leaf).data
    return tensor


def own_parameters(decoder: Decoder, group: Group, index: int) -> dict[str, nn.Parameter]:
    """What a group's sublayers hold in block `index` beside the shared weights: norms and other vectors."""
    block = decoder.blocks[index]
    shared = {**_shared_parameters(decoder, group, index), **_beside_experts(decoder, group, index)}
    roots = _roots(decoder, group)
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if name not in shared and (roots is None or any(name.startswith(f"{root}.") for root in roots))
    }


def _roots(decoder: Decoder, group: Group) -> tuple[str, ...] | None:
    """Modules of the group's sublayers and their norms; None for the whole block."""
    if set(group.sublayers) == set(SUBLAYERS):
        return None
    (sublayer,) = group.sublayers
    assert decoder.sublayers is not None
    return (*sublayer_modules(decoder, group.holder, sublayer), *decoder.sublayers.norms(sublayer))


def _norms_behind(decoder: Decoder, group: Group) -> list[str]:
    """Norms between the group's sublayers and the stream."""
    if decoder.sublayers is None:
        return []
    return [name for sublayer in group.sublayers if (name := decoder.sublayers.norm_behind(sublayer)) is not None]


def _zero_of(norm: nn.Module) -> Tensor:
    """The weight under which an RMSNorm gives 0, whatever comes in.

    Raises:
        UnsupportedModelError: it is another kind of norm.
    """
    return weight_for(norm, torch.zeros_like(norm.get_parameter("weight"), dtype=torch.float32))

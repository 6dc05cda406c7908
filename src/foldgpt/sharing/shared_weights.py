"""The weights that a group shares, as linear layers ready to be called, before anything private is fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foldgpt.compensation.least_squares import Sums, best_ridge, solve
from foldgpt.folding.fitted import LowRank
from foldgpt.plan import Group, Sublayer
from foldgpt.replay import Replay
from foldgpt.sharing.alignment import Order, align
from foldgpt.sharing.covariance import BlockMoments, block_moments
from foldgpt.sharing.donors import least_squares
from foldgpt.sharing.linears import Linear, linears_of, weight_of
from foldgpt.sharing.low_rank import spectrum
from foldgpt.sharing.output_fit import RIDGES, first_that_chooses
from foldgpt.sharing.student import Position, Student, linear_like


@dataclass(frozen=True)
class Shared:
    """What a group shares, and the low-rank terms of the layers that read the stream.

    Attributes:
        layers: name of a layer → the shared one.
        reading: source index → layer → its low-rank term at that member, for layers that do not make the sublayer's
            output. Those are fitted at the position itself.
        made: whether the weights are made of several members', so that they have to be stored.
    """

    layers: Mapping[str, nn.Module]
    reading: Mapping[int, Mapping[str, LowRank]]
    made: bool


@torch.no_grad()
def shared_weights(replay: Replay, group: Group, batches: Sequence[slice], *, aligned: bool = True) -> Shared:
    """Make a group's shared weights, on the inputs that its members have in the source.

    Where one member gives its weights there is nothing to make. Otherwise the others' heads and neurons are brought
    into the order of the first, if that is wanted, and each layer is the mean or the least-squares solution. With
    least squares the layer that makes a sublayer's output is then fitted once more, to all members at once: given what
    the shared layers before it really give it, its outputs should be each member's own.

    Args:
        replay: the source, with all states.
        group: the group.
        batches: the micro-batches to fit on.
        aligned: bring members into one order first.

    Raises:
        UnsupportedModelError: the layers are not all linear, or the sublayers not known.
    """
    linears = linears_of(replay.decoder, group.holder, group.sublayers)
    if not needs_moments(group, linears):
        return Shared({linear.name: _leaf(replay, group.holder, linear.name) for linear in linears}, {}, made=False)
    members = _members(replay, group, batches, aligned)
    layers = _layers(replay, group, linears, members, batches)
    reading: dict[int, dict[str, LowRank]] = {}
    for block in group.fitted_members:
        terms = {
            linear.name: _missing(members[block], linear.name, layers[linear.name], group.rank_of(linear.name, block))
            for linear in linears
            if not linear.writes and group.rank_of(linear.name, block)
        }
        reading[block] = terms
    return Shared(layers, reading, made=group.giver is None)


def needs_moments(group: Group, linears: Sequence[Linear]) -> bool:
    """Whether anything is made of what the members' layers are given: shared weights, or terms of reading layers."""
    return group.giver is None or any(
        group.rank_of(linear.name, block) for linear in linears if not linear.writes for block in group.blocks
    )


@torch.no_grad()
def missing_spectra(
    replay: Replay, group: Group, batches: Sequence[slice], *, aligned: bool = True
) -> dict[tuple[int, str], Tensor]:
    """What each further rank of a low-rank term would account for, for every shared layer of every fitted member.

    Args and errors as in `shared_weights`.

    Returns:
        (source index, layer) → the share of the layer's mean squared output, falling, fp64 [K].
    """
    linears = linears_of(replay.decoder, group.holder, group.sublayers)
    members = _members(replay, group, batches, aligned)
    layers = _layers(replay, group, linears, members, batches)
    found: dict[tuple[int, str], Tensor] = {}
    for block in group.fitted_members:
        for linear in linears:
            own, second = members[block].weight(linear.name), members[block].second(linear.name)
            missing = spectrum(own - weight_of(layers[linear.name]).double(), second).energies_K
            whole = ((own @ second.double()) * own).sum().clamp_min(torch.finfo(torch.float64).tiny)
            found[block, linear.name] = missing / whole
    return found


def _members(replay: Replay, group: Group, batches: Sequence[slice], aligned: bool) -> dict[int, _Member]:
    """The members in the order of the one that holds the shared weights."""
    moments = {block: _moments(replay, block, group.sublayers, batches) for block in group.blocks}
    orders: dict[int, Mapping[str, Order]] = {group.holder: {}}
    for block in group.blocks:
        if block != group.holder:
            orders[block] = align(replay.decoder, group.holder, block, moments, group.sublayers) if aligned else {}
    return {block: _Member(replay, block, orders[block], moments[block]) for block in group.blocks}


def _layers(
    replay: Replay,
    group: Group,
    linears: Sequence[Linear],
    members: Mapping[int, _Member],
    batches: Sequence[slice],
) -> dict[str, nn.Module]:
    """The shared layers: the giver's own, or made of all members'."""
    layers: dict[str, nn.Module] = {}
    for linear in linears:
        own = _leaf(replay, group.holder, linear.name)
        if group.giver is not None:
            layers[linear.name] = own
            continue
        weights = [member.weight(linear.name) for member in members.values()]
        if group.donor == "least_squares":
            weight = least_squares(weights, [member.second(linear.name) for member in members.values()])
        else:
            weight = torch.stack(weights).mean(0)
        layers[linear.name] = linear_like(own, weight, _mean_bias([m.bias(linear.name) for m in members.values()]))
    if group.donor == "least_squares":
        for linear in linears:
            if linear.writes:
                layers[linear.name] = _refitted(replay, group, linear, linears, layers, batches)
    return layers


@dataclass(frozen=True)
class _Member:
    """One member's layers in the group's order, fp64."""

    replay: Replay
    block: int
    orders: Mapping[str, Order]
    moments: BlockMoments

    def weight(self, name: str) -> Tensor:
        return self._order(name).weight(weight_of(_leaf(self.replay, self.block, name)).double())

    def bias(self, name: str) -> Tensor | None:
        bias = getattr(_leaf(self.replay, self.block, name), "bias", None)
        return None if bias is None else self._order(name).bias(bias.data.double())

    def second(self, name: str) -> Tensor:
        return self._order(name).moments(self.moments[name].second_KK)

    def _order(self, name: str) -> Order:
        return self.orders.get(name, Order())


def _leaf(replay: Replay, block: int, name: str) -> nn.Module:
    return replay.decoder.blocks[block].get_submodule(name)


def _moments(replay: Replay, block: int, sublayers: Sequence[Sublayer], batches: Sequence[slice]) -> BlockMoments:
    return block_moments(replay, block, replay.states[block].clone(), sublayers, batches)


def _mean_bias(biases: Sequence[Tensor | None]) -> Tensor | None:
    known = [bias for bias in biases if bias is not None]
    return torch.stack(known).mean(0) if known else None


def _missing(member: _Member, name: str, shared: nn.Module, rank: int) -> LowRank:
    """The best low-rank term for what the shared layer misses of a member's own."""
    return spectrum(member.weight(name) - weight_of(shared).double(), member.second(name)).truncated(rank)


def _refitted(
    replay: Replay,
    group: Group,
    linear: Linear,
    linears: Sequence[Linear],
    layers: Mapping[str, nn.Module],
    batches: Sequence[slice],
) -> nn.Module:
    """The layer that makes a sublayer's output, fitted to all members' own outputs at once."""
    before = {other.name: layers[other.name] for other in linears if other.sublayer == linear.sublayer}
    first_held = first_that_chooses(len(batches))
    # Running totals: there may be as many sums as members times batches, and each is as large as two weights in fp64.
    fitted: Sums | None = None
    held: Sums | None = None
    for block in group.blocks:
        for number, rows in enumerate(batches):
            sums = _sums(replay, block, linear, before, rows)
            if number < first_held:
                fitted = sums if fitted is None else fitted + sums
            else:
                held = sums if held is None else held + sums
    assert fitted is not None
    own = layers[linear.name]
    ridge, _ = best_ridge(fitted, held or fitted, RIDGES, bias=False)
    change_KH, _ = solve(fitted if held is None else fitted + held, ridge, bias=False)
    bias = getattr(own, "bias", None)
    weight_OI = weight_of(own).double()
    return linear_like(own, weight_OI + change_KH.T.to(weight_OI), None if bias is None else bias.data)


def _sums(replay: Replay, block: int, linear: Linear, layers: Mapping[str, nn.Module], rows: slice) -> Sums:
    """Inputs that the shared layers make of a member's own, and what the output layer then misses of its output."""
    student = Student(replay)
    stream_BTH = replay.states[block][rows]
    own: list[Tensor] = []
    handle = _leaf(replay, block, linear.name).register_forward_hook(lambda _, _args, output: own.append(output))
    try:
        output_BTH = student.block(block, stream_BTH)
    finally:
        handle.remove()
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layers[linear.name].register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    student.positions[block] = Position(layers)
    try:
        student.block(block, stream_BTH)
    finally:
        handle.remove()
    [(inputs_BTK, shared_BTH)] = seen
    weight_R = 1 / output_BTH.float().flatten(0, 1).square().sum(-1).clamp_min(1e-12)
    missing_RH = own[0].float().flatten(0, -2) - shared_BTH.float().flatten(0, -2)
    return Sums.of(inputs_BTK.flatten(0, -2), missing_RH, weight_R)

"""Fit what the groups of a plan share and what stays private, on calibration text, from front to back.

Groups are fitted in order of depth, each member on the stream that the model folded so far really gives it, towards
the stream that the source has there. So errors of earlier groups are not only inherited but corrected where later
ones can. A position that starts at zero aims at where the run of such positions ends, as compensation does. Whatever
is fitted must lower the KL to the source on windows that nothing was fitted on, or the member starts as it would have
without a fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foldgpt.errors import UnsupportedModelError, UsageError
from foldgpt.families.norms import effective_scale, epsilon_of, weight_for
from foldgpt.folding.fits import own_parameters, values_without_fit
from foldgpt.folding.fitted import GroupFit, LowRank, MemberFit
from foldgpt.folding.kinds import shareable_leaves
from foldgpt.objectives import Head, forward_kl
from foldgpt.plan import SUBLAYERS, FoldPlan, Group, Sublayer
from foldgpt.progress import bar, note
from foldgpt.replay import Replay
from foldgpt.sharing.fit_result import MemberReport, SharingFit, SublayerReport
from foldgpt.sharing.linears import linears_of, weight_of
from foldgpt.sharing.output_fit import OutputFit, Wanted, first_that_chooses, fit_output
from foldgpt.sharing.shared_weights import Shared, shared_weights
from foldgpt.sharing.student import Position, Student, with_terms

#: The share of the windows, from the end, on which fits are judged and nothing is fitted.
SHARING_HELD_OUT = 0.125
#: Micro-batches at least, if the windows suffice: fits and judgements are on whole ones.
_LEAST_BATCHES = 8
_BATCH_TOKENS = 2048


def sharing_replay(model: nn.Module, ids_WT: Tensor, plan: FoldPlan | None = None) -> Replay:
    """The source recorded on calibration windows, in micro-batches small enough to hold some of them out.

    Args:
        model: the source.
        ids_WT: the windows, int64 [W, T].
        plan: what will be fitted, if it is known: then the states that it needs are kept, and no others.

    Raises:
        UsageError: fewer than two windows.
    """
    if ids_WT.ndim == 2 and len(ids_WT) < 2:
        raise UsageError(f"sharing is fitted on at least 2 calibration windows, got {len(ids_WT)}; give more tokens")
    windows, tokens = ids_WT.shape
    batch_size = max(1, min(_BATCH_TOKENS // tokens, windows // _LEAST_BATCHES))
    return Replay(model, ids_WT, batch_size=batch_size, boundaries=None if plan is None else boundaries_of(plan))


def boundaries_of(plan: FoldPlan) -> frozenset[int]:
    """Block boundaries at which the fits of a plan's groups look at the source's stream."""
    start = plan.at_start
    members = {block for group in plan.groups for block in group.blocks}
    ends = {_end(start, block) for block in members}
    return frozenset((0, _first(plan), *members, *ends, plan.source.num_blocks))


def _first(plan: FoldPlan) -> int:
    """The first block that may be another one than the source's: the one that makes up for the first cut."""
    start = plan.at_start
    members = (block for group in plan.groups for block in group.blocks)
    missing = (*start.removed, *start.removed_attention, *start.removed_mlp)
    return max(0, min((*members, *missing), default=0) - 1)


def _end(start: FoldPlan, block: int) -> int:
    """The boundary to aim at behind a block: where the next one begins that contributes from the start."""
    return min((later for later in start.kept if later > block), default=start.source.num_blocks)


@torch.no_grad()
def fit_sharing(
    model: nn.Module,
    plan: FoldPlan,
    ids_WT: Tensor,
    *,
    aligned: bool = True,
    replay: Replay | None = None,
) -> SharingFit:
    """Fit the groups of a plan; the model itself is not changed.

    Args:
        model: the source, not folded; compensation for what is removed may have been merged into it.
        plan: what will be folded.
        ids_WT: calibration windows, int64 [W, T]; the last eighth is held out.
        aligned: bring the heads and neurons of members into one order first.
        replay: what `sharing_replay` recorded of the source on these windows, before compensation was merged.

    Raises:
        UsageError: fewer than two windows, or windows of another model.
        UnsupportedModelError: what a block does with its sublayers' outputs is not known, or a group's donor has to
            be fitted and cannot be. Other groups that cannot be fitted are taken as they are folded without a fit.
    """
    replay = replay or sharing_replay(model, ids_WT, plan)
    if replay.model is not model:
        raise UsageError("the replay is of another copy of the model; blocks are called through it")
    return _Fitting(replay, plan, aligned).run()


def split(replay: Replay) -> tuple[list[slice], list[slice]]:
    """The micro-batches that are fitted on, and those that fits are judged on."""
    batches = list(replay.batches())
    num_held = max(1, round(len(batches) * SHARING_HELD_OUT))
    return batches[:-num_held], batches[-num_held:]


class _Fitting:
    def __init__(self, replay: Replay, plan: FoldPlan, aligned: bool) -> None:
        self.replay = replay
        self.plan = plan
        self.aligned = aligned
        self.head = Head(replay.model)
        self.start = plan.at_start
        self.student = Student(replay, self.start.absent_sublayers)
        self.absent = plan.absent_sublayers
        self.fitted, self.held = split(replay)
        self.shared: dict[int, Shared | None] = {}
        self.members: dict[int, dict[int, MemberFit]] = {number: {} for number in range(len(plan.groups))}
        self.reports: list[MemberReport] = []
        self.multiplier: float = getattr(replay.decoder.config, "residual_multiplier", 1.0)

    # ------------------------------------------------------------------------------------------ the walk

    def run(self) -> SharingFit:
        began = self.replay.num_block_calls
        members = {block for group in self.plan.groups for block in group.blocks}
        last = max(members, default=-1)
        first = _first(self.plan)
        stream_WTH = self.replay.states[first].clone()
        with bar("fitting", len(self.plan.kept)) as progress:
            for index in self.plan.kept:
                if index < first:
                    progress.advance()
                    continue
                if index > last:
                    break
                self._settle(index)
                roles = self._roles(index)
                stream_WTH = self._member(index, roles, stream_WTH) if roles else self._passed(index, stream_WTH)
                del self.student.positions[index]
                progress.advance()
        rest = [index for index in self.plan.kept if index >= first and index > last]
        kl = self._kl(rest, [stream_WTH[rows] for rows in self.held])
        fits = {
            number: GroupFit(weights=self._weights(number), members=fitted)
            for number, fitted in self.members.items()
            if fitted or self._weights(number)
        }
        tokens = self.replay.ids_WT.shape[1]
        return SharingFit(
            fits,
            tuple(self.reports),
            kl,
            num_tokens=tokens * sum(rows.stop - rows.start for rows in self.fitted),
            num_held_out=tokens * sum(rows.stop - rows.start for rows in self.held),
            passes=1 + (self.replay.num_block_calls - began) / self.replay.num_blocks,
        )

    def _settle(self, index: int) -> None:
        """Let a position be what it will be folded to, but for what is fitted there.

        Until the walk comes to it, a position that starts at zero is absent.
        """
        self.student.absent.pop(index, None)
        if index in self.absent:
            self.student.absent[index] = self.absent[index]
        self.student.positions[index] = Position(parameters=self.unfitted(index))

    def unfitted(self, index: int) -> dict[str, Tensor]:
        """What a position has from groups that cannot be fitted, by name inside the block."""
        found: dict[str, Tensor] = {}
        for number, group in enumerate(self.plan.groups):
            if index in group.fitted_members and self._shared_of(number) is None:
                found.update(values_without_fit(self.replay.decoder, group, index))
        return found

    def _roles(self, index: int) -> dict[Sublayer, tuple[int, Group]]:
        """The groups in which a block borrows weights, by sublayer; those that cannot be fitted are left out."""
        roles: dict[Sublayer, tuple[int, Group]] = {}
        for number, group in enumerate(self.plan.groups):
            if index in group.fitted_members and self._shared_of(number) is not None:
                roles.update({sublayer: (number, group) for sublayer in SUBLAYERS if sublayer in group.sublayers})
        return {sublayer: roles[sublayer] for sublayer in SUBLAYERS if sublayer in roles}

    def _shared_of(self, number: int) -> Shared | None:
        if number not in self.shared:
            group = self.plan.groups[number]
            try:
                self.shared[number] = shared_weights(self.replay, group, self.fitted, aligned=self.aligned)
            except UnsupportedModelError as error:
                if group.donor == "least_squares":
                    raise
                note(f"nothing is fitted for the group {list(group.blocks)}: {error}")
                self.shared[number] = None
        return self.shared[number]

    def _weights(self, number: int) -> dict[str, Tensor]:
        """Shared parameters that are made of several members', by name."""
        shared = self.shared.get(number)
        if shared is None or not shared.made:
            return {}
        block = self.replay.decoder.blocks[self.plan.groups[number].holder]
        found: dict[str, Tensor] = {}
        for name, layer in shared.layers.items():
            transposed = type(block.get_submodule(name)).__name__ == "Conv1D"
            weight = weight_of(layer).float()
            found[f"{name}.weight"] = weight.T if transposed else weight
            if isinstance(bias := getattr(layer, "bias", None), nn.Parameter):
                found[f"{name}.bias"] = bias.data.float()
        return found

    def _passed(self, index: int, stream_WTH: Tensor) -> Tensor:
        return torch.cat([self.student.block(index, part) for part in self.replay.split(stream_WTH)])

    def _kl(self, blocks: list[int], streams: list[Tensor]) -> float:
        """Mean KL(source ‖ student) on the held-out windows, the student passing these blocks from here on."""
        total, tokens = 0.0, 0
        for rows, hidden_BTH in zip(self.held, streams, strict=True):
            ours_RH = self.replay.finish(self.student.run(hidden_BTH, blocks)).flatten(0, 1)
            theirs_RH = self.replay.finish(self.replay.end_WTH[rows]).flatten(0, 1)
            total += float(forward_kl(self.head, theirs_RH, ours_RH).sum())
            tokens += len(ours_RH)
        return total / tokens

    # ---------------------------------------------------------------------------------------- one member

    def _member(self, index: int, roles: Mapping[Sublayer, tuple[int, Group]], stream_WTH: Tensor) -> Tensor:
        """Fit one member, judge it, and pass the stream through its position."""
        place = _Place(self, index, roles)
        rest = [block for block in self.start.kept if block > index]
        self.student.positions[index] = place.position({}, reading=False)
        without_WTH = self._passed(index, stream_WTH)
        kl_before = self._kl(rest, [without_WTH[rows] for rows in self.held])
        found: dict[Sublayer, OutputFit] = {}
        for sublayer in roles:
            found[sublayer] = place.fit(sublayer, stream_WTH, found)
        self.student.positions[index] = place.position(found)
        with_WTH = self._passed(index, stream_WTH)
        kl_after = self._kl(rest, [with_WTH[rows] for rows in self.held])
        kept = kl_after < kl_before
        numbers = {number for number, _ in roles.values()}
        self.reports.append(
            MemberReport(
                group=min(numbers),
                block=index,
                kept=kept,
                kl_before=kl_before,
                kl_after=kl_after,
                sublayers=tuple(
                    SublayerReport(sublayer, fit.low_rank.rank if fit.low_rank else 0, fit.before, fit.after)
                    for sublayer, fit in found.items()
                ),
            )
        )
        if not kept:
            self.student.positions[index] = place.position({}, reading=False)
            return without_WTH
        for number in numbers:
            self.members[number][index] = place.member_fit(number, found)
        return with_WTH


class _Place:
    """The position of one member: what stands in for its own layers there."""

    def __init__(self, fitting: _Fitting, index: int, roles: Mapping[Sublayer, tuple[int, Group]]) -> None:
        self.fitting = fitting
        self.replay = fitting.replay
        self.index = index
        self.roles = roles
        self.block: nn.Module = self.replay.decoder.blocks[index]
        self.unfitted = fitting.unfitted(index)
        assert self.replay.decoder.sublayers is not None
        self.sublayers = self.replay.decoder.sublayers

    def position(self, found: Mapping[Sublayer, OutputFit], *, reading: bool = True) -> Position:
        """What is exchanged, with the fits that there are so far; the others start as the plan says.

        Args:
            found: fits of output layers.
            reading: whether the layers that read the stream have their low-rank terms yet.
        """
        modules: dict[str, nn.Module] = {}
        parameters = dict(self.unfitted)
        for _, group in self.roles.values():
            if group.norms == "owner":
                parameters.update(self._norms_of(group))
        for sublayer, (number, group) in self.roles.items():
            fit = found.get(sublayer)
            low_rank = self._reading(number) if reading else {}
            writing = self._writing(sublayer)
            for name, layer in self._layers(sublayer).items():
                modules[name] = layer if name == writing else with_terms(layer, low_rank=low_rank.get(name))
            norm = self._norm(sublayer)
            if norm is None:
                scale_H = self._start(sublayer) if fit is None else fit.scale_H
                wanted = "scales" in group.private
                modules[writing] = with_terms(
                    modules[writing],
                    scale_O=scale_H if wanted else None,
                    low_rank=None if fit is None else fit.low_rank,
                )
                continue
            if fit is not None and fit.low_rank is not None:
                modules[writing] = with_terms(modules[writing], low_rank=fit.low_rank)
            scale_H = self._start(sublayer) if fit is None else fit.scale_H
            parameters[f"{self.sublayers.norm_behind(sublayer)}.weight"] = weight_for(norm, scale_H)
        return Position(modules, parameters)

    def member_fit(self, number: int, found: Mapping[Sublayer, OutputFit]) -> MemberFit:
        """The private terms in one group."""
        scales: dict[str, Tensor] = {}
        low_rank: dict[str, LowRank] = dict(self._reading(number))
        norms: dict[str, Tensor] = {}
        for sublayer, (own, group) in self.roles.items():
            if own != number or sublayer not in found:
                continue
            fit, writing, norm = found[sublayer], self._writing(sublayer), self._norm(sublayer)
            if fit.low_rank is not None:
                low_rank[writing] = fit.low_rank
            if norm is not None:
                norms[f"{self.sublayers.norm_behind(sublayer)}.weight"] = weight_for(norm, fit.scale_H).float()
            elif "scales" in group.private:
                scales[writing] = fit.scale_H
        return MemberFit(scales=scales, low_rank=low_rank, norms=norms)

    def fit(self, sublayer: Sublayer, stream_WTH: Tensor, found: Mapping[Sublayer, OutputFit]) -> OutputFit:
        """Fit the private terms of a sublayer's output layer on the stream that enters the block."""
        group = self.roles[sublayer][1]
        self.fitting.student.positions[self.index] = self.position(found)
        columns: list[list[Tensor]] = [[], [], [], []]
        for rows in self.fitting.fitted:
            for column, part in zip(columns, self._seen(sublayer, stream_WTH[rows], rows), strict=True):
                column.append(part)
        lengths = [len(part) for part in columns[0]]
        inputs_RK, shared_RH, contribution_RH, weight_R = map(_joined, columns)
        wanted = Wanted(
            inputs_RK=inputs_RK,
            shared_RH=shared_RH,
            contribution_RH=contribution_RH,
            weight_R=weight_R,
            multiplier=self.fitting.multiplier,
            epsilon=self._epsilon(sublayer),
            start_H=self._start(sublayer),
        )
        batches = len(self.fitting.fitted)
        first_held = first_that_chooses(batches)
        return fit_output(
            wanted,
            rank=group.rank_of(self._writing(sublayer), self.index),
            scales="scales" in group.private,
            first_held=sum(lengths[:first_held]) if batches > 1 else lengths[0] // 2,
        )

    def _seen(self, sublayer: Sublayer, stream_BTH: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs and outputs of the shared output layer, what it should contribute, and the weight of each row."""
        shared = self._layers(sublayer)[self._writing(sublayer)]
        with _watched(shared, self.block, self.sublayers.between) as seen:
            output_BTH = self.fitting.student.block(self.index, stream_BTH)
        inputs_RK, shared_RH = seen.inputs.flatten(0, -2), seen.outputs.flatten(0, -2).float()
        aim = self._aim(sublayer, rows)
        if seen.between is None:
            # Attention and MLP side by side: all but this sublayer's contribution stays as it is.
            now = OutputFit(self._start(sublayer), None, 1.0, 1.0)
            wanted = Wanted(
                inputs_RK,
                shared_RH,
                shared_RH,
                shared_RH[:, 0],
                self.fitting.multiplier,
                self._epsilon(sublayer),
                self._start(sublayer),
            )
            rest_RH = output_BTH.float().flatten(0, 1) - now.contribution(wanted)
        else:
            # OPT has flattened windows and tokens already, between attention and MLP.
            rest_RH = (stream_BTH if sublayer == "attention" else seen.between).float().flatten(0, -2)
        target_RH = aim.float().flatten(0, -2)
        weight_R = 1 / self.replay.states[self._end()][rows].float().flatten(0, 1).square().sum(-1).clamp_min(1e-12)
        return inputs_RK, shared_RH, target_RH - rest_RH, weight_R

    def _aim(self, sublayer: Sublayer, rows: slice) -> Tensor:
        """The source's stream to come near to behind the sublayer, [B, T, H] or [B T, H]."""
        if sublayer == "mlp" or self.sublayers.between is None or not self._mlp_contributes():
            return self.replay.states[self._end()][rows]
        with _watched(None, self.block, self.sublayers.between) as seen:
            self.replay.block(self.index, self.replay.states[self.index][rows])
        assert seen.between is not None
        return seen.between

    def _mlp_contributes(self) -> bool:
        """Whether an MLP behind this block's attention adds its own share from the start."""
        if self.fitting.student.absent.get(self.index) == "mlp":
            return False
        role = self.roles.get("mlp")
        return role is None or self.index not in role[1].started_at_zero

    def _end(self) -> int:
        """The boundary to aim at."""
        return _end(self.fitting.start, self.index)

    # ------------------------------------------------------------------------------------ names and parts

    def _layers(self, sublayer: Sublayer) -> dict[str, nn.Module]:
        number = self.roles[sublayer][0]
        shared = self.fitting.shared[number]
        assert shared is not None
        names = shareable_leaves(self.replay.decoder, self.index, (sublayer,))
        return {name: shared.layers[name] for name in names}

    def _writing(self, sublayer: Sublayer) -> str:
        [name] = [x.name for x in linears_of(self.replay.decoder, self.index, (sublayer,)) if x.writes]
        return name

    def _reading(self, number: int) -> Mapping[str, LowRank]:
        shared = self.fitting.shared[number]
        assert shared is not None
        return shared.reading.get(self.index, {})

    def _norm(self, sublayer: Sublayer) -> nn.Module | None:
        name = self.sublayers.norm_behind(sublayer)
        return None if name is None else self.block.get_submodule(name)

    def _epsilon(self, sublayer: Sublayer) -> float | None:
        norm = self._norm(sublayer)
        return None if norm is None else epsilon_of(norm)

    def _start(self, sublayer: Sublayer) -> Tensor:
        """The scales that the position begins with."""
        group = self.roles[sublayer][1]
        norm = self._norm(sublayer)
        if norm is not None:
            owner = self.replay.decoder.blocks[group.holder]
            own = owner.get_submodule(str(self.sublayers.norm_behind(sublayer))) if group.norms == "owner" else norm
            scale_H = effective_scale(own)
        else:
            scale_H = torch.ones(len(weight_of(self._layers(sublayer)[self._writing(sublayer)])))
            scale_H = scale_H.to(self.replay.states[0].device)
        return torch.zeros_like(scale_H) if group.start == "zero" else scale_H

    def _norms_of(self, group: Group) -> dict[str, Tensor]:
        """The owner's norms, where the position begins with those."""
        owned = own_parameters(self.replay.decoder, group, group.holder)
        return {name: parameter.data for name, parameter in owned.items()}


def _joined(column: list[Tensor]) -> Tensor:
    """Parts of all micro-batches as one tensor; the parts themselves are let go."""
    joined = torch.cat(column)
    column.clear()
    return joined


@dataclass
class _Seen:
    inputs: Any = None
    outputs: Any = None
    between: Any = None


@contextmanager
def _watched(layer: nn.Module | None, block: nn.Module, between: str | None) -> Iterator[_Seen]:
    """See what a layer is given and gives, and the stream between attention and MLP."""
    seen = _Seen()

    def of_layer(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs, seen.outputs = args[0], output

    def of_between(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        # Copied: some families add to the stream in place.
        seen.between = (args[0] if args else kwargs["hidden_states"]).clone()

    handles: list[Any] = []
    if layer is not None:
        handles.append(layer.register_forward_hook(of_layer))
    if between is not None:
        handles.append(block.get_submodule(between).register_forward_pre_hook(of_between, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()

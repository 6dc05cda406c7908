"""From a size to a plan: how many blocks to remove and how many to let share, decided by measuring.

Which way to spend a budget is best differs from model to model and from size to size, and no cheap score has been
found to tell. So the solver lays out the ways, makes each as it would be folded, compensation and fits included, and
compares KL(source ‖ folded) on windows that nothing was fitted on. Pure removal is among the ways, and so is the fixed
recipe 'remove some, let neighbours share in pairs'; neither can be better than what is chosen, on those windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foldgpt.artifacts import with_infinity, without_infinity
from foldgpt.compensation import compensate_and_judge_, set_parameters_
from foldgpt.errors import FoldGPTError, PlanError, UnsupportedModelError, UsageError, first_line
from foldgpt.families import Decoder, decoder_of
from foldgpt.fingerprints import ids_fingerprint
from foldgpt.folding import predicted_parameters
from foldgpt.plan import SUBLAYERS, Compensation, Fitting, FoldPlan, Group, SourceModel, Sublayer
from foldgpt.progress import note
from foldgpt.progress_file import ProgressFile, computed_with
from foldgpt.replay import Replay
from foldgpt.sharing.adjacent import adjacent_groups
from foldgpt.sharing.distance import SharingCost
from foldgpt.sharing.fit import fit_sharing, sharing_replay, split
from foldgpt.sharing.linears import linears_of
from foldgpt.sharing.partition import Partition, contiguous, contiguous_apart, merged
from foldgpt.sharing.ranks import output_ranks, ranks_for
from foldgpt.sharing.zero_started import zero_started_groups
from foldgpt.sizes import Size

#: How far apart in the source two blocks may be that share: one block lies between them at most.
_REACH = 2
#: Groups are not made whose pairs alone, before any fit, cost more than so many times the best candidate so far: fits
#: were seen to save a half to two thirds.
_HOPELESS = 4.0
#: Fractions are met to three decimals.
_ROUNDING = 0.0005
#: Tokens at most on which pairs are measured: they are many, and only their order counts.
_PAIR_TOKENS = 2048
#: The number goes up where the same request would be measured otherwise.
_CHECKPOINT_FORMAT = "foldgpt.sharing-checkpoint-1"


@dataclass(frozen=True)
class Candidate:
    """One way to spend the budget, measured.

    Attributes:
        name: what it does, in words.
        num_removed: blocks removed without a trace.
        num_at_zero: removed blocks that keep a position, which borrows weights.
        num_shared: blocks that give up their own weights for those of a group; attentions and MLPs are counted one by
            one where they have groups of their own.
        parameters: of the whole model.
        kl: mean KL(source ‖ folded) in nats per token, on held-out windows.
        plan: the plan.
    """

    name: str
    num_removed: int
    num_at_zero: int
    num_shared: int
    parameters: int
    kl: float
    plan: FoldPlan

    def to_json_dict(self) -> dict[str, Any]:
        """Figures and groups, without the plan itself."""
        return {
            "name": self.name,
            "num_removed": self.num_removed,
            "num_at_zero": self.num_at_zero,
            "num_shared": self.num_shared,
            "parameters": self.parameters,
            "kl": self.kl,
            "removed": list(self.plan.removed),
            "groups": [{"blocks": list(g.blocks), "sublayers": list(g.sublayers)} for g in self.plan.groups],
        }


@dataclass(frozen=True)
class Solution:
    """What the solver found.

    Attributes:
        best: the candidate with the least KL.
        candidates: all that were measured, in the order in which they were.
        num_held_out: tokens that they were compared on.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    num_held_out: int

    def to_json_dict(self) -> dict[str, Any]:
        """What a plan says of where it comes from."""
        return {
            "chosen": self.best.name,
            "num_held_out": self.num_held_out,
            "candidates": [candidate.to_json_dict() for candidate in self.candidates],
        }


def limit_of(model: nn.Module, size: Size) -> int:
    """The parameters that a whole model of a size may have; bytes are counted in the dtype it is loaded in.

    A fraction is met to three decimals: 0.7 is at most 0.7005, so that blocks which come to 0.7 need not give up one
    more of them for the sake of private scales.

    Args:
        model: the source.
        size: of the folded model.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if size.unit == "parameters":
        return int(size.value)
    if size.unit == "bytes":
        stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        return int(size.value * total / stored)
    in_blocks = sum(parameter.numel() for parameter in decoder_of(model).blocks.parameters())
    return total - math.floor((1 - size.value - _ROUNDING) * in_blocks)


@torch.no_grad()
def solve(
    model: nn.Module,
    source: SourceModel,
    ids_WT: Tensor,
    limit: int,
    removal: Callable[[int], Sequence[int]],
    *,
    compensation: Compensation | None = None,
    fitting: Fitting | None = None,
    checkpoint: Path | None = None,
) -> Solution:
    """Find the best of several ways to bring a model down to a number of parameters.

    Args:
        model: the source, not folded; it is as it was afterwards.
        source: how plans name it.
        ids_WT: calibration windows, int64 [W, T].
        limit: parameters that the whole model may have.
        removal: number of blocks → which to remove if so many are.
        compensation: what plans say of compensation; None for none.
        fitting: what plans say of the text that groups are fitted on.
        checkpoint: a file that keeps what was measured, so that the same call goes on where it was stopped. It stays:
            whoever has saved the solution drops it.

    Raises:
        UsageError: no removal brings the model down to the limit, or there are fewer than two windows.
        ArtifactError: the checkpoint cannot be written.
    """
    return _Solver(model, source, ids_WT, limit, removal, compensation, fitting, checkpoint).run()


class _Solver:
    def __init__(
        self,
        model: nn.Module,
        source: SourceModel,
        ids_WT: Tensor,
        limit: int,
        removal: Callable[[int], Sequence[int]],
        compensation: Compensation | None,
        fitting: Fitting | None,
        checkpoint: Path | None,
    ) -> None:
        self.model = model
        self.source = source
        self.limit = limit
        self.compensation = compensation
        self.fitting = fitting
        self.removal = removal
        self.decoder: Decoder = decoder_of(model)
        self._file = ProgressFile(checkpoint, _CHECKPOINT_FORMAT, partial(self._identity, ids_WT), seconds_between=0.0)
        earlier, self._pair_lists = _read(self._file.load())
        self._earlier = {candidate.name: candidate for candidate in earlier}
        self.replay = sharing_replay(model, ids_WT)
        self.fitted, self.held = split(self.replay)
        self.candidates: list[Candidate] = []
        self._compensations: dict[tuple[tuple[int, ...], frozenset[int]], dict[str, Tensor]] = {}

    def run(self) -> Solution:
        fewest = self._fewest()
        self._measure(f"remove {fewest}", removed=self.removal(fewest))
        ways = [partial(self._at_zero, number) for number in (fewest, fewest + 1)]
        for shared in dict.fromkeys((1, (fewest + 1) // 2, fewest) if fewest else ()):
            ways.append(partial(self._fixed_pairs, fewest, shared))
            for more in (0, 1):
                ways.append(partial(self._measured_pairs, fewest + more, shared))
                ways.append(partial(self._measured_apart, fewest - shared + more, more))
        for way in ways:
            # Families whose sublayers are not known, or hold what nothing can be fitted for, such as experts; and
            # plans that cannot be folded.
            try:
                way()
            except (UnsupportedModelError, PlanError) as error:
                note(f"left out: {first_line(error)}")
        best = min(self.candidates, key=lambda candidate: candidate.kl)
        tokens = sum(rows.stop - rows.start for rows in self.held) * self.replay.ids_WT.shape[1]
        return Solution(best, tuple(self.candidates), tokens)

    def _fewest(self) -> int:
        """The fewest blocks whose removal meets the limit."""
        why = "one block must stay"
        for number in range(len(self.decoder.blocks)):
            try:
                parameters = self._parameters(self._plan(self.removal(number)))
            except PlanError as error:
                why = first_line(error)
                continue
            if parameters <= self.limit:
                return number
        raise UsageError(f"no removal of blocks brings the model to {self.limit:,} parameters; {why}")

    # ------------------------------------------------------------------------------------------- the ways

    def _at_zero(self, number: int) -> None:
        """Removed blocks keep their positions, and what the budget leaves pays for their private terms."""
        removed = self.removal(number) if number < len(self.decoder.blocks) else ()
        kept = self._kept(removed)
        for norms in ("own", "owner"):
            groups = tuple(
                group.model_copy(update={"norms": norms}) for group in zero_started_groups(self.decoder, kept, removed)
            )
            started = {block for group in groups for block in group.started_at_zero}
            rest = sorted(set(removed) - started)
            left = self.limit - self._parameters(self._plan(rest, groups))
            if not groups or left < 0:
                return
            self._measure(
                f"remove {number}, keep their positions with {norms} norms",
                rest,
                partial(output_ranks, self.replay, groups, left),
            )

    def _fixed_pairs(self, number: int, shared: int) -> None:
        """The fixed recipe: neighbours in pairs around the middle of what is kept, the first one's weights."""
        removed = self.removal(number - shared)
        kept = self._kept(removed)
        pairs = middle(adjacent_groups(self.decoder, kept, size=2), kept, shared)
        # Norms stay private, so pairs take a little more than what is left of removed blocks.
        if len(pairs) == shared and self._parameters(self._plan(removed, pairs)) <= self.limit:
            named = f"{shared} adjacent pair" + "s" * (shared != 1)
            self._measure(f"remove {number - shared}, share {named}", removed, lambda: pairs, fits=False)

    def _measured_pairs(self, number: int, shared: int) -> None:
        """Groups chosen by measured costs, least-squares donors, and what the budget leaves for private terms.

        They take the most time of all; where the costs of their pairs leave no hope, they are not made.
        """
        if not 0 <= number - shared < len(self.decoder.blocks) - 1:
            return
        removed = self.removal(number - shared)
        found = self._partition(self._kept(removed), shared)
        if found is not None:
            name = f"remove {number - shared}, share {shared} in measured groups, fitted"
            self._measure_fitted(name, removed, {SUBLAYERS: found})

    def _measured_apart(self, number: int, more: int) -> None:
        """Attention and MLP have measured groups of their own, wherever that costs least.

        Args:
            number: blocks removed.
            more: blocks whose size is saved beyond the limit, for ranks.
        """
        removed = self.removal(number)
        kept = self._kept(removed)
        sizes = [[self._shared_size(index, part) for index in range(len(self.decoder.blocks))] for part in SUBLAYERS]
        of_block = max(sum(part[index] for part in sizes) for index in kept)
        target = self._parameters(self._plan(removed)) - self.limit + more * of_block
        costs = [self._sublayer_costs[part] for part in SUBLAYERS]
        try:
            apart = contiguous_apart(kept, costs, sizes, max(0, target))
        except UsageError:
            return
        attention, mlp = apart
        if attention.groups == mlp.groups:
            return  # nothing that has not been measured
        shared = [sum(len(blocks) - 1 for blocks in found.groups) for found in apart]
        what = f"{shared[0]} attention{'s' * (shared[0] != 1)} and {shared[1]} MLP{'s' * (shared[1] != 1)}"
        name = f"remove {number}, share {what} in measured groups, fitted"
        self._measure_fitted(name, removed, {("attention",): attention, ("mlp",): mlp})

    def _measure_fitted(
        self, name: str, removed: Sequence[int], partitions: Mapping[tuple[Sublayer, ...], Partition]
    ) -> None:
        """Measure groups with least-squares donors and what the budget leaves for private terms, by what they share."""
        cost = sum(found.cost for found in partitions.values())
        if cost > _HOPELESS * min(candidate.kl for candidate in self.candidates):
            note(f"{name}: not tried, the pairs alone cost {cost:.2f}")
            return
        for private in (("norms", "scales"), ("norms",)):
            groups = tuple(
                Group.model_validate(
                    {"blocks": blocks, "sublayers": sublayers, "donor": "least_squares", "private": private}
                )
                for sublayers, found in partitions.items()
                for blocks in found.groups
            )
            left = self.limit - self._parameters(self._plan(removed, groups))
            if left >= 0:
                self._measure(name, removed, partial(ranks_for, self.replay, groups, left, self.fitted))
                return

    def _kept(self, removed: Sequence[int]) -> list[int]:
        return [index for index in range(len(self.decoder.blocks)) if index not in removed]

    def _shared_size(self, index: int, sublayer: Sublayer) -> int:
        """Parameters that a block need not store if it shares a sublayer; its norms stay its own."""
        leaves = linears_of(self.decoder, index, (sublayer,))
        block = self.decoder.blocks[index]
        return sum(p.numel() for leaf in leaves for p in block.get_submodule(leaf.name).parameters())

    def _partition(self, kept: Sequence[int], shared: int) -> Partition | None:
        """The cheapest groups, found either way, in which so many blocks give up their own weights; None for none."""
        found = []
        for search in (contiguous, merged):
            try:
                found.append(search(kept, self._pair_costs, [1] * len(self.decoder.blocks), shared))
            except UsageError:
                continue
        return min(found, key=lambda partition: partition.cost, default=None)

    @cached_property
    def _cost(self) -> SharingCost:
        tokens = self.replay.ids_WT.shape[1] * self.replay.batch_size
        return SharingCost(self.replay, num_batches=max(1, _PAIR_TOKENS // tokens))

    @cached_property
    def _pair_costs(self) -> Tensor:
        """Measured costs of pairs, for all candidates: of the source's blocks, whatever is removed elsewhere."""
        return self._pairs(SUBLAYERS)

    @cached_property
    def _sublayer_costs(self) -> dict[Sublayer, Tensor]:
        """The same where attention alone, or the MLP alone, is shared."""
        return {part: self._pairs((part,)) for part in SUBLAYERS}

    def _pairs(self, sublayers: Sequence[Sublayer]) -> Tensor:
        what = "+".join(sublayers)
        if what not in self._pair_lists:
            costs_NN = self._cost.pairs(range(len(self.decoder.blocks)), reach=_REACH, sublayers=sublayers)
            self._pair_lists[what] = [without_infinity(row) for row in costs_NN.tolist()]
            self._save()
        return torch.tensor([with_infinity(row) for row in self._pair_lists[what]], dtype=torch.float64)

    @cached_property
    def _for_compensation(self) -> tuple[Replay, Replay]:
        """The source on the windows that nothing is judged on, and on the others."""
        first_held, size = self.fitted[-1].stop, self.replay.batch_size
        fitted_WT, held_WT = self.replay.ids_WT[:first_held], self.replay.ids_WT[first_held:]
        return Replay(self.model, fitted_WT, batch_size=size), Replay(self.model, held_WT, batch_size=size)

    # ------------------------------------------------------------------------------------------- measuring

    def _plan(self, removed: Sequence[int], groups: Sequence[Group] = ()) -> FoldPlan:
        at_zero = any(group.start == "zero" for group in groups)
        return FoldPlan.create(
            self.source,
            removed=removed,
            groups=groups,
            compensation=self.compensation if removed or at_zero else None,
            fitting=self.fitting if groups else None,
        )

    def _removal_or_none(self, number: int) -> list[int] | None:
        """What goes if so many do; None where that cannot be folded."""
        try:
            return list(self.removal(number))
        except PlanError:
            return None

    def _parameters(self, plan: FoldPlan) -> int:
        # A least-squares donor has the size of any other.
        return predicted_parameters(self.model, plan)

    def _measure(
        self,
        name: str,
        removed: Sequence[int],
        make_groups: Callable[[], Sequence[Group]] = tuple,
        *,
        fits: bool = True,
    ) -> None:
        """Measure a candidate, unless an earlier run of the same search has."""
        kept = self._earlier.pop(name, None)
        if kept is not None:
            self.candidates.append(kept)
            note(f"{name}: KL {kept.kl:.4f}, measured before")
            return
        groups = make_groups()
        plan = self._plan(removed, groups)
        if not fits:
            plan = plan.model_copy(update={"fitting": None})
        with self._compensated(plan):
            kl = fit_sharing(self.model, plan, self.replay.ids_WT, replay=self.replay).kl
        if not math.isfinite(kl):
            raise FoldGPTError(
                f"{name}: the model's predictions are not finite; load it in float32 or bfloat16 (--dtype)"
            )
        at_zero = sum(len(group.started_at_zero) for group in groups)
        shared = sum(len(group.blocks) - 1 for group in groups if group.start == "hard")
        found = Candidate(name, len(plan.removed), at_zero, shared, self._parameters(plan), kl, plan)
        self.candidates.append(found)
        note(f"{name}: KL {kl:.4f}")
        self._save()

    # ------------------------------------------------------------------------------------------- bookkeeping

    def _identity(self, ids_WT: Tensor) -> dict[str, Any]:
        """All that decides the result."""
        return {
            **computed_with(self.model),
            "source": self.source.model_dump(mode="json"),
            "ids": ids_fingerprint(ids_WT),
            "limit": self.limit,
            "removal": [self._removal_or_none(number) for number in range(len(self.decoder.blocks))],
            "compensation": None if self.compensation is None else self.compensation.model_dump(mode="json"),
            "fitting": None if self.fitting is None else self.fitting.model_dump(mode="json"),
        }

    def _save(self) -> None:
        self._file.save(
            lambda: {
                # Those of before that have not come up again stay: this run may be stopped as well.
                "candidates": [
                    {**vars(found), "plan": found.plan.to_json_dict()}
                    for found in (*self.candidates, *self._earlier.values())
                ],
                "pairs": self._pair_lists,
            }
        )

    @contextmanager
    def _compensated(self, plan: FoldPlan) -> Iterator[None]:
        """The model with what is removed compensated."""
        merged = {} if plan.compensation is None else self._compensation(plan, plan.compensation)
        own = {name: self.model.get_parameter(name).clone() for name in merged}
        try:
            set_parameters_(self.model, merged)
            yield
        finally:
            set_parameters_(self.model, own)

    def _compensation(self, plan: FoldPlan, settings: Compensation) -> dict[str, Tensor]:
        """Parameters that compensation changes, by name; none where folding would leave it out.

        It is fitted on the windows that nothing is judged on, and once for all plans that begin without the same blocks
        and have the same blocks make up for them: what is shared carries no correction.
        """
        start = plan.at_start
        sharing = {block for group in start.groups if "mlp" in group.sublayers for block in group.blocks}
        key = start.removed, frozenset(block for block in sharing if block + 1 in start.removed)
        if key not in self._compensations:
            _, own = compensate_and_judge_(
                self.model,
                start,
                *self._for_compensation,
                features=settings.features,
                ridge=settings.ridge,
                rounds=settings.rounds,
            )
            merged = {name: self.model.get_parameter(name).clone() for name in own}
            set_parameters_(self.model, own)
            self._compensations[key] = {name: new for name, new in merged.items() if not torch.equal(new, own[name])}
        return self._compensations[key]


def _read(found: Mapping[str, Any]) -> tuple[list[Candidate], dict[str, Any]]:
    """What a checkpoint holds: candidates in the order in which they were measured, and costs of pairs."""
    try:
        candidates = [
            Candidate(**{**kept, "plan": FoldPlan.from_json_dict(kept["plan"])}) for kept in found["candidates"]
        ]
        return candidates, dict(found["pairs"])
    except (KeyError, TypeError, PlanError):
        return [], {}


def middle(groups: Sequence[Group], kept: Sequence[int], number: int) -> tuple[Group, ...]:
    """The groups nearest to the middle of the kept blocks, in order of depth."""
    centre = (len(kept) - 1) / 2
    place = {block: position for position, block in enumerate(kept)}

    def distance(group: Group) -> float:
        return abs(sum(place[block] for block in group.blocks) / len(group.blocks) - centre)

    return tuple(sorted(sorted(groups, key=distance)[:number], key=lambda group: group.blocks))

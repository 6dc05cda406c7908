"""RemovalCost: how far a model without some of its blocks is from its source. The one measure of all searches.

The question is asked hundreds of times, so what can be shared is shared. The source's states are recorded once
(`Replay`) and are the beginning of every set, up to its first removed block. States that a set passes through
are kept, so that a set which begins alike is run only from where it differs. The divergence is measured at a
fixed, seeded choice of positions, the same for all sets (common random numbers): differences between sets are
then far more accurate than the values themselves.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foldgpt.byte_cache import ByteCache
from foldgpt.compensation import Compensator, Priors, Start
from foldgpt.compensation.compensator import MASSIVE
from foldgpt.errors import FoldGPTError
from foldgpt.objectives import Head, SourcePredictions, cross_entropy
from foldgpt.plan import Sublayer
from foldgpt.replay import Replay
from foldgpt.selection.further_windows import prior_passes
from foldgpt.selection.units import Removed, Units

Objective = Literal["kl", "lm"]

#: The sample, the removed units before a block, and that block: what determines the stream that enters it.
StateKey = tuple[tuple[int, int], Removed, int]

#: The share of the positions at which predictions are compared. A sample's states cost the same however many are
#: read, so with fewer the same certainty would take more windows and more time.
_POSITION_SHARE = 0.5
#: But no more than this: 2,048 give the mean KL to about 3 %, and differences between sets much better.
_MOST_POSITIONS = 2048

#: What cached states of one search take at most.
CACHE_BYTES = 1536 * 2**20

#: What compensates is fitted on the windows that are measured on, each part on the others. Fitted and measured on the
#: same tokens, sets with many cuts would win by fitting them, and lose on all other text.
PARTS = 4


@dataclass(frozen=True)
class Sample:
    """Some of the windows, and the positions in them at which predictions are compared.

    Shape suffixes: R positions.

    Attributes:
        batches: the recorded micro-batches.
        windows: the windows of all of them together.
        rows_R: positions, as indices into the flattened windows.
        source: the source's predictions there; None when the objective does not need them.
        targets_R: the tokens that follow.
    """

    batches: tuple[slice, ...]
    windows: slice
    rows_R: Tensor
    source: SourcePredictions | None
    targets_R: Tensor

    @property
    def key(self) -> tuple[int, int]:
        """What tells cached states of different samples apart."""
        return self.windows.start, self.windows.stop


def num_positions(num_tokens: int, share: float = _POSITION_SHARE, most: int = _MOST_POSITIONS) -> int:
    """At how many positions of a text predictions are compared."""
    return max(1, min(int(share * num_tokens), most))


def search_windows(num_tokens: int, context: int, num_windows: int) -> int:
    """On how many of the calibration windows a search measures; on all where it is to measure on more than they have.

    Args:
        num_tokens: tokens that it is to measure on.
        context: tokens in one window.
        num_windows: the calibration windows that there are.
    """
    return max(1, min(num_tokens // context, num_windows))


class RemovalCost:
    """Costs of sets of removed units.

    Args:
        replay: the source on the calibration windows.
        units: what may be removed; by default whole blocks.
        copied_WT: bool [W, T], where the windows repeat what they begin with: predictions are compared there as
            everywhere, and what compensates is fitted on the rest, as folding's is; None where they do not.
        objective: "kl" to the source, or "lm", the language-modelling loss.
        compensate: correct the block before each cut, and what is left of a block that loses a sublayer, in closed
            form, as `foldgpt.compensation` does when folding; the fit is made on the windows that are measured on, for
            each part of them on the others.
        priors: where these fits begin, fitted on other windows; by default at the plain removal.
        seed: seed of the positions.
        position_share: the share of the positions at which predictions are compared, at most `most_positions`.
        most_positions: see there.
        cache_bytes: what cached states may take.

    Attributes:
        seconds: time spent so far, the recording not included.
        head_cost: work of the head for one token, compared with that of all blocks.
    """

    def __init__(
        self,
        replay: Replay,
        *,
        units: Units | None = None,
        copied_WT: Tensor | None = None,
        objective: Objective = "kl",
        compensate: bool = False,
        priors: Priors | None = None,
        seed: int = 0,
        position_share: float = _POSITION_SHARE,
        most_positions: int = _MOST_POSITIONS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.replay = replay
        self.units = units or Units.blocks(replay.num_blocks, 0)
        self.objective = objective
        self.compensate = compensate
        self.seconds = 0.0
        self.head = Head(replay.model)
        blocks = sum(parameter.numel() for parameter in replay.decoder.blocks.parameters())
        self.head_cost = self.head.vocab_size * replay.states[0].shape[-1] / blocks
        self._spent_before = 0.0
        self._head_rows = 0.0
        self._seed = seed
        self._position_share, self._most_positions = position_share, most_positions
        self._copied_WT = copied_WT
        self._samples: dict[tuple[int, int], Sample] = {}
        self._source_costs: dict[tuple[int, int], float] = {}
        self._cache: ByteCache[StateKey, list[Tensor]] = ByteCache(cache_bytes, _bytes)
        # Massive tokens pass a search's fit as they are.
        self._compensator = Compensator(replay, parts=PARTS, spared=MASSIVE) if compensate else None
        self._priors = priors

    # ------------------------------------------------------------------------------------------- samples

    @property
    def everything(self) -> Sample:
        """All calibration windows."""
        return self.sample(0, self.num_batches)

    @property
    def copied_R(self) -> Tensor:
        """Bool [R]: which of the positions that are compared on all windows lie in copies of earlier text."""
        rows_R = self.everything.rows_R
        if self._copied_WT is None:
            return torch.zeros_like(rows_R, dtype=torch.bool)
        return self._copied_WT.flatten()[rows_R]

    @property
    def num_batches(self) -> int:
        """Recorded micro-batches, the grain of a sample."""
        return len(list(self.replay.batches()))

    def sample(self, start: int, stop: int) -> Sample:
        """The sample of micro-batches `start` to `stop` (exclusive); made once.

        Args:
            start: first micro-batch.
            stop: the one after the last.
        """
        if (start, stop) not in self._samples:
            began = time.perf_counter()
            self._samples[start, stop] = self._make_sample(start, stop)
            self.seconds += time.perf_counter() - began
        return self._samples[start, stop]

    @torch.no_grad()
    def _make_sample(self, start: int, stop: int) -> Sample:
        batches = tuple(self.replay.batches())[start:stop]
        windows = slice(batches[0].start, batches[-1].stop)
        ids_WT = self.replay.ids_WT[windows]
        # The last position of a window has no next token to score; KL leaves it out as well.
        num_windows, num_tokens = ids_WT.shape[0], ids_WT.shape[1] - 1
        wanted = num_positions(num_windows * num_tokens, self._position_share, self._most_positions)
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + windows.start) % 2**63)
        chosen = torch.randperm(num_windows * num_tokens, generator=generator)[:wanted].sort().values
        rows_R = chosen // num_tokens * ids_WT.shape[1] + chosen % num_tokens
        targets_R = ids_WT.flatten()[rows_R + 1]
        source = None
        if self.objective == "kl":
            source = SourcePredictions(self.head, self._predictions([self.replay.end_WTH[windows]], rows_R))
        return Sample(batches, windows, rows_R, source, targets_R.to(self.replay.states[0].device))

    # --------------------------------------------------------------------------------------------- costs

    @property
    def forward_equivalents(self) -> float:
        """Work so far in forward passes of the source's blocks over all windows, the recording included.

        A block call counts 1/N. A position at which logits are made counts as many tokens as the head's matrix
        has parameters, compared with all blocks. What `add_spent` was told of is included.
        """
        head = self._head_rows * self.head_cost / self.replay.ids_WT.numel()
        own = self.set_up_equivalents + self.replay.num_block_calls / self.replay.num_blocks + head
        if self._priors is not None:
            own += self._priors.forward_tokens / self.replay.ids_WT.numel()
        return self._spent_before + own

    @property
    def forward_tokens(self) -> float:
        """`forward_equivalents` as a number of tokens that pass all blocks, to be added to work on other windows."""
        return self.forward_equivalents * self.replay.ids_WT.numel()

    @property
    def set_up_equivalents(self) -> float:
        """The part of `forward_equivalents` that is the source's: the recordings, and its predictions."""
        return self._recordings + self._source_equivalents(self._samples)

    @property
    def samples(self) -> list[tuple[int, int]]:
        """The samples that have been made, as `sample` is called for them."""
        return list(self._samples)

    def set_up_again(self, samples: Collection[tuple[int, int]]) -> float:
        """What of `set_up_equivalents` an earlier run that had made these samples set up too; 0 if it made none."""
        if not samples:
            return 0.0
        return self._recordings + self._source_equivalents(self._samples.keys() & set(samples))

    @property
    def num_prior_tokens(self) -> int:
        """Tokens that priors are fitted on; 0 without them."""
        return 0 if self._priors is None else self._priors.num_tokens

    @property
    def prior_equivalents(self) -> float:
        """What priors take of `forward_equivalents` once each block was in a fit."""
        return prior_passes(self.num_prior_tokens, self.replay.ids_WT.numel())

    @property
    def _recordings(self) -> float:
        """Passes in which the source's states are recorded."""
        return 1 + self.num_prior_tokens / self.replay.ids_WT.numel()

    def _source_equivalents(self, samples: Iterable[tuple[int, int]]) -> float:
        """What the source's own predictions on some samples have taken: two passes of the head by the KL."""
        if self.objective != "kl":
            return 0.0
        rows = sum(len(self._samples[key].rows_R) for key in samples)
        return 2 * rows * self.head_cost / self.replay.ids_WT.numel()

    def add_spent(self, seconds: float, forward_equivalents: float) -> None:
        """Count what the same search took elsewhere as well: before it was stopped, or on other windows.

        Args:
            seconds: time.
            forward_equivalents: work.
        """
        self.seconds += seconds
        self._spent_before += forward_equivalents

    def add_head_rows(self, rows: float) -> None:
        """Count positions at which logits were made elsewhere, or something that took as much."""
        self._head_rows += rows

    def cost(self, removed: Removed, sample: Sample | None = None, *, keep: bool = True) -> float:
        """Mean KL(source ‖ folded) in nats per token, or the mean language-modelling loss.

        Args:
            removed: the removed units.
            sample: where to measure; all windows by default.
            keep: keep the states passed on the way, for sets that begin alike.

        Raises:
            FoldGPTError: the folded model's predictions are not finite.
        """
        value = float(self.costs(removed, sample, keep=keep).mean())
        if value != value or value in (float("inf"), float("-inf")):
            raise FoldGPTError(
                f"without {self.units.words(removed)} the model's predictions are not finite; "
                "load it in float32 or bfloat16 (--dtype)"
            )
        return value

    def source_cost(self, sample: Sample | None = None) -> float:
        """What removing nothing costs: 0 by the KL, the source's own loss by the language-modelling loss.

        Args:
            sample: where; all windows by default. Each is measured once.
        """
        if self.objective == "kl":
            return 0.0
        sample = sample or self.everything
        key = (sample.windows.start, sample.windows.stop)
        if key not in self._source_costs:
            self._source_costs[key] = self.cost(frozenset(), sample)
        return self._source_costs[key]

    @torch.no_grad()
    def costs(
        self,
        removed: Removed,
        sample: Sample | None = None,
        *,
        keep: bool = True,
        changed_from: int | None = None,
    ) -> Tensor:
        """The cost at each position of the sample, fp32 [R].

        Args:
            removed: the removed units.
            sample: where to measure; all windows by default.
            keep: keep the states passed on the way, for sets that begin alike.
            changed_from: the first block whose weights are no longer the source's. States behind it do not hold for
                other sets: they must not be kept.
        """
        assert changed_from is None or not keep
        sample = sample or self.everything  # before the clock begins: making one has a clock of its own
        began = time.perf_counter()
        hidden_RH = self._predictions(self._run(removed, sample, keep, changed_from=changed_from), sample.rows_R)
        self.add_head_rows(len(hidden_RH))
        if sample.source is not None:
            costs_R = sample.source.kl(hidden_RH)
        else:
            costs_R = cross_entropy(self.head, hidden_RH, sample.targets_R)
        self.seconds += time.perf_counter() - began
        return costs_R

    @torch.no_grad()
    def walk(self, removed: Removed) -> None:
        """Keep the states of a set at every depth, as a start for sets that also remove one deeper unit."""
        sample = self.everything
        began = time.perf_counter()
        self._run(removed, sample, keep=True, up_to=self.replay.num_blocks)
        self.seconds += time.perf_counter() - began

    # -------------------------------------------------------------------------------------------- streams

    def _run(
        self,
        removed: Removed,
        sample: Sample,
        keep: bool,
        *,
        up_to: int | None = None,
        changed_from: int | None = None,
    ) -> list[Tensor]:
        """The stream [B, T, H] after the last block, for each micro-batch, without the removed units."""
        num_blocks = self.replay.num_blocks
        whole, lacking = self.units.whole_blocks(removed), self.units.lacking(removed)
        if up_to is None:
            # States deeper than the last removed unit are of use to no set but this one.
            up_to = max((unit // self.units.per_block for unit in removed), default=-1) + 1
        unchanged = num_blocks if changed_from is None else changed_from
        block, stream = self._deepest(removed, whole, sample, unchanged)
        while block < num_blocks:
            if block in whole:
                block += 1
                continue
            after = block + 1
            while self.compensate and after in whole:
                after += 1
            if self.compensate and (after > block + 1 or block in lacking):
                stream = self._compensated(block, after, stream, sample, lacking.get(block))
            else:
                stream = [self.replay.block(block, hidden, without=lacking.get(block)) for hidden in stream]
            block = after
            if keep and block <= up_to and block < num_blocks:
                self._cache.put((sample.key, self.units.below(removed, block), block), stream)
        return stream

    def _deepest(
        self, removed: Removed, whole: frozenset[int], sample: Sample, unchanged: int
    ) -> tuple[int, list[Tensor]]:
        """The deepest known state of a set up to block `unchanged`: a block index and the stream that enters it."""
        for block in range(unchanged, -1, -1):
            # A cut that goes on changes the compensation of the block before it.
            if self.compensate and block in whole and block > 0:
                continue
            below = self.units.below(removed, block)
            if not below:
                return block, [self.replay.states[block][windows] for windows in sample.batches]
            known = self._cache.get((sample.key, below, block))
            if known is not None:
                return block, known
        raise AssertionError("nothing is removed below block 0")

    def _compensated(
        self, block: int, after: int, stream: list[Tensor], sample: Sample, absent: Sublayer | None
    ) -> list[Tensor]:
        """Pass a block that makes up for what is removed of it, and for the removed blocks up to block `after`."""
        assert self._compensator is not None
        carrier: Sublayer = "attention" if absent == "mlp" else "mlp"
        prior = None if self._priors is None else self._priors.of(block, after, absent)
        output_WTH, carried_WTH, inner_RI = self._compensator.run(
            block,
            stream,
            sublayer=carrier,
            absent=absent,
            inner=prior is not None and prior.features == "inner",
        )
        start = None if prior is None else Start(prior, carried_WTH.flatten(0, -2) if inner_RI is None else inner_RI)
        target_WTH = self.replay.states[after][sample.windows]
        copied_WT = None if self._copied_WT is None else self._copied_WT[sample.windows]
        corrected_WTH, _ = self._compensator.correct(
            block, output_WTH, carried_WTH, target_WTH, sublayer=carrier, left_out_WT=copied_WT, start=start
        )
        return list(corrected_WTH.split([len(hidden) for hidden in stream]))

    def _predictions(self, stream: list[Tensor], rows_R: Tensor) -> Tensor:
        """Inputs of the head [R, H] at the chosen positions. What follows the last block acts token by token."""
        hidden_RH = torch.cat([hidden.flatten(0, 1) for hidden in stream])[rows_R]
        return self.replay.finish(hidden_RH[None])[0]

    def further_equivalents(self, sets: Sequence[Removed], ids_WT: Tensor) -> float:
        """What recording other windows and measuring these sets there will count in `forward_equivalents`, at most.

        Args:
            sets: the sets.
            ids_WT: the other windows.
        """
        num_blocks, tokens = self.replay.num_blocks, ids_WT.numel()
        # A block that compensates stands before the first one that is removed.
        ahead = [max(0, min(removed) // self.units.per_block - self.compensate) for removed in sets]
        run = 1 + sum((num_blocks - first) / num_blocks for first in ahead)
        # The source's own predictions take two passes of the head by the KL, and one by the loss.
        heads = (2 + len(sets)) * num_positions(tokens, self._position_share, self._most_positions)
        return (run * tokens + heads * self.head_cost) / self.replay.ids_WT.numel()

    def forget(self) -> None:
        """Drop the states that were kept for sets that begin alike, and for further priors."""
        self._cache.clear()
        if self._priors is not None:
            self._priors.forget_outputs()

    def predicted_equivalents(self, num_sets: int, sample: Sample, *, share_run: float = 0.5) -> float:
        """What measuring some sets will count in `forward_equivalents`.

        Args:
            num_sets: how many.
            sample: where.
            share_run: the share of the blocks that is run for one, on average.
        """
        tokens = self.replay.ids_WT.numel()
        windows = (sample.windows.stop - sample.windows.start) / self.replay.num_windows
        return num_sets * (share_run * windows + len(sample.rows_R) * self.head_cost / tokens)


def _bytes(stream: list[Tensor]) -> int:
    return sum(hidden.numel() * hidden.element_size() for hidden in stream)

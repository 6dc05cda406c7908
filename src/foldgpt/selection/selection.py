"""What a selector is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from foldgpt.analysis import Analysis
from foldgpt.compensation import Priors
from foldgpt.errors import ArtifactError, UsageError, did_you_mean, first_problem
from foldgpt.families import decoder_of
from foldgpt.folding import predicted_parameters, source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.replay import Replay
from foldgpt.selection.copies import COPIES, with_copies
from foldgpt.selection.cost import Objective, RemovalCost
from foldgpt.selection.further_windows import prior_passes, prior_windows
from foldgpt.selection.units import Units

#: Micro-batches hold about so many tokens, and there are at least so many of them if the windows suffice.
_BATCH_TOKENS, _LEAST_BATCHES = 2048, 8
_FORMAT = "foldgpt.selection"


@dataclass(frozen=True)
class Request:
    """What a selector is asked.

    Attributes:
        num_blocks: blocks of the source model.
        num_remove: how many to remove.
        analysis: the redundancy analysis, for selectors that read it.
        seed: for selectors that draw, and for the positions at which costs are measured.
        model: the source model, in memory, for selectors that measure. The others do not look at its weights: they
            read off its config which sets can be folded, and without a model take it that all can.
        ids_WT: calibration windows, int64 [W, T], for selectors that measure; what the others chose is measured on
            them afterwards, if they are given.
        further_ids_WT: more of them, [W, T] with the same T. What `gates` could not tell apart is judged there in the
            end. Where removed blocks are compensated, fits know the first of them: those of a search begin at what was
            fitted there on the source's own states.
        copies: the share of each window, 0 to 0.5, whose text is replaced by that which it begins with, so that a set
            is also measured by how far it leaves the model able to copy from its context.
        objective: what is measured: "kl" to the source or "lm", the language-modelling loss.
        compensate: judge a set by what it costs after closed-form compensation.
        sublayers: remove attention and MLP apart, as many parameters as `num_remove` blocks have.
        checkpoint: a file to keep the progress of a long search in, and to go on from. It stays: whoever has saved the
            result drops it.
        options: what one selector alone understands; unknown ones are refused.
    """

    num_blocks: int
    num_remove: int
    analysis: Analysis | None = None
    seed: int = 0
    model: nn.Module | None = None
    ids_WT: Tensor | None = None
    further_ids_WT: Tensor | None = None
    copies: float = COPIES
    objective: Objective = "kl"
    compensate: bool = False
    sublayers: bool = False
    checkpoint: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_block(self) -> int:
        """Units in a block: two where its attention and its MLP are removed apart."""
        return 2 if self.sublayers else 1

    @property
    def num_units(self) -> int:
        """Units of the whole model."""
        return self.per_block * self.num_blocks

    @property
    def num_prior_windows(self) -> int:
        """On how many of the further windows priors are fitted; see `foldgpt.compensation.Priors`."""
        if not self.compensate or self.ids_WT is None or self.further_ids_WT is None:
            return 0
        return prior_windows(len(self.ids_WT), len(self.further_ids_WT))

    @property
    def prior_passes(self) -> float:
        """What priors take, in forward passes over the search's windows."""
        return 0.0 if self.ids_WT is None else prior_passes(self.num_prior_windows, len(self.ids_WT))

    def need_analysis(self, method: str) -> Analysis:
        """The analysis, or an error that says who needs it."""
        if self.analysis is None:
            raise UsageError(f"the selector {method!r} reads an analysis; run `foldgpt analyze` first")
        if self.analysis.num_blocks != self.num_blocks:
            raise UsageError(
                f"the analysis is of a model with {self.analysis.num_blocks} blocks, this one has {self.num_blocks}"
            )
        return self.analysis

    def foldable(self, removed: Iterable[int]) -> tuple[int, ...]:
        """Blocks in increasing order, if the model can be folded without them. Where no model is given, all are.

        Args:
            removed: the blocks to remove.

        Raises:
            PlanError: as `foldgpt.folding.fold_` says.
        """
        blocks = tuple(sorted(removed))
        if self.model is not None:
            # It refuses what `fold_` refuses, and in the same words; the number is of no interest.
            predicted_parameters(self.model, FoldPlan.create(source_model_of(self.model), removed=blocks))
        return blocks

    def need_cost(self, method: str, **options: Any) -> RemovalCost:
        """The measure of removed sets, made from the model and the windows.

        Args:
            method: the selector, for the message.
            options: further ones of `RemovalCost`.

        Raises:
            UsageError: the model or the windows are missing.
            UnsupportedModelError: the model cannot be replayed, or its sublayers are not known.
        """
        if self.model is None or self.ids_WT is None:
            raise UsageError(f"the selector {method!r} measures the model on calibration windows; give both")
        decoder = decoder_of(self.model)
        if len(decoder.blocks) != self.num_blocks:
            raise UsageError(f"the model has {len(decoder.blocks)} blocks, the request says {self.num_blocks}")
        if self.sublayers:
            units = Units.sublayers(decoder, self.num_remove)
        else:
            units = Units.blocks(self.num_blocks, self.num_remove, decoder)
        windows, tokens = self.ids_WT.shape if self.ids_WT.ndim == 2 else (1, 1)
        if self.ids_WT.ndim == 2 and tokens < 2:
            raise UsageError(f"a search compares predictions on windows of 2 tokens or more, and these have {tokens}")
        ids_WT, copied_WT = (self.ids_WT, None) if self.ids_WT.ndim != 2 else with_copies(self.ids_WT, self.copies)
        replay = Replay(self.model, ids_WT, batch_size=windows_at_once(windows, tokens))
        priors = None
        if self.num_prior_windows:
            assert self.further_ids_WT is not None
            priors = Priors(Replay(self.model, self.further_ids_WT[: self.num_prior_windows]))
        return RemovalCost(
            replay,
            copied_WT=copied_WT,
            units=units,
            objective=self.objective,
            compensate=self.compensate,
            priors=priors,
            seed=self.seed,
            **options,
        )

    def options_over(self, method: str, known: Mapping[str, Any]) -> dict[str, Any]:
        """The options over their defaults.

        Args:
            method: the selector, for the message.
            known: every option it understands, with its default.

        Raises:
            UsageError: an option that it does not understand.
        """
        for name in self.options:
            if name not in known:
                raise UsageError(f"the selector {method!r} has no option {name!r}.{did_you_mean(name, known)}")
        return {**known, **self.options}


def windows_at_once(num_windows: int, context: int) -> int:
    """Windows in a micro-batch. Searches look at a few micro-batches at a time, so there should be some."""
    return max(1, min(_BATCH_TOKENS // max(1, context), num_windows // _LEAST_BATCHES))


@dataclass(frozen=True)
class Selection:
    """What a selector answers.

    Attributes:
        method: its name.
        scores: one number a unit, higher = more worth keeping; None where the method does not score. Units are
            blocks, or with `Request.sublayers` attention and MLP of block 0, of block 1 and so on.
        order: all units it would remove, in that order; at least the removed ones.
        removed: the blocks to remove, increasing.
        removed_attention: blocks that stay but lose their attention, increasing.
        removed_mlp: blocks that stay but lose their MLP, increasing.
        report: what was measured on the way, and its cost, as JSON values: "seconds" and "forward_equivalents"
            (forward passes over all windows) of every measured selector, and what each adds.
    """

    method: str
    scores: tuple[float, ...] | None
    order: tuple[int, ...]
    removed: tuple[int, ...]
    removed_attention: tuple[int, ...] = ()
    removed_mlp: tuple[int, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    def least_needed(self) -> list[int]:
        """All units from the one that can best be missed on, as far as the scores tell."""
        scores = self.scores or ()
        return sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for `artifacts.write_json`."""
        return {"format": _FORMAT, "version": 1, **asdict(self)}

    @classmethod
    def from_json_dict(cls, value: Any) -> Selection:
        """Read what `to_json_dict` wrote.

        Raises:
            ArtifactError: not a selection; the message names the field.
        """
        if not isinstance(value, dict) or (value.get("format"), value.get("version")) != (_FORMAT, 1):
            raise ArtifactError(f"not a selection: its 'format' must be {_FORMAT!r}, version 1")
        fields = {name: content for name, content in value.items() if name not in ("format", "version")}
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            raise ArtifactError(f"invalid selection: {first_problem(error)}") from error


Selector = Callable[[Request], Selection]

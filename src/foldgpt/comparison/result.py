"""A finished comparison: one entry for each row, the source first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from foldgpt.artifacts import read_json
from foldgpt.comparison.training import Training
from foldgpt.errors import ArtifactError
from foldgpt.evaluation import (
    Evaluation,
    Interval,
    Measured,
    Perplexity,
    Retained,
    accuracy_difference,
    perplexity_difference,
)
from foldgpt.plan import FoldPlan
from foldgpt.recipe import Compare
from foldgpt.validation import explain

COMPARISON_FORMAT = "foldgpt.comparison"
VERSION = 1

#: The file that holds a comparison, in its folder.
COMPARISON = "comparison.json"
SOURCE = "source"


@dataclass(frozen=True)
class Finished:
    """A row that has been run.

    Attributes:
        name, recovered: as in `Row`.
        run: its run folder, relative to the comparison's.
        plan: what was cut.
        evaluation: what was measured, beside the source.
        seconds: time from model and text to the smaller model: what the method measures, its search, folding, and
            recovery, with loading the model where one of these had to. None where it is not known.
        training: what the recovery did; None without one.
    """

    name: str
    recovered: bool
    run: str
    plan: FoldPlan
    evaluation: Evaluation
    seconds: float | None
    training: Training | None = None


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        name, recovered, run, seconds: as in `Finished`; the source has no run.
        removed: source indices of the removed blocks; of those that lost a sublayer, see the plan.
        num_sharing: blocks that share weights.
        figures: what was measured, by name, as `Measured.figures()` has it.
        decode_ratio: decode speed over the source's, measured in turns.
        retained: what is left of the source's mean accuracy.
        budget_gap: parameters in the blocks over the reference row's, minus 1.
        is_fair: whether that is within the tolerance.
        perplexities: text → perplexity.
        perplexity_differences: text → difference to the reference row of the same recovery setting; empty for that
            row itself, and where there is none.
        accuracy_difference: the same of the mean accuracy.
        trained_tokens: tokens of its recovery; None without one, and where it is not known.
        training_ended: what ended that: "tokens", "time" or "patience".
        own_settings: names of the recovery's settings that are not the reference row's.
        is_trained_alike: whether it saw as many tokens as the reference row.
    """

    name: str
    recovered: bool
    run: str | None
    seconds: float | None
    removed: list[int]
    num_sharing: int
    figures: dict[str, float | None]
    decode_ratio: float | None
    retained: Retained | None
    budget_gap: float | None
    is_fair: bool
    perplexities: dict[str, float]
    perplexity_differences: dict[str, Interval]
    accuracy_difference: Interval | None
    trained_tokens: int | None = None
    training_ended: str | None = None
    own_settings: list[str] = field(default_factory=list)
    is_trained_alike: bool = True

    @property
    def title(self) -> str:
        """Name and recovery in one."""
        return f"{self.name} + recovery" if self.recovered else self.name


@dataclass(frozen=True)
class Comparison:
    """All rows, and how they were compared.

    Attributes:
        model: the source, as the recipe names it.
        texts: those that perplexity was measured on.
        tasks: task → chance, in the order of the table.
        reference: the row that the others are compared with.
        methods: the source, then the rows without recovery, then those with it.
        confidence, samples, seed: of the intervals.
        budget_tolerance: beyond which a row is marked.
        recovery_tokens: tokens that the recipe asks for; 0 without recovery. What a row was given, `Method` says.
        protocol: how it was measured, one line for each kind.
        environment: versions and hardware.
    """

    model: str
    texts: list[str]
    tasks: dict[str, float]
    reference: str
    methods: list[Method]
    confidence: float
    samples: int
    seed: int
    budget_tolerance: float
    recovery_tokens: int
    protocol: list[str]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with its format and version."""
        return {"format": COMPARISON_FORMAT, "version": VERSION, **_ADAPTER.dump_python(self, mode="json")}

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read `comparison.json`, or the one inside a folder.

        Raises:
            ArtifactError: it is missing, of another format or version, or damaged.
        """
        path = Path(path)
        path = path / COMPARISON if path.is_dir() else path
        value = read_json(path, "comparison")
        if not isinstance(value, dict) or value.pop("format", None) != COMPARISON_FORMAT:
            raise ArtifactError(f"{path} is not a comparison (its format should be {COMPARISON_FORMAT!r}).")
        version = value.pop("version", None)
        if version != VERSION:
            raise ArtifactError(f"{path} has version {version}; this foldgpt reads {VERSION}.")
        try:
            return _ADAPTER.validate_python(value)
        except ValidationError as error:
            raise ArtifactError(f"{path}: {explain(error)}") from error

    @classmethod
    def of(
        cls,
        rows: Sequence[Finished],
        section: Compare,
        *,
        model: str,
        seed: int,
        recovery_tokens: int,
        protocol: list[str],
        environment: dict[str, Any],
    ) -> Comparison:
        """Put finished rows side by side.

        Args:
            rows: at least one, each measured beside the source; the reference row among them.
            section: how they are compared.
            model: the source.
            seed: of the resamples.
            recovery_tokens: tokens that the recipe asks for; 0 without recovery.
            protocol: how it was measured.
            environment: versions and hardware.

        Raises:
            MeasurementError: rows were not measured on the same windows and items.
        """
        source = rows[0].evaluation.baseline
        assert source is not None
        references = {row.recovered: row for row in rows if row.name == section.reference}
        tasks = {task: score.chance for task, score in (source.tasks or {}).items()}
        return cls(
            model=model,
            texts=list(_perplexities(source)),
            tasks=tasks,
            reference=section.reference,
            methods=[_source(source), *(_method(row, references, section, seed) for row in rows)],
            confidence=section.confidence,
            samples=section.bootstrap_samples,
            seed=seed,
            budget_tolerance=section.budget_tolerance,
            recovery_tokens=recovery_tokens,
            protocol=protocol,
            environment=environment,
        )


_ADAPTER = TypeAdapter(Comparison)


def _source(measured: Measured) -> Method:
    return Method(
        name=SOURCE,
        recovered=False,
        run=None,
        seconds=None,
        removed=[],
        num_sharing=0,
        figures=measured.figures(),
        decode_ratio=None if measured.speed is None else 1.0,
        retained=None,
        budget_gap=None,
        is_fair=True,
        perplexities=_values(measured),
        perplexity_differences={},
        accuracy_difference=None,
    )


def _method(row: Finished, references: dict[bool, Finished], section: Compare, seed: int) -> Method:
    own = row.evaluation.folded
    # A reference without this recovery setting compares nothing; the budget is the same with and without.
    reference = references.get(row.recovered)
    budget = next(iter(references.values())).evaluation.folded.size.block_parameters
    gap = own.size.block_parameters / budget - 1
    perplexities: dict[str, Interval] = {}
    accuracy = None
    if reference is not None and reference is not row:
        other = reference.evaluation.folded
        how: dict[str, Any] = {"samples": section.bootstrap_samples, "confidence": section.confidence, "seed": seed}
        theirs = _perplexities(other)
        perplexities = {
            text: perplexity_difference(scores, theirs[text], **how) for text, scores in _perplexities(own).items()
        }
        if own.tasks and other.tasks:
            accuracy = accuracy_difference(own.tasks, other.tasks, **how)
    own_training, its_training = row.training, None if reference is None else reference.training
    both = None if own_training is None or its_training is None else (own_training, its_training)
    return Method(
        name=row.name,
        recovered=row.recovered,
        run=row.run,
        seconds=row.seconds,
        removed=list(row.plan.removed),
        num_sharing=len({block for group in row.plan.groups for block in group.blocks}),
        figures=own.figures(),
        decode_ratio=None if own.speed is None else own.speed.decode.ratio,
        retained=(row.evaluation.retained or {}).get("average"),
        budget_gap=gap,
        is_fair=abs(gap) <= section.budget_tolerance,
        perplexities=_values(own),
        perplexity_differences=perplexities,
        accuracy_difference=accuracy,
        trained_tokens=None if own_training is None else own_training.num_tokens,
        training_ended=None if own_training is None else own_training.ended,
        own_settings=[] if both is None else both[0].differing_from(both[1]),
        is_trained_alike=both is None or both[0].is_as_long_as(both[1]),
    )


def _perplexities(measured: Measured) -> dict[str, Perplexity]:
    """Name of the text → perplexity, the first text first."""
    return dict(measured.perplexities().values())


def _values(measured: Measured) -> dict[str, float]:
    return {text: scores.value for text, scores in _perplexities(measured).items()}

"""Recipe: a whole run as one validated value, in YAML or Python."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from foldgpt.artifacts import write_text
from foldgpt.block_lists import blocks_of
from foldgpt.counts import count
from foldgpt.errors import ArtifactError, UsageError
from foldgpt.plan import SUBLAYERS, Sublayer
from foldgpt.sizes import size
from foldgpt.strict_yaml import load_yaml
from foldgpt.targets import target
from foldgpt.validation import explain

#: Names of number formats in other tools.
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    BeforeValidator(lambda value: _SHORT.get(value, value) if isinstance(value, str) else value),
]


def _count(value: Any) -> Any:
    return count(value) if isinstance(value, str) else value


#: A number of tokens; `2M` and `500k` are read as well.
Tokens = Annotated[
    int,
    BeforeValidator(_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "examples": ["500k", "2M"]}]}),
]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Calibration(_Section):
    """The text on which redundancy is measured."""

    texts: list[str] = Field(default=["demo:wikipedia"], min_length=1)
    """Texts: files (txt, jsonl, parquet; globs), `hub:NAME`, `demo:wikipedia`, or `self:`, what the model writes."""
    context: int = Field(default=512, ge=2)
    """Tokens in one window."""
    num_tokens: Tokens = Field(default=32_768, ge=2)
    """Tokens in all windows together."""


#: Calibration tokens of a search, unless others are asked for.
SEARCH_TOKENS = 4096

#: Keys that say how many blocks go; one at most is given.
BUDGETS = ("remove", "remove_ratio", "target")


class Select(_Section):
    """Which blocks are removed."""

    method: str = "gates"
    """Selector: gates, greedy, loo, taylor, bi, angular, last, random or blocks (those that `options.blocks` names)."""
    remove: int | None = Field(default=None, ge=0)
    """How many blocks to remove."""
    remove_ratio: float | None = Field(default=None, ge=0, lt=1)
    """The same as a fraction of all blocks."""
    target: str | None = None
    """What the folded model may take, in place of a number of blocks: `parameters=95M`, `flops=80%`, `prefill=80%` or
    `decode=25ms`; a part is of what the source takes. See docs/selection.md."""
    objective: Literal["kl", "lm"] = "kl"
    """What searches measure: kl, the divergence from the source, or lm, the language-modelling loss."""
    sublayers: bool = False
    """Remove attention and MLP apart, as many parameters as that many blocks have."""
    num_tokens: Tokens | None = Field(default=None, ge=2)
    """Calibration tokens that removals are measured on, of those in the calibration section; gates judge on others of
    them what comes out level. By default 4,096. With compensation the fits of all measured selectors begin at what is
    fitted on further ones."""
    copies: float = Field(default=0.0625, ge=0, le=0.5)
    """The share of each of these windows in which its beginning is repeated, so that a removal counts which leaves the
    model less able to copy from its context."""
    options: dict[str, Any] = {}
    """What one selector alone understands; see docs/selection.md."""

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_are_named(cls, value: Any) -> Any:
        """How many go is known where they are named."""
        if not isinstance(value, Mapping) or value.get("method") != "blocks":
            return value
        options = value.get("options")
        named = options.get("blocks") if isinstance(options, Mapping) else None
        if named is None or any(value.get(budget) is not None for budget in BUDGETS):
            return value
        return {**value, "remove": len(blocks_of(named, "select.options.blocks"))}

    @field_validator("target")
    @classmethod
    def _readable_target(cls, written: str | None) -> str | None:
        if written is not None:
            target(written)
        return written

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [f"select.{name}" for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}")
        if self.target is not None and target(self.target).what != "parameters" and self.sublayers:
            raise ValueError("with select.sublayers, select.target can be of parameters alone")
        return self

    @property
    def removes_anything(self) -> bool:
        """Whether blocks are to go."""
        return bool(self.remove or self.remove_ratio or self.target)


class Compensate(_Section):
    """How kept blocks make up for removed ones, without new parameters."""

    method: Literal["none", "linear"] = "linear"
    """linear: a map fitted in closed form on the calibration text and merged into the block before each cut."""


#: Keys of the share section that say how blocks share weights, whichever they are.
_HOW_SHARED = ("group_size", "sublayers", "donor", "fit", "rank", "scales", "start")


class Share(_Section):
    """Which blocks share weights, and what each has beside them."""

    method: Literal["none", "adjacent", "auto"] = "none"
    """How groups are made. auto: removal, positions that borrow and groups are measured, and the best is taken; it
    needs a size, which takes the place of select.remove."""
    size: float | int | str | None = None
    """For auto: what the folded model may have, as a fraction of the parameters in blocks (0.7), as parameters of the
    whole model (95M), or as bytes of its weights (200MB)."""
    group_size: int = Field(default=2, ge=2)
    """Blocks in a group."""
    sublayers: list[Sublayer] = Field(default=list(SUBLAYERS), min_length=1)
    """What a group shares: attention, mlp or both."""
    donor: Literal["first", "last", "best", "mean", "least_squares"] = "first"
    """How the shared weights are made: those of the first or last member, of the best one by measured KL, the mean of
    all, or least_squares, fitted to all."""
    fit: bool = False
    """Fit shared weights and private terms on the calibration text when the model is folded; see docs/sharing.md."""
    rank: int = Field(default=0, ge=0)
    """Rank of the low-rank terms that each position has beside shared weights; 0 for none."""
    scales: bool = False
    """Give each position factors of its own for the channels of what attention and MLP add to the stream."""
    start: Literal["hard", "zero"] = "hard"
    """hard: kept blocks share from the beginning. zero: removed blocks keep a position, which borrows the weights of
    the nearest kept block and contributes nothing until training makes it; it always has scales."""

    @model_validator(mode="after")
    def _some_method(self) -> Self:
        if len(set(self.sublayers)) != len(self.sublayers):
            raise ValueError(f"sublayers are named twice: {self.sublayers}")
        if self.method == "none":
            for name in _HOW_SHARED:
                if self._is_given(name):
                    raise ValueError(f"share.{name} says how blocks share weights, but share.method is none")
        if self.donor == "least_squares" and not self.fit:
            raise ValueError("share.donor least_squares is fitted: it needs share.fit")
        if self.start == "zero":
            for name in ("donor", "group_size"):
                if self._is_given(name):
                    raise ValueError(
                        f"positions that start at zero borrow from the nearest kept block; leave share.{name} out"
                    )
        if (self.size is not None) != (self.method == "auto"):
            raise ValueError(
                "share.size and share.method auto go together: auto needs a size, and other methods read none"
            )
        if self.size is not None:
            size(self.size)
        if self.method == "auto":
            for name in _HOW_SHARED:
                if self._is_given(name):
                    raise ValueError(f"share.method auto chooses share.{name} itself; leave it out")
        return self

    def _is_given(self, name: str) -> bool:
        """Whether a value is not the default, which a saved recipe spells out."""
        return bool(getattr(self, name) != type(self).model_fields[name].get_default())


class Recover(_Section):
    """How the folded model is trained to do again what its source does."""

    num_tokens: Tokens = Field(default=0, ge=0)
    """Tokens to train on; 0 for no recovery."""
    texts: list[str] | None = Field(default=None, min_length=1)
    """Texts and chats to train on; the calibration texts by default."""
    context: int = Field(default=512, ge=2)
    """Tokens in one window."""
    held_out_tokens: Tokens = Field(default=16_384, ge=2)
    """Tokens, of other documents, on which the best state is chosen."""
    separate_documents: bool = False
    """Let a token see its own document alone; it costs speed."""
    minutes: float | None = Field(default=None, gt=0)
    """Stop training after this time."""
    teacher_cache: str | None = None
    """Folder in which what students are compared with on the training text is kept, for later runs on the same text."""
    report_to: list[str] = []
    """Loggers as transformers names them: tensorboard, wandb, trackio."""
    settings: dict[str, Any] = {}
    """Losses, trained parameters and schedule, such as rank or learning_rate; see docs/recovery.md."""


class Evaluate(_Section):
    """What is measured of the folded model beside the source."""

    texts: list[str] = ["demo:wikipedia-test"]
    """Texts for perplexity, each by itself and from its start; last words are of the first. Empty for none."""
    context: int = Field(default=512, ge=2)
    """Tokens in one window."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens from one window to the next, at most the context; without overlap by default, each token scored once."""
    max_windows: int | None = Field(default=40, ge=1)
    """Use the first windows only; null for all."""
    speed: bool = True
    """Measure prefill and decode speed."""
    memory: bool = True
    """Measure peak memory, each model in a process of its own."""
    tasks: list[str] = []
    """Multiple-choice tasks of lm-evaluation-harness, such as piqa; see docs/tasks.md."""
    data_dir: str | None = None
    """Folder of JSON-lines files to read the tasks' items from; without one they come from the hub."""
    limit: int | None = Field(default=None, ge=1)
    """Score the first items of each task only; null for all."""
    generations: int = Field(default=3, ge=0)
    """How many beginnings of the test text each model continues, to be read side by side."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        if not self.tasks:
            for name in ("data_dir", "limit"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"evaluate.{name} is for tasks, and there are none: name some (evaluate.tasks), or leave it out"
                    )
        if self.stride is not None and not self.texts:
            raise ValueError(
                "evaluate.stride is for texts, and there are none: name some (evaluate.texts), or leave it out"
            )
        if self.stride is not None and self.stride > self.context:
            raise ValueError(
                f"evaluate.stride is {self.stride:,}, more than the context, and would pass over tokens: give at most "
                f"{self.context:,}"
            )
        return self


class Compare(_Section):
    """What `foldgpt compare` puts side by side."""

    rows: dict[str, dict[str, Any] | None] | None = Field(default=None, min_length=1)
    """Name of each row → what it changes in the recipe, section by section; null for what a known name stands for.
    All known rows by default, but loo and taylor; see docs/compare.md."""
    recovered: list[str] | None = None
    """Rows that are also shown with the recipe's recovery; all by default."""
    reference: str = "bi"
    """The row that the others are compared with, each with the one of its own recovery setting."""
    random_seeds: int = Field(default=1, ge=1)
    """How many draws of random blocks there are, each a row."""
    budget_tolerance: float = Field(default=0.01, ge=0, lt=1)
    """How far the parameters in a row's blocks may be from the reference row's, as a fraction of it."""
    unequal_budgets: Literal["refuse", "flag"] = "refuse"
    """What becomes of a row beyond that: nothing is run, or the row is marked and gets no verdict."""
    bootstrap_samples: int = Field(default=10_000, ge=100)
    """Resamples behind each interval."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Confidence of the intervals."""


class Recipe(_Section):
    """A whole run: which model, what is cut, how it is measured."""

    model: str
    """Hub id, local folder, GGUF file, or `demo:smollm2-135m` / `demo:gemma3-270m`."""
    revision: str | None = None
    """Revision on the hub."""
    dtype: DType = "auto"
    """Number format the model is loaded and computed in; auto is the checkpoint's own."""
    save_dtype: DType = "auto"
    """Number format the folded model is saved in; auto is that of the source's checkpoint, or `dtype` if that takes no
    more."""
    device: str = "auto"
    """Device to compute on; auto takes a GPU if there is one."""
    max_memory_gb: float | None = Field(default=None, gt=0)
    """Memory for the weights; a larger model is analysed from disk. 80 % of what is free by default."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of all that is drawn."""
    calibration: Calibration = Calibration()
    """The text on which redundancy is measured."""
    select: Select = Select()
    """Which blocks are removed."""
    compensate: Compensate = Compensate()
    """How kept blocks make up for removed ones."""
    share: Share = Share()
    """Which kept blocks share weights."""
    recover: Recover = Recover()
    """How the folded model is trained."""
    evaluate: Evaluate = Evaluate()
    """What is measured."""
    compare: Compare = Compare()
    """What is put side by side by `foldgpt compare`; a run by itself does not read it."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.share.method == "auto":
            for name in BUDGETS:
                if getattr(self.select, name) is not None:
                    raise ValueError(f"share.size says how small the model gets; leave select.{name} out")
            if self.select.sublayers:
                raise ValueError("share.method auto is for whole blocks; switch select.sublayers off")
        if self.select.target is not None and self.share.start == "zero":
            raise ValueError(
                "select.target is met by removing blocks, and with share.start zero they keep positions, with scales "
                "of their own: give a number of blocks (select.remove)"
            )
        return self

    @property
    def search_tokens(self) -> int:
        """Tokens that removals are measured on: what is asked for or the default, or all that there are."""
        return min(self.select.num_tokens or SEARCH_TOKENS, self.calibration.num_tokens)

    @property
    def training_texts(self) -> list[str]:
        """What recovery trains on: texts of its own, or those of the calibration."""
        return self.recover.texts or self.calibration.texts

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from YAML.

        Raises:
            ArtifactError: the file is missing or cannot be read.
            UsageError: it is not YAML, or a value is wrong; each one is named with its place.
        """
        path = Path(path)
        try:
            value = load_yaml(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(f"recipe not found: {path}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"cannot read the recipe {path}: {error}") from error
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or str(error)
            mark = getattr(error, "problem_mark", None)
            place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise UsageError(f"the recipe {path} is not valid YAML: {problem}{place}") from None
        if not isinstance(value, dict):
            raise UsageError(
                f"the recipe {path} must be a mapping of keys to values, such as `model: demo:smollm2-135m`"
            )
        return cls.from_dict(value, str(path))

    @classmethod
    def from_dict(cls, value: dict[str, Any], place: str = "recipe") -> Recipe:
        """Validate a recipe given as plain values.

        Raises:
            UsageError: a value is wrong; each one is named with its place, unknown keys with the nearest one.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise UsageError(f"{place}: {explain(error, cls)}") from None

    def save(self, path: str | Path) -> None:
        """Write the recipe, every default spelled out, as YAML."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    def changed(self, at: Mapping[str, Any] | None = None, *, place: str = "recipe", **sections: Any) -> Recipe:
        """A copy with other values; what they replace goes with it.

        Args:
            at: values by place, such as `evaluate.tasks` or `recover.settings.rank`; they stand over all others, and
                None is one.
            place: where the recipe comes from, for error messages.
            sections: values by name; `None` leaves one as it is, a dict changes parts of a section.

        Raises:
            UsageError: a value is wrong, or there is no such section or key.
        """
        at = dict(at or {})
        value = self.model_dump(mode="json")
        if at.get("model", sections.get("model")) not in (None, self.model):
            # A revision, and trust in code, are given to one model.
            value.update(revision=None, trust_remote_code=False)
        parts: dict[str, dict[str, Any]] = {}
        for name, change in sections.items():
            if isinstance(change, dict) and isinstance(value.get(name), dict):
                parts[name] = {key: part for key, part in change.items() if part is not None}
            elif change is not None:
                value[name] = change
        _check_apart(at)
        deeper: dict[str, Any] = {}
        for key, given in at.items():
            section, *inside = key.split(".")
            if len(inside) == 1 and isinstance(value.get(section), dict):
                parts.setdefault(section, {})[inside[0]] = given
            else:
                deeper[key] = given
        if "select.options.blocks" in at:
            parts.setdefault("select", {}).setdefault("options", {"blocks": at["select.options.blocks"]})
        merge_sections_(value, parts)
        for key, given in deeper.items():
            _set_(value, key, given)
        return type(self).from_dict(value, place)


def _check_apart(keys: Collection[str]) -> None:
    """Refuse to set a part of what is set whole as well.

    Raises:
        UsageError: names both.
    """
    for whole in keys:
        for part in keys:
            if part.startswith(f"{whole}."):
                raise UsageError(f"{whole} is set as a whole, and {part} in it as well: give one of them")


def _set_(value: dict[str, Any], key: str, given: Any) -> None:
    """Set what lies deeper than in a section, or a section as a whole, in place.

    Raises:
        UsageError: what should hold it holds no keys.
    """
    *outer, innermost = key.split(".")
    inside = value
    for depth, part in enumerate(outer):
        if part not in inside:
            inside[part] = {}
        elif not isinstance(inside[part], dict):
            holder = ".".join(outer[: depth + 1])
            raise UsageError(f"{key}: {holder} is {json.dumps(inside[part])}, which holds no keys; set {holder} itself")
        inside = inside[part]
    inside[innermost] = given


#: Selectors that can be asked for either objective.
TAKE_OBJECTIVE = frozenset(("gates", "greedy", "loo"))


def merge_sections_(value: dict[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Change parts of a recipe's sections, given as plain values, in place; what they replace goes with it.

    Args:
        value: the recipe.
        changes: section → keys and values.
    """
    selector = changes.get("select", {}).get("method")
    if selector is not None and selector != value["select"].get("method"):
        # Options are one selector's own, and not every one can remove attention and MLP apart.
        value["select"].update(options={}, sublayers=False)
        if selector not in TAKE_OBJECTIVE:
            value["select"]["objective"] = "kl"
    asked = any(changes.get("select", {}).get(name) is not None for name in BUDGETS)
    # Other blocks may be more or fewer.
    asked = asked or "blocks" in (changes.get("select", {}).get("options") or ())
    share = changes.get("share", {})
    # A count, a ratio, a target and a size are one wish: the new one takes the place of the old.
    if asked or share.get("size") is not None:
        value["select"].update(dict.fromkeys(BUDGETS))
    if asked and value["share"].get("method") == "auto" and "size" not in share:
        value["share"] = {}
    # What the section says beside its method belongs to that method.
    if share.get("method", value["share"].get("method")) != value["share"].get("method"):
        value["share"] = {}
    for name, parts in changes.items():
        value[name].update(parts)

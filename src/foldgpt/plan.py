"""FoldPlan: what happens to each block of a model. A frozen value, JSON on disk, that a person may edit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from foldgpt.artifacts import read_json, write_json
from foldgpt.errors import PlanError

Sublayer = Literal["attention", "mlp"]
SUBLAYERS: tuple[Sublayer, ...] = ("attention", "mlp")

FORMAT: Final = "foldgpt.plan"
VERSION: Final = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceModel(_Frozen):
    """The model a plan was made for.

    Attributes:
        model: how it was named: hub id, folder, GGUF file or `demo:` name.
        revision: revision on the hub, if one was given.
        model_type: the architecture, e.g. "llama".
        num_blocks: number of blocks.
    """

    model: str
    revision: str | None = None
    model_type: str
    num_blocks: int = Field(ge=1)


class Group(_Frozen):
    """Blocks that share one set of weights.

    Attributes:
        blocks: source indices of the members, increasing.
        sublayers: what is shared: attention, MLP or both.
        donor: how the shared weights are made from the members ("first", "last", "mean").
        private: what stays private to each position. Norms always do.
    """

    blocks: tuple[int, ...] = Field(min_length=2)
    sublayers: tuple[Sublayer, ...] = Field(default=SUBLAYERS, min_length=1)
    donor: str = "first"
    private: tuple[Literal["norms"]] = ("norms",)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"blocks of a group must be increasing and distinct, got {list(self.blocks)}")
        if len(set(self.sublayers)) != len(self.sublayers):
            raise ValueError(f"sublayers of group {list(self.blocks)} are named twice: {list(self.sublayers)}")
        return self


class Compensation(_Frozen):
    """How the kept blocks before each cut take over, in closed form, what the removed ones did.

    The fit is made when the model is folded, on this text, and merged into weights that are there already.

    Attributes:
        method: "linear": a linear map on the MLP's output; see docs/compensation.md.
        texts: the calibration texts.
        context: tokens in one window.
        num_tokens: tokens in all windows.
        seed: seed of their order.
        fingerprint: of the windows; folding refuses a text that has changed since.
        features: what the map reads: what the MLP's output matrix is given ("inner"), or what it puts out ("output").
        ridge: as a multiple of the Gram matrix's mean diagonal; "auto" takes the best on held-out tokens.
        rounds: rounds of alternating least squares where a norm stands behind the MLP.
    """

    method: Literal["linear"] = "linear"
    texts: tuple[str, ...] = Field(min_length=1)
    context: int = Field(ge=2)
    num_tokens: int = Field(ge=2)
    seed: int = 0
    fingerprint: str
    features: Literal["inner", "output"] = "inner"
    ridge: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    rounds: int = Field(default=3, ge=0)


class FoldPlan(_Frozen):
    """All that happens to a model, by source index. It alone decides; nothing else is consulted.

    Attributes:
        source: the model the plan is for.
        kept: source indices of the kept blocks.
        removed: source indices of the removed blocks. Kept and removed partition the blocks.
        removed_attention: kept blocks whose attention sublayer is removed.
        removed_mlp: kept blocks whose MLP sublayer is removed.
        groups: sets of kept blocks that share weights; disjoint for each sublayer.
        compensation: how kept blocks make up for removed ones; None leaves their weights as they are.
        origin: where the plan comes from (selector, scores, calibration); free-form, not read by `fold_`.
    """

    format: Literal["foldgpt.plan"] = FORMAT
    version: Literal[1] = VERSION
    source: SourceModel
    kept: tuple[int, ...]
    removed: tuple[int, ...] = ()
    removed_attention: tuple[int, ...] = ()
    removed_mlp: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()
    compensation: Compensation | None = None
    origin: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        num_blocks = self.source.num_blocks
        for name in ("kept", "removed", "removed_attention", "removed_mlp"):
            indices = getattr(self, name)
            if list(indices) != sorted(set(indices)):
                raise ValueError(f"{name} must be increasing and distinct, got {list(indices)}")
            outside = [i for i in indices if not 0 <= i < num_blocks]
            if outside:
                raise ValueError(f"{name} names block {outside[0]}, but the model has blocks 0 to {num_blocks - 1}")
        kept, removed = set(self.kept), set(self.removed)
        if kept & removed:
            raise ValueError(f"blocks {sorted(kept & removed)} are both kept and removed")
        if missing := sorted(set(range(num_blocks)) - kept - removed):
            raise ValueError(f"blocks {missing} are neither kept nor removed")
        if not kept:
            raise ValueError(f"every block is removed (all {num_blocks}); a model needs at least one")
        for name in ("removed_attention", "removed_mlp"):
            if gone := sorted(set(getattr(self, name)) - kept):
                raise ValueError(f"{name} names blocks {gone}, which are removed whole")
        if both := sorted(set(self.removed_attention) & set(self.removed_mlp)):
            raise ValueError(f"blocks {both} lose attention and MLP both; list them under removed instead")
        self._check_groups(kept)
        return self

    def _check_groups(self, kept: set[int]) -> None:
        for sublayer, absent in (("attention", self.removed_attention), ("mlp", self.removed_mlp)):
            owner: dict[int, tuple[int, ...]] = {}
            for group in self.groups:
                if sublayer not in group.sublayers:
                    continue
                for block in group.blocks:
                    if block not in kept:
                        raise ValueError(f"group {list(group.blocks)} holds block {block}, which is not kept")
                    if block in absent:
                        raise ValueError(f"group {list(group.blocks)} shares the removed {sublayer} of block {block}")
                    if block in owner:
                        raise ValueError(
                            f"groups {list(owner[block])} and {list(group.blocks)} both share the {sublayer} "
                            f"of block {block}"
                        )
                    owner[block] = group.blocks

    @classmethod
    def create(
        cls,
        source: SourceModel,
        *,
        removed: Iterable[int] = (),
        removed_attention: Iterable[int] = (),
        removed_mlp: Iterable[int] = (),
        groups: Sequence[Group] = (),
        compensation: Compensation | None = None,
        origin: dict[str, Any] | None = None,
    ) -> FoldPlan:
        """Make a plan from what is removed and shared; all else is kept.

        Raises:
            PlanError: the parts contradict each other or the model.
        """
        gone = sorted(set(removed))
        kept = [index for index in range(source.num_blocks) if index not in set(gone)]
        return cls.from_json_dict(
            {
                "source": source.model_dump(),
                "kept": kept,
                "removed": gone,
                "removed_attention": sorted(set(removed_attention)),
                "removed_mlp": sorted(set(removed_mlp)),
                "groups": [group.model_dump() for group in groups],
                "compensation": None if compensation is None else compensation.model_dump(),
                "origin": origin or {},
            }
        )

    @classmethod
    def from_json_dict(cls, value: Any, place: str = "plan") -> FoldPlan:
        """Validate a plan read from JSON.

        Args:
            value: the parsed JSON.
            place: where it came from, for the error message.

        Raises:
            PlanError: another format or version, or what is wrong with each field.
        """
        if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
            raise PlanError(f"{place}: not a plan: its 'format' is {value['format']!r}, expected {FORMAT!r}")
        if isinstance(value, dict) and value.get("version", VERSION) != VERSION:
            raise PlanError(
                f"{place}: plan of version {value['version']!r}, but this foldgpt reads version {VERSION}. "
                "Update foldgpt, or make the plan again."
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise PlanError(f"{place}: {explain(error)}") from None

    @classmethod
    def load(cls, path: str | Path) -> FoldPlan:
        """Read a plan from a JSON file, or from the `plan.json` inside a folder."""
        path = Path(path)
        if path.is_dir():
            path = path / "plan.json"
        return cls.from_json_dict(read_json(path, "plan"), str(path))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_json(path, self.to_json_dict())

    def to_json_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return self.model_dump(mode="json")

    @property
    def position_of(self) -> dict[int, int]:
        """Source index → position in the folded model, for kept blocks."""
        return {source: position for position, source in enumerate(self.kept)}

    @property
    def is_identity(self) -> bool:
        """Whether the plan changes nothing."""
        return not (self.removed or self.removed_attention or self.removed_mlp or self.groups)

    @property
    def is_removal_only(self) -> bool:
        """Whether the result is an ordinary model of the source's class: whole blocks removed, nothing else."""
        return not (self.removed_attention or self.removed_mlp or self.groups)


def explain(error: ValidationError) -> str:
    """A pydantic error as one readable line: place, problem, given value."""
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        elif item["type"] != "value_error" and not isinstance(item["input"], (dict, list)):
            message = f"{message} (got {item['input']!r})"
        lines.append(f"{place}: {message}" if place else message)
    return "; ".join(lines)

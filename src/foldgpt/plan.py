"""FoldPlan: what happens to each block of a model. A frozen value, JSON on disk, that a person may edit."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from foldgpt.artifacts import read_json, write_json
from foldgpt.errors import PlanError
from foldgpt.validation import explain

Sublayer = Literal["attention", "mlp"]
SUBLAYERS: tuple[Sublayer, ...] = ("attention", "mlp")

#: How the weights that a group shares are made: see `Group.donor`.
Donor = Literal["first", "last", "owner", "mean", "least_squares"]

FORMAT: Final = "foldgpt.plan"
VERSION: Final = 2
#: Selectors that look at no text: one that their plan names is for what is measured, fitted or shared. Named here, as
#: to show a plan nothing is imported that takes seconds.
WITHOUT_TEXT: Final = ("last", "random", "blocks")
#: Earlier versions that are read too. Version 1 had groups without private terms.
_UPGRADED: Final = (1,)


def _as_int(value: Any) -> Any:
    """numpy's whole numbers are as good as Python's."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


#: JSON has whole numbers, so neither "3" nor 3.0 nor true is taken for one.
_Whole = Annotated[int, Strict(), BeforeValidator(_as_int)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceModel(_Frozen):
    """The model a plan was made for.

    Attributes:
        model: how it was named: hub id, folder, GGUF file or `demo:` name.
        revision: revision on the hub, if one was given.
        model_type: the architecture, e.g. "llama".
        num_blocks: number of blocks.
        fingerprint: of its config and weights, where it was read from files; folding other weights says so.
    """

    model: str
    revision: str | None = None
    model_type: str
    num_blocks: _Whole = Field(ge=1)
    fingerprint: str | None = None


#: Leaf (a linear layer by its name inside the block) → rank for all members, or one rank for each member.
RankByLeaf = dict[str, Annotated[_Whole, Field(ge=0)] | tuple[Annotated[_Whole, Field(ge=0)], ...]]


class Group(_Frozen):
    """Blocks that share one set of weights.

    A group starts "hard", its members sharing from the beginning, or at "zero": then one member, the owner, is an
    ordinary block, and each other one a position in place of a removed block, which borrows the owner's weights and
    contributes nothing to the stream until training makes it.

    Attributes:
        blocks: source indices of the members, increasing.
        sublayers: what is shared: attention, MLP or both.
        donor: how the shared weights are made from the members: "first", "last" or "owner" takes that one's own,
            "mean" averages, "least_squares" is fitted.
        owner: source index of the member whose weights are taken; with donor "owner" only.
        start: "hard" or "zero".
        private: what stays private to each position: norms always, and "scales", one factor for each channel of what
            a sublayer adds to the stream. They begin at 1, or at 0 in a group that starts at zero.
        ranks: rank of the private low-rank terms: one for all linear layers that are shared, or leaf → rank, which is
            one for all members or a list of one for each.
        norms: whose norms a position begins with: its "own" block's, or the "owner"'s.
    """

    blocks: tuple[_Whole, ...] = Field(min_length=2)
    sublayers: tuple[Sublayer, ...] = Field(default=SUBLAYERS, min_length=1)
    donor: Donor = "first"
    owner: _Whole | None = None
    start: Literal["hard", "zero"] = "hard"
    private: tuple[Literal["norms", "scales"], ...] = ("norms",)
    ranks: Annotated[_Whole, Field(ge=0)] | RankByLeaf = 0
    norms: Literal["own", "owner"] = "own"

    @field_validator("ranks", mode="wrap")
    @classmethod
    def _readable_ranks(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """Say in one sentence what pydantic says once for each form that ranks may have."""
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(
                "a rank is a whole number from 0; give one for all layers, or for each layer by name one or a list of "
                f"one for each block, got {value!r}"
            ) from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        blocks = list(self.blocks)
        if blocks != sorted(set(blocks)):
            raise ValueError(f"blocks of a group must be increasing and distinct, got {blocks}")
        for name in ("sublayers", "private"):
            values = list(getattr(self, name))
            if len(set(values)) != len(values):
                raise ValueError(f"{name} of group {blocks} are named twice: {values}")
        if "norms" not in self.private:
            raise ValueError(f"norms are private in every group, so private of group {blocks} must name them")
        if self.donor == "owner" and self.owner not in self.blocks:
            raise ValueError(f"owner of group {blocks} must be one of its blocks, got {self.owner}")
        if self.donor != "owner" and self.owner is not None:
            raise ValueError(
                f"group {blocks} has owner {self.owner} and donor {self.donor!r}; only donor 'owner' takes its weights"
            )
        self._check_start()
        self._check_ranks()
        return self

    def _check_start(self) -> None:
        if self.start == "zero" and self.giver is None:
            raise ValueError(
                f"group {list(self.blocks)} starts at zero, so one member must give its weights: donor 'first', 'last' "
                f"or 'owner', not {self.donor!r}"
            )
        if self.start == "zero" and "scales" not in self.private:
            raise ValueError(
                f"group {list(self.blocks)} starts at zero, and what begins at 0 are the scales: name them in private"
            )
        if self.norms == "owner" and self.giver is None:
            raise ValueError(f"group {list(self.blocks)} has donor {self.donor!r}; no member's norms go with it")

    def _check_ranks(self) -> None:
        if isinstance(self.ranks, int):
            return
        for leaf, ranks in self.ranks.items():
            if isinstance(ranks, int):
                continue
            if len(ranks) != len(self.blocks):
                raise ValueError(
                    f"group {list(self.blocks)} has {len(self.blocks)} members, but {len(ranks)} ranks for {leaf}"
                )
            if self.giver is not None and ranks[self.blocks.index(self.giver)]:
                raise ValueError(
                    f"block {self.giver} gives group {list(self.blocks)} its weights and needs no low-rank term: its "
                    f"rank for {leaf} must be 0, got {ranks[self.blocks.index(self.giver)]}"
                )

    @property
    def giver(self) -> int | None:
        """Source index of the member whose very weights are shared; None where they are made of several."""
        return {"first": self.blocks[0], "last": self.blocks[-1], "owner": self.owner}.get(self.donor)

    @property
    def holder(self) -> int:
        """Source index of the member at whose position the shared weights are kept."""
        return self.blocks[0] if self.giver is None else self.giver

    @property
    def fitted_members(self) -> tuple[int, ...]:
        """The members that have private scales and low-rank terms: all but the one that gives its weights."""
        return tuple(block for block in self.blocks if block != self.giver)

    @property
    def started_at_zero(self) -> tuple[int, ...]:
        """The members whose positions begin by contributing nothing."""
        return self.fitted_members if self.start == "zero" else ()

    def rank_of(self, leaf: str, block: int) -> int:
        """Rank of the low-rank term of one leaf at the position of one member.

        Args:
            leaf: name of a shared linear layer inside the block, such as "mlp.up_proj".
            block: source index of the member.
        """
        if block == self.giver:
            return 0
        ranks = self.ranks if isinstance(self.ranks, int) else self.ranks.get(leaf, 0)
        return ranks if isinstance(ranks, int) else ranks[self.blocks.index(block)]


class CalibrationText(_Frozen):
    """The text that something was fitted on, or is to be fitted on.

    Attributes:
        texts: the calibration texts.
        context: tokens in one window.
        num_tokens: tokens in all windows.
        seed: seed of their order.
        fingerprint: of the windows; folding refuses a text that has changed since.
    """

    texts: tuple[str, ...] = Field(min_length=1)
    context: _Whole = Field(ge=2)
    num_tokens: _Whole = Field(ge=2)
    seed: _Whole = 0
    fingerprint: str


class Compensation(CalibrationText):
    """How the kept blocks before each cut take over, in closed form, what the removed ones did.

    The fit is made when the model is folded, on this text, and merged into weights that are there already.

    Attributes:
        method: "linear": a linear map into the stream behind the MLP; see docs/compensation.md.
        features: what the map reads: what the MLP's output matrix is given ("inner"), or what it puts out ("output").
        ridge: as a multiple of the Gram matrix's mean diagonal; "auto" takes the best on held-out tokens.
        rounds: rounds of alternating least squares where a norm stands behind the MLP.
    """

    method: Literal["linear"] = "linear"
    features: Literal["inner", "output"] = "inner"
    ridge: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    rounds: _Whole = Field(default=3, ge=0)

    @field_validator("ridge", mode="wrap")
    @classmethod
    def _readable_ridge(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"a penalty is a number from 0, or 'auto'; got {value!r}") from None


class Fitting(CalibrationText):
    """On which text the shared weights and private terms of the groups are fitted, when the model is folded."""


class FoldPlan(_Frozen):
    """All that happens to a model, by source index. It alone decides; nothing else is consulted.

    Attributes:
        source: the model the plan is for.
        kept: source indices of the blocks that have a position in the folded model; those that start at zero too.
        removed: source indices of the removed blocks. Kept and removed partition the blocks.
        removed_attention: kept blocks whose attention sublayer is removed.
        removed_mlp: kept blocks whose MLP sublayer is removed.
        groups: sets of kept blocks that share weights; disjoint for each sublayer.
        compensation: how kept blocks make up for removed ones; None leaves their weights as they are. What starts at
            zero counts as removed here, as it does in searches: see `at_start`.
        fitting: on which text the groups are fitted; None makes shared weights of the members' alone, and private
            terms begin without effect.
        origin: where the plan comes from (selector, scores, calibration); free-form, not read by `fold_`.
    """

    format: Literal["foldgpt.plan"] = FORMAT
    version: Literal[2] = VERSION
    source: SourceModel
    kept: tuple[_Whole, ...]
    removed: tuple[_Whole, ...] = ()
    removed_attention: tuple[_Whole, ...] = ()
    removed_mlp: tuple[_Whole, ...] = ()
    groups: tuple[Group, ...] = ()
    compensation: Compensation | None = None
    fitting: Fitting | None = None
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
        fitting: Fitting | None = None,
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
                "fitting": None if fitting is None else fitting.model_dump(),
                "origin": origin or {},
            }
        )

    @classmethod
    def from_json_dict(cls, value: Any, place: str = "plan") -> FoldPlan:
        """Validate a plan read from JSON; one of an earlier version is upgraded.

        Args:
            value: the parsed JSON.
            place: where it came from, for the error message.

        Raises:
            PlanError: another format or version, or what is wrong with each field.
        """
        if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
            raise PlanError(f"{place}: not a plan: its 'format' is {value['format']!r}, expected {FORMAT!r}")
        if isinstance(value, dict) and (version := value.get("version", VERSION)) != VERSION:
            if version not in _UPGRADED or isinstance(version, bool):
                raise PlanError(
                    f"{place}: plan of version {version!r}, but this foldgpt reads versions up to {VERSION}. "
                    "Update foldgpt, or make the plan again."
                )
            value = {**value, "version": VERSION}
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise PlanError(f"{place}: {explain(error, cls)}") from None

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
    def absent_sublayers(self) -> dict[int, Sublayer]:
        """Source index of each kept block that lacks a sublayer → which of the two."""
        absent: dict[int, Sublayer] = dict.fromkeys(self.removed_attention, "attention")
        absent.update(dict.fromkeys(self.removed_mlp, "mlp"))
        return absent

    @property
    def at_start(self) -> FoldPlan:
        """The plan in which what starts at zero is removed; before any fit or training, both models compute the same.

        Removal is measured, and compensated, by this plan.
        """
        absent: dict[Sublayer, set[int]] = {"attention": set(self.removed_attention), "mlp": set(self.removed_mlp)}
        for group in self.groups:
            for sublayer in group.sublayers:
                absent[sublayer] |= set(group.started_at_zero)
        whole = absent["attention"] & absent["mlp"]
        return self.create(
            self.source,
            removed={*self.removed, *whole},
            removed_attention=absent["attention"] - whole,
            removed_mlp=absent["mlp"] - whole,
            groups=[group for group in self.groups if group.start == "hard"],
            compensation=self.compensation,
            fitting=self.fitting,
            origin=self.origin,
        )

    @property
    def removal(self) -> dict[str, list[int]]:
        """What was chosen for removal, as JSON values; what starts at zero was chosen so."""
        start = self.at_start
        return {name: list(getattr(start, name)) for name in ("removed", "removed_attention", "removed_mlp")}

    @property
    def was_edited(self) -> bool:
        """Whether something else is removed than was chosen, as far as the origin says what was (`origin.selected`)."""
        selected = self.origin.get("selected")
        return selected is not None and selected != self.removal

    @property
    def is_removal_only(self) -> bool:
        """Whether the result is an ordinary model of the source's class: whole blocks removed, nothing else."""
        return not (self.removed_attention or self.removed_mlp or self.groups)

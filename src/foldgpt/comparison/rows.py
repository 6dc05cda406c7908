"""The rows of a comparison: each is a name and a change to the recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foldgpt.comparison.result import SOURCE
from foldgpt.errors import UsageError, did_you_mean
from foldgpt.progress import note
from foldgpt.recipe import Recipe, merge_sections_
from foldgpt.sizes import size
from foldgpt.targets import target

#: The model, the texts and the measurements are the same for all rows: that makes it a comparison.
_CHANGEABLE = ("select", "compensate", "share", "recover")
_NOT_FOLDERS = re.compile(r"[^a-z0-9]+")

#: What the further draws of `random` are called, with their seed behind it.
_FURTHER_DRAW = "random, seed "
#: Known rows that are there where the recipe names them alone.
_ON_REQUEST = ("loo", "taylor")

#: Losses that look at the teacher with all that is theirs, and terms beyond LoRA, switched off: what most papers call
#: healing.
_PLAIN_LORA = {
    "kl": 0.0,
    "divergence": "forward",
    "temperature": 1.0,
    "skew": 0.1,
    "states_at": "cuts",
    "lm": 1.0,
    "last_error": 0.0,
    "last_cosine": 0.0,
    "states": 0.0,
    "norms": False,
    "scale_rate": 1.0,
    "train_fully": "none",
}

Change = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One run of a comparison.

    Attributes:
        name: of the method.
        recovered: whether the folded model is trained.
        recipe: the whole run as a recipe of its own.
    """

    name: str
    recovered: bool
    recipe: Recipe

    @property
    def title(self) -> str:
        """Name and recovery in one."""
        return f"{self.name} + recovery" if self.recovered else self.name

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return _slug(self.name) + ("-recovered" if self.recovered else "")


def rows_of_recipe(recipe: Recipe) -> list[Row]:
    """All runs of a comparison: every row without recovery, then those with it.

    Args:
        recipe: its `compare` section says which; by default all that `known_rows` has, but
            for those that are there on request.

    Raises:
        UsageError: an unknown row without a change, a change of what all rows must have in common, names that
            cannot be told apart, or a reference that is not a row.
    """
    section = recipe.compare
    # A recipe whose rows all say what they change needs no budget that known names could go by.
    is_own = section.rows is not None and None not in section.rows.values()
    known = {} if is_own else known_rows(recipe)
    changes: dict[str, Change] = {}
    draws: dict[str, Change] = {}
    for name, change in (section.rows or dict.fromkeys(name for name in known if name not in _ON_REQUEST)).items():
        if change is None and name not in known:
            raise UsageError(
                f"compare.rows: {name!r} is not a known row, and says not what it changes.{did_you_mean(name, known)}"
            )
        changes[name] = known[name] if change is None else change
        if change is None and name == "random":
            draws = {draw: drawn for draw, drawn in known.items() if is_draw(draw) and draw != name}
            changes |= draws
    for name in changes:
        if not _slug(name):
            raise UsageError(f"compare.rows: the name {name!r} has neither a letter nor a digit")
    for name in [section.reference, *(section.recovered or [])]:
        if name not in changes:
            raise UsageError(f"compare: {name!r} is not one of the rows.{did_you_mean(name, changes)}")
    made = {name: _changed(recipe, name, change) for name, change in changes.items()}
    for name, one in made.items():
        if one.select.target is not None and target(one.select.target).is_measured:
            raise UsageError(
                f"compare: the row {name!r} has select.target {one.select.target}; times differ from one measurement "
                "to the next, and rows have to be of equal size: give parameters, flops or a number of blocks"
            )
    rows = [
        Row(name, False, Recipe.from_dict({**one.model_dump(mode="json"), "recover": {}}))
        for name, one in made.items()
        if "recover" not in changes[name]
    ]
    if recipe.recover.num_tokens:
        wanted = changes if section.recovered is None else section.recovered
        if "random" in wanted:
            wanted = [*wanted, *draws]
        rows += [Row(name, True, one) for name, one in made.items() if name in wanted]
    missing = {*(section.rows or {}), *(section.recovered or [])} - {row.name for row in rows}
    for name in sorted(missing):
        why = "compare.recovered does not name it" if recipe.recover.num_tokens else "nothing is recovered"
        note(f"left out: the row {name!r} is only run with a recovery, and {why}")
    if not any(row.name == section.reference for row in rows):
        raise UsageError(f"compare.reference: {section.reference!r} changes the recovery, and nothing is recovered")
    _check_apart(rows)
    return rows


def is_draw(name: str) -> bool:
    """Whether a row is one of those that `random` stands for."""
    return name == "random" or name.startswith(_FURTHER_DRAW)


def _check_apart(rows: Sequence[Row]) -> None:
    """Refuse rows that would write into one folder, or that a table could not tell apart."""
    titles, folders = {SOURCE}, dict[str, str]()
    for row in rows:
        if row.title in titles:
            raise UsageError(f"compare.rows: two rows would be called {row.title!r}; choose another name")
        if row.folder in folders:
            raise UsageError(
                f"compare.rows: {folders[row.folder]!r} and {row.title!r} would have one folder, {row.folder!r}"
            )
        titles.add(row.title)
        folders[row.folder] = row.title


def known_rows(recipe: Recipe) -> dict[str, Change]:
    """Rows that a name alone stands for.

    Baselines are pure, as their papers have them: no compensation, no sharing. What foldgpt adds comes one step at a
    time, so that one can see what each step gives.
    """
    budget = _budget(recipe)
    pure = {"compensate": {"method": "none"}, "share": {"method": "none"}}
    compensated = {"compensate": {"method": "linear"}, "share": {"method": "none"}}
    rows: dict[str, Change] = {}
    for seed in range(recipe.seed, recipe.seed + recipe.compare.random_seeds):
        name = "random" if seed == recipe.seed else f"{_FURTHER_DRAW}{seed}"
        rows[name] = {"select": {"method": "random", "options": {"seed": seed}}, **pure}
    for method in ("last", "angular", "bi"):
        rows[method] = {"select": {"method": method}, **pure}
    rows["bi + compensation"] = {"select": {"method": "bi"}, **compensated}
    rows["bi + plain LoRA"] = {"select": {"method": "bi"}, **pure, "recover": {"settings": _PLAIN_LORA}}
    for method in (*_ON_REQUEST, "greedy", "gates"):
        rows[method] = {"select": {"method": method}, **pure}
    rows["gates + compensation"] = {"select": {"method": "gates"}, **compensated}
    if recipe.share.method != "none":
        # The recipe as it stands: whoever wrote its share section chose how many blocks are removed beside it.
        rows[f"{recipe.select.method} + sharing"] = {}
    return {
        name: {**change, "select": {**change["select"], **budget}} if change else {} for name, change in rows.items()
    }


def _budget(recipe: Recipe) -> dict[str, Any]:
    """How many blocks go where nothing is shared, if the recipe says it of the size alone.

    Raises:
        UsageError: the size is not a fraction, so that it takes the model to know how many blocks that is.
    """
    written = recipe.share.size
    if written is None:
        return {}
    wanted = size(written)
    if wanted.unit != "ratio":
        raise UsageError(
            f"share.size is {written!r}, and the rows without sharing remove whole blocks: give the size as a fraction "
            "of the parameters in blocks, such as 0.7, or rows of your own"
        )
    return {"remove_ratio": 1 - wanted.value}


def _changed(recipe: Recipe, name: str, change: Change) -> Recipe:
    place = f"compare.rows.{name}"
    value = recipe.model_dump(mode="json")
    del value["compare"]
    merged: dict[str, Mapping[str, Any]] = {}
    for section, parts in change.items():
        if section not in _CHANGEABLE:
            hint = did_you_mean(section, _CHANGEABLE)
            raise UsageError(f"{place}: a row may not change {section!r}: it is the same for all rows.{hint}")
        if not isinstance(parts, Mapping):
            raise UsageError(f"{place}.{section}: must be a mapping of keys to values (got {parts!r})")
        if section == "recover":
            value[section]["settings"] |= _recovery_change(place, parts)
        else:
            merged[section] = parts
    merge_sections_(value, merged)
    return Recipe.from_dict(value, place)


def _recovery_change(place: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    for key in parts:
        if key != "settings":
            raise UsageError(f"{place}.recover.{key}: a row may change settings alone: all rows see the same tokens")
    settings = parts.get("settings")
    if not isinstance(settings, Mapping):
        raise UsageError(f"{place}.recover.settings: must be a mapping of keys to values (got {settings!r})")
    return dict(settings)


def _slug(name: str) -> str:
    return _NOT_FOLDERS.sub("-", name.lower()).strip("-")

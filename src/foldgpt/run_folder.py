"""The folder of a run or a comparison: artefacts, and the ledger that knows from which inputs each was made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

import foldgpt
from foldgpt.artifacts import (
    check_free,
    hash_of,
    hash_of_file,
    read_json,
    remove,
    remove_all_leftovers,
    remove_leftovers,
    take_over,
    write_json,
)
from foldgpt.comparison import COMPARISON
from foldgpt.errors import ArtifactError, FoldGPTError
from foldgpt.progress import note
from foldgpt.recipe import Recipe
from foldgpt.report import REPORT

RECIPE, LEDGER, ENVIRONMENT = "recipe.yaml", "run.json", "environment.json"
ANALYSIS, SELECTION, PLAN, EVALUATION = "analysis.json", "selection.json", "plan.json", "evaluation.json"
SOURCE = "source.json"
FOLDED, RECOVERED, FIGURES = "folded", "recovered", "figures"
#: Folder of the runs of a comparison.
ROWS = "rows"
#: How far a stage is; whoever has its result in the ledger removes it.
ANALYSIS_CHECKPOINT, SEARCH_CHECKPOINT = ".analysis-checkpoint.json", ".search-checkpoint.json"
_LOCK = ".lock"
_FORMAT = "foldgpt.run"
#: All that stages make.
_MADE = (ANALYSIS, SELECTION, PLAN, FOLDED, RECOVERED, SOURCE, EVALUATION, ENVIRONMENT, FIGURES, REPORT)
#: The files of a comparison, last the one by which it is known.
_COMPARED = ("comparison.csv", "comparison.md", "comparison.html", COMPARISON)
#: What else is written there.
_WRITTEN = (RECIPE, LEDGER, ANALYSIS_CHECKPOINT, SEARCH_CHECKPOINT, *_COMPARED)
#: Stage → those that are made of its outputs; what is left of them is out of date once it made others.
_DEPENDENTS = {
    "analysis": ("selection", "figures", "report"),
    "selection": ("plan",),
    "plan": ("fold", "figures", "report"),
    "fold": ("recovery", "evaluation"),
    "recovery": ("evaluation",),
    "source": ("evaluation",),
    "evaluation": ("report",),
}
#: Files that a later stage puts into what an earlier one made: the model card, which tells the measurements.
_WRITTEN_LATER = frozenset({"README.md"})

T = TypeVar("T")


class RunFolder:
    """One run on disk. Get one with `open_run`.

    Args:
        path: the folder.
        beside: a folder of runs; a stage that one of them has made from the same inputs is taken from there.
        to_come: the recipe to which the folder is handed over when the first stage is made for it, or `hand_over` is
            called; None where the folder's own is the one that is run.

    Attributes:
        path: the folder.

    Raises:
        ArtifactError: its ledger is damaged.
    """

    def __init__(self, path: Path, beside: Path | None = None, to_come: Recipe | None = None) -> None:
        self.path = path
        self._beside = beside
        self._to_come = to_come
        self._stages = _read_stages(path / LEDGER)

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took, where it was made; of an interrupted one the last part."""
        return {name: stage["seconds"] for name, stage in self._stages.items()}

    def inputs_of(self, name: str) -> str | None:
        """Identity of what a stage was made from, alike in runs that make the same; None if it was not made."""
        inputs: str | None = self._stages.get(name, {}).get("inputs")
        return inputs

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        make: Callable[[], object],
        read: Callable[[], T],
    ) -> T:
        """Make a stage's outputs unless they stand already, made from the same inputs.

        Args:
            name: the stage, as the ledger and the messages call it.
            inputs: all that the outputs depend on, as JSON values.
            outputs: names of the files and folders it writes, each atomically.
            make: writes them.
            read: reads the result back, always from disk, so that what is used is what was written.
        """
        if self.stands(name, inputs, outputs):
            note(f"{name}: unchanged")
            return read()
        if self._to_come is not None:
            # What the stage makes stale goes before the folder is another recipe's.
            self._drop_dependents(name)
            self.drop(name)
            self.hand_over()
        key = _key(inputs)
        taken = self._take(name, key, outputs)
        if taken is not None:
            self._enter(name, taken, outputs)
            return read()
        started = time.perf_counter()
        make()
        seconds = round(time.perf_counter() - started, 1)
        self._enter(name, {"inputs": key, "outputs": self._contents(outputs), "seconds": seconds}, outputs)
        return read()

    def stands(self, name: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> bool:
        """Whether a stage's outputs are there, made from these inputs."""
        known = self._stages.get(name, {})
        return known.get("inputs") == _key(inputs) and known.get("outputs") == self._contents(outputs)

    def drop(self, name: str) -> None:
        """Remove what a stage made, if it did, and what was made of it: it belongs to inputs of before."""
        if name not in self._stages:
            return
        self._drop_dependents(name)
        for place in self._stages[name].get("places", ()):
            remove(self.path / place)
        # Last: what is in the ledger is found again, whenever the process is killed.
        del self._stages[name]
        self._save()

    def hand_over(self) -> None:
        """Make the folder that of the recipe to come, if it is another's.

        A comparison of before goes first: whenever the process is killed, what is shown of the folder is of one recipe.
        """
        if self._to_come is None:
            return
        for name in _COMPARED:
            remove(self.path / name)
        self._to_come.save(self.path / RECIPE)
        self._to_come = None

    def _drop_dependents(self, name: str) -> None:
        for dependent in _DEPENDENTS.get(name, ()):
            self._drop_dependents(dependent)
            self.drop(dependent)

    def _enter(self, name: str, entry: dict[str, Any], outputs: Sequence[str]) -> None:
        if entry["outputs"] != self._stages.get(name, {}).get("outputs"):
            # Before the entry: a process that is killed here makes the stage again, and then drops the rest.
            self._drop_dependents(name)
        self._stages[name] = {**entry, "places": list(outputs)}
        self._save()

    def _save(self) -> None:
        write_json(self.path / LEDGER, {"format": _FORMAT, "version": 1, "stages": self._stages})

    def _take(self, name: str, key: str, outputs: Sequence[str]) -> dict[str, Any] | None:
        """Take a stage's outputs from a run beside this one that has made them from the same inputs, if any."""
        ledgers = [] if self._beside is None else sorted(self._beside.glob(f"*/{LEDGER}"))
        for ledger in ledgers:
            if ledger.parent == self.path:
                continue
            try:
                other = RunFolder(ledger.parent)
            except ArtifactError:
                # Damaged: whoever opens that run itself hears of it.
                continue
            entry: dict[str, Any] = other._stages.get(name, {})
            if entry.get("inputs") == key and entry["outputs"] == other._contents(outputs):
                note(f"{name}: as in {other.path.name}")
                for output in outputs:
                    take_over(other.path / output, self.path / output, leave=_WRITTEN_LATER)
                return entry
        return None

    def key_of(self, name: str) -> str:
        """Identity of what a stage made, to be an input of a later one."""
        return hash_of(self._stages[name]["outputs"])

    def _contents(self, outputs: Sequence[str]) -> dict[str, Any]:
        """What the outputs hold: hashes of small files, sizes of large ones; None for what is missing."""
        contents: dict[str, Any] = {}
        for name in outputs:
            path = self.path / name
            files = [path]
            if path.is_dir():
                files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in _WRITTEN_LATER]
            for file in files:
                place = str(file.relative_to(self.path))
                contents[place] = _identity(file) if file.is_file() else None
        return contents


def _key(inputs: Mapping[str, Any]) -> str:
    return hash_of({**inputs, "foldgpt": foldgpt.__version__})


def _read_stages(ledger: Path) -> dict[str, dict[str, Any]]:
    """Stage → what the ledger says of it; none if there is no ledger."""
    if not ledger.is_file():
        return {}
    value = read_json(ledger, "ledger of the run")
    stages = value.get("stages") if isinstance(value, dict) and value.get("format") == _FORMAT else None
    if not isinstance(stages, dict) or not all(map(_is_entry, stages.values())):
        raise ArtifactError(f"{ledger} is not the ledger of a run, or is damaged")
    return stages


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("outputs"), dict)
        and isinstance(entry.get("seconds"), (int, float))
        and isinstance(entry.get("places", []), list)
        and all(isinstance(place, str) for place in entry.get("places", []))
    )


def _identity(file: Path) -> str:
    size = file.stat().st_size
    return f"{size} bytes" if size > 16 << 20 else hash_of_file(file)


@contextmanager
def open_run(
    path: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    beside: Path | None = None,
    comparison: bool = False,
) -> Iterator[RunFolder]:
    """Open the folder of a run or a comparison for one recipe, and keep other processes out of it meanwhile.

    A folder that holds an interrupted or finished run of the same recipe is continued. One in which nothing was made
    for its recipe, because that was refused, is anybody's.

    Args:
        path: the folder; made if it does not exist.
        recipe: what is to be run.
        overwrite: take over the folder of another recipe, which it belongs to until a stage is made for this one. What
            its stages made is made again only where the inputs differ; all of it where the ledger is damaged.
        beside: a folder of runs that no other process works in; what one of them has made from the same inputs is
            taken from there.
        comparison: a comparison is to be made there: it makes no stage, and takes over by `RunFolder.hand_over`.

    Raises:
        ArtifactError: the folder holds another run or something else, is in use, or cannot be written; or, also with
            `overwrite`, it holds a comparison and a run is to be made there, or the other way round.
    """
    path = Path(path)
    _check_kind(path, comparison)
    if not ((path / RECIPE).is_file() or (path / LEDGER).is_file()):
        check_free(path, replace=overwrite)
    elif not overwrite:
        _check_same(path, recipe)
    lock = FileLock(path / _LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ArtifactError(f"another process is working in {path}") from None
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    with lock:
        try:
            # Of killed processes; nobody else works here while the lock is held.
            _remove_leftovers(path)
            if overwrite:
                _drop_what_no_ledger_knows(path)
            there = _recipe_there(path)
            if there != recipe and _is_begun(path):
                yield RunFolder(path, beside, recipe)
                if there is None:
                    # All stages stand, so it was this one that cannot be read.
                    recipe.save(path / RECIPE)
            else:
                # Only now: the recipe of a run that goes on elsewhere stays as it is.
                recipe.save(path / RECIPE)
                yield RunFolder(path, beside)
        finally:
            lock.release()


def _check_kind(path: Path, comparison: bool) -> None:
    """Keep runs and comparisons apart: neither knows what the other made of its recipe, so it could not drop that."""
    if comparison and (path / LEDGER).is_file():
        raise ArtifactError(f"{path} holds a run, and a comparison is to be made there. Choose another folder.")
    if not comparison and _holds_comparison(path):
        raise ArtifactError(f"{path} holds a comparison, and a run is to be made there. Choose another folder.")


def _holds_comparison(path: Path) -> bool:
    return (path / COMPARISON).is_file() or any((path / ROWS).glob(f"*/{RECIPE}"))


def _is_begun(path: Path) -> bool:
    """Whether anything was made for the recipe of a folder."""
    return bool(_read_stages(path / LEDGER)) or _holds_comparison(path) or (path / ANALYSIS_CHECKPOINT).is_file()


def _recipe_there(path: Path) -> Recipe | None:
    """The recipe of a folder, if it has one that can be read."""
    try:
        return Recipe.load(path / RECIPE)
    except FoldGPTError:
        return None


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of this run; what lies elsewhere in the folder may be of one that goes on."""
    for name in (*_MADE, *_WRITTEN):
        remove_leftovers(path / name)
    for name in _MADE:
        if (path / name).is_dir():
            remove_all_leftovers(path / name)


def _drop_what_no_ledger_knows(path: Path) -> None:
    """Where the ledger is damaged, nothing says what the artefacts were made of."""
    try:
        _read_stages(path / LEDGER)
    except ArtifactError as error:
        note(f"beginning anew: {error}")
        for name in _MADE:
            remove(path / name)
        (path / LEDGER).unlink()


def _check_same(path: Path, asked: Recipe) -> None:
    try:
        # Without a lock no run was here: the recipe is a file of the user's own.
        if not _is_begun(path) and (path / _LOCK).is_file():
            return
        there = Recipe.load(path / RECIPE) if (path / RECIPE).is_file() else asked
    except FoldGPTError as error:
        raise ArtifactError(
            f"{path} holds a run that cannot be read ({error}). Choose another folder, or pass --overwrite."
        ) from error
    if there == asked:
        return
    before, after = _flat(there.model_dump(mode="json")), _flat(asked.model_dump(mode="json"))
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    shown = "; ".join(f"{key} was {before.get(key)!r} and is now {after.get(key)!r}" for key in changed[:3])
    more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise ArtifactError(
        f"{path} holds a run of another recipe: {shown}{more}. Choose another folder, or pass --overwrite."
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat.update(_flat(item, f"{prefix}{key}."))
        else:
            flat[prefix + key] = item
    return flat

"""The run folder: artefacts, and the ledger that knows from which inputs each of them was made."""

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
    take_over,
    write_json,
)
from foldgpt.errors import ArtifactError
from foldgpt.progress import note
from foldgpt.recipe import Recipe

RECIPE, LEDGER, ENVIRONMENT = "recipe.yaml", "run.json", "environment.json"
ANALYSIS, SELECTION, PLAN, EVALUATION = "analysis.json", "selection.json", "plan.json", "evaluation.json"
SOURCE = "source.json"
FOLDED, RECOVERED, FIGURES = "folded", "recovered", "figures"
_FORMAT = "foldgpt.run"
#: Stage → those that are made of its outputs; what is left of them is out of date once it made others.
_DEPENDENTS = {
    "analysis": ("figures", "report"),
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

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, beside: Path | None = None) -> None:
        self.path = path
        self._beside = beside
        self._stages: dict[str, Any] = {}
        if (path / LEDGER).is_file():
            ledger = read_json(path / LEDGER, "ledger of the run")
            if not isinstance(ledger, dict) or ledger.get("format") != _FORMAT:
                raise ArtifactError(f"{path / LEDGER} is not the ledger of a run")
            self._stages = ledger.get("stages", {})

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took, where it was made; of an interrupted one the last part."""
        return {name: stage["seconds"] for name, stage in self._stages.items()}

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
        key = hash_of({**inputs, "foldgpt": foldgpt.__version__})
        known = self._stages.get(name, {})
        if known.get("inputs") == key and known.get("outputs") == self._contents(outputs):
            note(f"{name}: unchanged")
            return read()
        taken = self._take(name, key, outputs)
        if taken is not None:
            self._enter(name, taken, outputs)
            return read()
        started = time.perf_counter()
        make()
        seconds = round(time.perf_counter() - started, 1)
        self._enter(name, {"inputs": key, "outputs": self._contents(outputs), "seconds": seconds}, outputs)
        return read()

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
            other = RunFolder(ledger.parent)
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


def _identity(file: Path) -> str:
    size = file.stat().st_size
    return f"{size} bytes" if size > 16 << 20 else hash_of_file(file)


@contextmanager
def open_run(
    path: str | Path, recipe: Recipe, *, overwrite: bool = False, beside: Path | None = None
) -> Iterator[RunFolder]:
    """Open a run folder for one recipe, and keep other processes out of it meanwhile.

    A folder that holds an interrupted or finished run of the same recipe is continued.

    Args:
        path: the folder; made if it does not exist.
        recipe: what is to be run.
        overwrite: take over the folder of another recipe. What its stages made is made again only where the
            inputs differ.
        beside: a folder of runs that no other process works in; what one of them has made from the same inputs is
            taken from there.

    Raises:
        ArtifactError: the folder holds another run or something else, is in use, or cannot be written.
    """
    path = Path(path)
    recipe_path = path / RECIPE
    if recipe_path.is_file():
        _check_same(path, Recipe.load(recipe_path), recipe, overwrite=overwrite)
    elif not (path / LEDGER).is_file():
        check_free(path, replace=overwrite)
    lock = FileLock(path / ".lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ArtifactError(f"another process is working in {path}") from None
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    with lock:
        try:
            # Only now: the recipe of a run that goes on elsewhere stays as it is.
            recipe.save(recipe_path)
            # Of killed processes; nobody else works here while the lock is held.
            remove_all_leftovers(path)
            yield RunFolder(path, beside)
        finally:
            lock.release()


def _check_same(path: Path, there: Recipe, asked: Recipe, *, overwrite: bool) -> None:
    if there == asked or overwrite:
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

"""A run on disk: stages that are made once from the same inputs, and go when what they were made of changed."""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from foldgpt.artifacts import hash_of, remove, take_over
from foldgpt.errors import ArtifactError
from foldgpt.progress import note
from foldgpt.recipe import Recipe
from foldgpt.report import CARD
from foldgpt.run_folder.layout import (
    ANALYSIS_CHECKPOINT,
    COMPARED,
    FOLDED,
    LEDGER,
    LOCK,
    PLAN,
    RECIPE,
    RECOVERED,
    ROWS,
)
from foldgpt.run_folder.ledger import WRITTEN_LATER, contents_of, identity_of_inputs, read_stages, write_stages

#: Stage → those that are made of its outputs; what is left of them is out of date once it made others.
_DEPENDENTS = {
    "analysis": ("selection", "figures", "report"),
    "selection": ("plan",),
    "plan": ("fold", "figures", "report"),
    "fold": ("before recovery", "recovery", "evaluation"),
    "before recovery": ("evaluation",),
    "recovery": ("evaluation",),
    "source": ("evaluation",),
    "evaluation": ("report",),
}

#: What people edit → what is said of one that is made again.
_EDITED = {PLAN: " (to fold by it: foldgpt fold MODEL --plan FILE)", CARD: ""}

T = TypeVar("T")


def holds_rows(folder: Path) -> bool:
    """Whether a comparison was begun in a folder: it has no ledger of its own, its rows have."""
    return any((folder / ROWS).glob(f"*/{RECIPE}"))


def command_to_go_on(folder: Path) -> str | None:
    """The command by which a run or a comparison goes on that was begun in a folder; None where none was."""
    if holds_rows(folder):
        return _command("compare", folder)
    if not (folder / RECIPE).is_file():
        return None
    if (folder / LEDGER).is_file() or (folder / ANALYSIS_CHECKPOINT).is_file():
        return _command("run", folder)
    # Stopped before anything was made: nothing says which of the two it was to be.
    return f"{_command('run', folder)}, or compare in place of run" if (folder / LOCK).is_file() else None


def _command(verb: str, folder: Path) -> str:
    return shlex.join(["foldgpt", verb, str(folder / RECIPE), "--out", str(folder)])


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
        self._stages = read_stages(path / LEDGER)

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took, where it was made; of an interrupted one the last part."""
        return {name: stage["seconds"] for name, stage in self._stages.items()}

    @property
    def is_finished(self) -> bool:
        """Whether its last stage was made."""
        return "report" in self._stages

    @property
    def to_go_on(self) -> str:
        """The command that lets the run go on."""
        return _command("run", self.path)

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
        self._keep_edited(name)
        key = identity_of_inputs(inputs)
        taken = self._take(name, key, outputs)
        if taken is not None:
            self._enter(name, taken, outputs)
            return read()
        started = time.perf_counter()
        make()
        seconds = round(time.perf_counter() - started, 1)
        self._enter(name, {"inputs": key, "outputs": contents_of(self.path, outputs), "seconds": seconds}, outputs)
        return read()

    def _keep_edited(self, name: str) -> None:
        """Plans and cards invite to be edited; where they are made again, what somebody wrote is not thrown away."""
        own = self._stages.get(name, {}).get("places", ())
        # A card lies in the folder that another stage makes.
        places = [
            (place, stage["outputs"].get(place))
            for stage in self._stages.values()
            for place in stage.get("places", ())
            if any(place == mine or place.startswith(f"{mine}/") for mine in own)
        ]
        for place, content in places:
            path = self.path / place
            if path.name not in _EDITED or not path.is_file() or contents_of(self.path, [place])[place] == content:
                continue
            names = (f"{path.name}.edited{'' if number == 1 else f'-{number}'}" for number in itertools.count(1))
            # Beside the run's own files: the folder of a model goes with what was made there.
            kept = next(free for free in map(self.path.joinpath, names) if not free.exists())
            path.replace(kept)
            note(
                f"{path} is not the one that this run wrote: it is made again, and yours is kept as {kept.name}"
                f"{_EDITED[path.name]}"
            )

    def stands(self, name: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> bool:
        """Whether a stage's outputs are there, made from these inputs."""
        known = self._stages.get(name, {})
        if known.get("inputs") != identity_of_inputs(inputs):
            return False
        found = contents_of(self.path, outputs)
        # A card that somebody wrote in is still that of the model beside it.
        found |= {
            place: known["outputs"].get(place)
            for place, content in found.items()
            if content and Path(place).name == CARD
        }
        return bool(known["outputs"] == found)

    def drop(self, name: str) -> None:
        """Remove what a stage made, if it did, and what was made of it: it belongs to inputs of before."""
        if name not in self._stages:
            return
        self._drop_dependents(name)
        self._keep_edited(name)
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
        for name in COMPARED:
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
        write_stages(self.path / LEDGER, self._stages)

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
            if entry.get("inputs") == key and entry["outputs"] == contents_of(other.path, outputs):
                note(f"{name}: as in {other.path.name}")
                for output in outputs:
                    take_over(other.path / output, self.path / output, leave=WRITTEN_LATER)
                return entry
        return None

    def key_of(self, name: str) -> str:
        """Identity of what a stage made, to be an input of a later one."""
        return hash_of(self._stages[name]["outputs"])


def final_model(folder: Path) -> Path:
    """The folder of the model that is meant: the last one of a run, or that of a model by itself.

    Raises:
        ArtifactError: the run is not finished, or there is no model.
    """
    run = RunFolder(folder)
    if (folder / LEDGER).is_file() and not run.is_finished:
        raise ArtifactError(
            f"the run in {folder} is not finished, so its final model may be missing: let it go on "
            f"(`{run.to_go_on}`), or give the folder of a model in it"
        )
    for final in (folder / RECOVERED, folder / FOLDED, folder):
        if (final / "config.json").is_file():
            return final
    raise ArtifactError(f"{folder} is neither a folded checkpoint nor the folder of a run that has one")

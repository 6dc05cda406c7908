"""Who may work in a folder: one recipe's run or comparison, and one process at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from foldgpt.artifacts import check_free, from_home, remove, remove_all_leftovers, remove_leftovers
from foldgpt.comparison import COMPARISON
from foldgpt.errors import ArtifactError, FoldGPTError
from foldgpt.progress import note
from foldgpt.recipe import Recipe
from foldgpt.run_folder.folder import RunFolder, holds_rows
from foldgpt.run_folder.layout import ANALYSIS_CHECKPOINT, COMPARED, LEDGER, LOCK, MADE, PLAN, RECIPE, WRITTEN
from foldgpt.run_folder.ledger import read_stages


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
    for its recipe, because that was refused, is anybody's; if this call made it and nothing else is in it, it goes.

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
            `overwrite`, it holds a model, or what it makes would lie where the recipe's is, or it holds a comparison
            and a run is to be made there, or the other way round.
    """
    path = Path(path)
    _check_kind(path, comparison)
    _check_model_stays(path, recipe.model)
    if not ((path / RECIPE).is_file() or (path / LEDGER).is_file()):
        check_free(path, replace=overwrite)
    elif not overwrite:
        _check_same(path, recipe)
        _check_nothing_lies_there(path)
    lock = FileLock(path / LOCK)
    was_there = path.exists()
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
                if there != recipe:
                    # Only now: the recipe of a run that goes on elsewhere stays as it is.
                    recipe.save(path / RECIPE)
                yield RunFolder(path, beside)
        except BaseException:
            if not was_there and {entry.name for entry in path.iterdir()} <= {RECIPE, LOCK}:
                # Refused before anything was made: what was put there by this call goes again.
                remove(path)
            raise
        finally:
            lock.release()


def _check_nothing_lies_there(path: Path) -> None:
    """Refuse to write over what no run made, in a folder that holds a recipe of the user's own and no run."""
    # What was copied may have lost its hidden files.
    if (path / LEDGER).is_file() or (path / LOCK).is_file() or holds_rows(path):
        return
    there = [name for name in (*MADE, *COMPARED) if (path / name).exists()]
    if there:
        raise ArtifactError(
            f"{path} holds {', '.join(there[:3])}{' and more' * (len(there) > 3)}, and no run that made it. Choose "
            "another folder, or pass --overwrite."
        )


def check_is_no_runs(file: Path) -> None:
    """Refuse to write by itself what belongs to a run: what the run made of the old one would stand beside the new.

    Args:
        file: the output.

    Raises:
        ArtifactError: a run made it, or will, or it is a plan in the folder of a model, which would be taken for the
            one that the model was folded by.
    """
    if file.name == PLAN and (file.parent / "config.json").is_file():
        raise ArtifactError(
            f"{file} would be taken for the plan that the model there was folded by. Choose another place."
        )
    if file.name in MADE and (file.parent / LEDGER).is_file():
        raise ArtifactError(f"{file} belongs to the run in {file.parent}. Choose another place.")


def _check_kind(path: Path, comparison: bool) -> None:
    """Keep models, runs and comparisons apart: none knows what another made, so it could not drop that."""
    wanted = "comparison" if comparison else "run"
    if (path / LEDGER).is_file():
        there = "run"
    elif _holds_comparison(path):
        there = "comparison"
    else:
        there = "model" if (path / "config.json").is_file() else wanted
    if there != wanted:
        raise ArtifactError(f"{path} holds a {there}, and a {wanted} is to be made there. Choose another folder.")


def _check_model_stays(path: Path, model: str) -> None:
    """Refuse a folder where a stage would write over the model that is read."""
    place = from_home(model)
    if not place.exists():
        return
    place, folder = place.resolve(), path.resolve()
    if place == folder or any(place.is_relative_to(folder / name) for name in MADE):
        raise ArtifactError(f"the model {model} lies where {path} would have what it makes. Choose another folder.")


def _holds_comparison(path: Path) -> bool:
    return (path / COMPARISON).is_file() or holds_rows(path)


def _is_begun(path: Path) -> bool:
    """Whether anything was made for the recipe of a folder."""
    return bool(read_stages(path / LEDGER)) or _holds_comparison(path) or (path / ANALYSIS_CHECKPOINT).is_file()


def _recipe_there(path: Path) -> Recipe | None:
    """The recipe of a folder, if it has one that can be read."""
    try:
        return Recipe.load(path / RECIPE)
    except FoldGPTError:
        return None


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of this run; what lies elsewhere in the folder may be of one that goes on."""
    for name in (*MADE, *WRITTEN):
        remove_leftovers(path / name)
    for name in MADE:
        if (path / name).is_dir():
            remove_all_leftovers(path / name)


def _drop_what_no_ledger_knows(path: Path) -> None:
    """Where the ledger is damaged, nothing says what the artefacts were made of."""
    try:
        read_stages(path / LEDGER)
    except ArtifactError as error:
        note(f"beginning anew: {error}")
        for name in MADE:
            remove(path / name)
        (path / LEDGER).unlink()


def _check_same(path: Path, asked: Recipe) -> None:
    try:
        # Without a lock no run was here: the recipe is a file of the user's own.
        if not _is_begun(path) and (path / LOCK).is_file():
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

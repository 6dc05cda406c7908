"""From what a user names to files on this machine: a hub id, a local folder, a GGUF file or a demo model."""

from __future__ import annotations

import difflib
import glob
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from foldgpt.artifacts import from_home
from foldgpt.demo import demo_model
from foldgpt.errors import SourceError, UsageError
from foldgpt.sources.configs import ADAPTER, check_config_file
from foldgpt.sources.gguf_files import convert_gguf
from foldgpt.sources.weights import INDEX, SINGLE, shards_of

#: What is fetched of a hub model before its weights. The card names licence and languages; code is for those who
#: trust it.
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "README.md", "*.py"]

#: Other forms of the model, and states of its training, lie in subfolders. Code and chat templates there are its own.
_HUB_FILES_LEFT = ["*/*.json", "*/*.txt", "*/*.model"]

#: Where a run keeps its models, the final one first.
_OF_A_RUN = ("recovered", "folded")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(spec: str | Path, *, revision: str | None = None) -> Path:
    """Find the files of a model on this machine, fetching them first where needed.

    Args:
        spec: a hub id, a local folder, a path that ends in `.gguf`, or `demo:NAME`.
        revision: branch, tag or commit of a hub id.

    Returns:
        A Hugging Face folder or a GGUF file; it is itself a valid spec.

    Raises:
        SourceError: there is no such model, or it cannot be fetched.
        UnsupportedModelError: the config of a hub model says that it cannot be folded; its weights are not fetched.
        UsageError: an unknown demo model, or a revision of something that has none.
    """
    spec = str(spec)
    if spec.startswith("demo:"):
        place = demo_model(spec.removeprefix("demo:"), convert_gguf)
    else:
        place = from_home(spec)
        if not place.exists():
            check_is_no_path(spec)
            return _fetch(spec, revision)
    if revision is not None:
        raise UsageError(f"--revision is for hub models only; {spec} is on this machine")
    if place.is_file() and place.suffix != ".gguf":
        raise SourceError(f"{spec} is a file, but not a GGUF file. Give the folder that holds config.json.")
    if place.is_dir() and not (place / "config.json").is_file():
        raise SourceError(f"{spec} is not a model folder: it has no config.json.{_model_inside(place)}")
    return place


def is_hub_snapshot(place: Path) -> bool:
    """Whether a folder is one commit of a model in the hub's cache, whose name is that of the commit."""
    return place.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", place.name) is not None


def check_is_no_path(spec: str) -> None:
    """Refuse a spec that is not on this machine and cannot be a hub id either.

    Raises:
        SourceError: names the nearest entry of the folder.
    """
    if spec.startswith((".", "/", "~")) or spec.endswith(".gguf") or not _HUB_ID.fullmatch(spec):
        raise SourceError(f"no model at {spec}.{_near_names(from_home(spec))}")


def _model_inside(folder: Path) -> str:
    """A suffix that says what a folder without a model holds: that of a run, an adapter, or a GGUF file."""
    for name in _OF_A_RUN:
        if (folder / name / "config.json").is_file():
            return f" It is the folder of a run, whose model is {str(folder / name)!r}."
    if (folder / ADAPTER).is_file():
        return " It holds an adapter alone: merge it into its model (peft's merge_and_unload), and give that."
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    return f" It holds {ggufs[0]}: give that file." if ggufs else ""


def _near_names(place: Path) -> str:
    """A suffix that names the nearest entry of the folder that was meant, or that folder's absence."""
    parent = place.parent
    if not parent.is_dir():
        return f" The folder {parent} does not exist."
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    near = difflib.get_close_matches(place.name, names, n=1)
    return f" Did you mean {str(parent / near[0])!r}?" if near else ""


def _fetch(repository: str, revision: str | None) -> Path:
    """Bring a hub model into the hub's own cache, or find it there: first what is small, then the weights."""

    def download(at: str | None, files: list[str], left: list[str] | None = None) -> Path:
        try:
            return Path(snapshot_download(repository, revision=at, allow_patterns=files, ignore_patterns=left))
        except Exception as error:  # the hub client raises errors of several libraries
            raise SourceError(_why_not_fetched(repository, revision, error)) from error

    place = download(revision, _HUB_FILES, _HUB_FILES_LEFT)
    if not (place / "config.json").is_file():
        raise SourceError(f"the hub repository {repository} has no config.json: it is not a model")
    check_config_file(place)
    # A branch may move between the two, so the weights are those of the commit that the config is of.
    return download(place.name if is_hub_snapshot(place) else revision, _weights_named_in(place))


def _weights_named_in(place: Path) -> list[str]:
    """The files that hold a model's weights, by its index: a repository may hold them in other forms too.

    What is wrong with the index is said when the weights are read.
    """
    try:
        shards = shards_of(place / INDEX)
    except (OSError, SourceError):
        shards = []
    return [SINGLE, *map(glob.escape, shards)]


def _why_not_fetched(repository: str, revision: str | None, error: Exception) -> str:
    kind = type(error).__name__
    place = Path(repository)
    # `a/b` may have been meant as a path, the more so if there is a folder `a`.
    near = _near_names(place) if place.parent.is_dir() else ""
    if kind in ("RepositoryNotFoundError", "HFValidationError"):
        return f"there is no folder {repository}, and no hub model of this name that may be read{near and f'.{near}'}"
    if kind == "GatedRepoError":
        return f"the hub model {repository} is gated: accept its terms and log in with `hf auth login`"
    if kind == "RevisionNotFoundError":
        return f"the hub model {repository} has no revision {revision!r}"
    # A full disk, a proxy or the hub's own failure look alike from here; the first line says which.
    reason = next(iter(str(error).strip().splitlines()), kind).removeprefix("Got: ").rstrip(".")
    return (
        f"there is no folder {repository}, and no model of this name could be fetched from the hub: {reason}. "
        f"Give a local folder, a GGUF file or a demo model (demo:smollm2-135m).{near}"
    )

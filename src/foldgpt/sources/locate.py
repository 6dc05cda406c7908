"""From what a user names to files on this machine: a hub id, a local folder, a GGUF file or a demo model."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from foldgpt.demo import demo_model
from foldgpt.errors import SourceError, UsageError
from foldgpt.sources.gguf_files import convert_gguf

#: What is fetched of a hub model. The card names licence and languages; code is for those who trust it.
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "README.md", "*.py"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(spec: str, *, revision: str | None = None) -> Path:
    """Find the files of a model on this machine, fetching them first where needed.

    Args:
        spec: a hub id, a local folder, a path that ends in `.gguf`, or `demo:NAME`.
        revision: branch, tag or commit of a hub id.

    Returns:
        A Hugging Face folder or a GGUF file; it is itself a valid spec.

    Raises:
        SourceError: there is no such model, or it cannot be fetched.
        UsageError: an unknown demo model, or a revision of something that has none.
    """
    if spec.startswith("demo:"):
        place = demo_model(spec.removeprefix("demo:"), convert_gguf)
    else:
        place = Path(spec).expanduser()
        if not place.exists():
            if _looks_like_path(spec):
                raise SourceError(f"no model at {spec}.{_near_names(place)}")
            return _fetch(spec, revision)
    if revision is not None:
        raise UsageError(f"--revision is for hub models only; {spec} is on this machine")
    if place.is_file() and place.suffix != ".gguf":
        raise SourceError(f"{spec} is a file, but not a GGUF file. Give the folder that holds config.json.")
    if place.is_dir() and not (place / "config.json").is_file():
        ggufs = sorted(file.name for file in place.glob("*.gguf"))
        advice = f" It holds {ggufs[0]}: give that file." if ggufs else ""
        raise SourceError(f"{spec} is not a model folder: it has no config.json.{advice}")
    return place


def is_hub_snapshot(place: Path) -> bool:
    """Whether a folder is one commit of a model in the hub's cache, whose name is that of the commit."""
    return place.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", place.name) is not None


def _looks_like_path(spec: str) -> bool:
    """Whether a spec that is not there was meant as a path; `a/b` may be either, so its folder decides."""
    if spec.startswith((".", "/", "~")) or spec.endswith(".gguf") or not _HUB_ID.fullmatch(spec):
        return True
    return "/" in spec and Path(spec).parent.is_dir()


def _near_names(place: Path) -> str:
    """A suffix that names the nearest entry of the folder that was meant, or that folder's absence."""
    parent = place.parent
    if not parent.is_dir():
        return f" The folder {parent} does not exist."
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    near = difflib.get_close_matches(place.name, names, n=1)
    return f" Did you mean {str(parent / near[0])!r}?" if near else ""


def _fetch(repository: str, revision: str | None) -> Path:
    """Bring a hub model into the hub's own cache, or find it there."""
    try:
        place = Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises errors of several libraries
        raise SourceError(_why_not_fetched(repository, revision, error)) from error
    if not (place / "config.json").is_file():
        raise SourceError(f"the hub repository {repository} has no config.json: it is not a model")
    return place


def _why_not_fetched(repository: str, revision: str | None, error: Exception) -> str:
    kind = type(error).__name__
    if kind in ("RepositoryNotFoundError", "HFValidationError"):
        return f"there is no folder {repository}, and no hub model of this name that may be read"
    if kind == "GatedRepoError":
        return f"the hub model {repository} is gated: accept its terms and log in with `hf auth login`"
    if kind == "RevisionNotFoundError":
        return f"the hub model {repository} has no revision {revision!r}"
    # A full disk, a proxy or the hub's own failure look alike from here; the first line says which.
    reason = next(iter(str(error).strip().splitlines()), kind).removeprefix("Got: ").rstrip(".")
    return (
        f"there is no folder {repository}, and no model of this name could be fetched from the hub: {reason}. "
        "Give a local folder, a GGUF file or a demo model (demo:smollm2-135m)."
    )

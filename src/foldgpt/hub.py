"""A folded checkpoint to the Hugging Face hub, card and code included."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

import yaml

from foldgpt.errors import ArtifactError, FoldGPTError, UsageError, first_line
from foldgpt.progress import note
from foldgpt.run_folder import FOLDED, LEDGER, RECOVERED, RunFolder

#: What makes a folder a checkpoint that others can use.
_NEEDED = ("config.json", "plan.json", "README.md")
#: What belongs to a checkpoint: weights, configs, tokenizer, code, records, card and licence.
_PARTS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.md", "LICENSE*", "NOTICE*")
#: Folder of further chat templates of a tokenizer.
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Upload:
    """What goes up.

    Attributes:
        folder: the checkpoint.
        files: names in it, and bytes of each.
        left: names of what stays: hidden files, folders and whatever is no part of a checkpoint.
    """

    folder: Path
    files: dict[str, int]
    left: list[str]


def check_upload(folder: str | Path, repo: str) -> Upload:
    """Everything of an upload that can be checked without the hub.

    Args:
        folder: the checkpoint, or the folder of a run: then its final model.
        repo: "owner/name", or a name alone.

    Raises:
        ArtifactError: it is no folded checkpoint or that of a run that is not finished, or its card cannot be read by
            the hub.
        UsageError: the name of the repository is not valid.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is not the name of a repository: {first_line(error)}") from error
    folder = _checkpoint_in(Path(folder))
    check_card(folder / "README.md")
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if _is_part(path)}
    for path in sorted((folder / _TEMPLATES).glob("*.jinja")):
        files[f"{_TEMPLATES}/{path.name}"] = path.stat().st_size
    left = [path.name for path in sorted(folder.iterdir()) if path.name not in files and path.name != _TEMPLATES]
    return Upload(folder, files, left)


def _is_part(path: Path) -> bool:
    return path.is_file() and any(path.match(pattern) for pattern in _PARTS) and not path.name.startswith(".")


def push(folder: str | Path, repo: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Upload a folded checkpoint; the repository is made if it does not exist.

    The token is that of `hf auth login` or of the variable HF_TOKEN, as everywhere with the hub. Only what belongs to
    a checkpoint goes up; see `check_upload`.

    Args:
        folder: the checkpoint, or the folder of a run: then its final model.
        repo: "owner/name"; the owner of a name alone is the account whose token it is.
        private: whether a new repository is private; by default what the account says.
        revision: branch to upload to; it is made if it does not exist.

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: as `check_upload` says.
        UsageError: likewise.
        FoldGPTError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    upload = check_upload(folder, repo)
    if upload.left:
        note(f"left out, not known as a part of a checkpoint: {', '.join(upload.left)}")
    api = HfApi()
    try:
        address = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        # A name without an owner is completed here, and nowhere else.
        repo = address.repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, repo_type="model", exist_ok=True)
        note(f"uploading {upload.folder} to {repo}")
        api.upload_folder(
            repo_id=repo,
            folder_path=upload.folder,
            repo_type="model",
            revision=revision,
            commit_message="Upload a model folded with FoldGPT",
            allow_patterns=[glob.escape(name) for name in upload.files],
        )
    except LocalTokenNotFoundError as error:
        raise FoldGPTError("no token for the hub: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise FoldGPTError(f"the hub refuses {repo}: {first_line(error)}") from error
    except Exception as error:  # which library raises when there is no network depends on the client's version
        raise FoldGPTError(f"cannot reach the hub: {first_line(error)}") from error
    return str(address)


def check_card(path: Path) -> None:
    """Check that the hub can read a model card's metadata, without asking it.

    Raises:
        ArtifactError: it cannot.
    """
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(path).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ArtifactError(f"the hub could not read the model card {path}: {first_line(error)}") from error
    if not data.get("library_name"):
        raise ArtifactError(
            f"the model card {path} has no metadata; foldgpt.report.write_model_card writes a whole one"
        )
    if not data.get("license"):
        note(f"{path} names no licence; the hub shows none until you add one")


def _checkpoint_in(folder: Path) -> Path:
    run = RunFolder(folder)
    if (folder / LEDGER).is_file() and not run.is_finished:
        raise ArtifactError(
            f"the run in {folder} is not finished, so its final model may be missing: let it go on "
            f"(`{run.to_go_on}`), or give the folder of a model in it"
        )
    for final in (folder / RECOVERED, folder / FOLDED, folder):
        if (final / "config.json").is_file():
            missing = [name for name in _NEEDED if not (final / name).is_file()]
            if missing:
                raise ArtifactError(f"{final} lacks {', '.join(missing)}: it is not a folded checkpoint with its card")
            return final
    raise ArtifactError(f"{folder} is neither a folded checkpoint nor the folder of a run that has one")

"""A folded checkpoint to the Hugging Face hub, card and code included."""

from __future__ import annotations

from pathlib import Path

import yaml

from foldgpt.errors import ArtifactError, FoldGPTError, UsageError, first_line
from foldgpt.progress import note

#: What makes a folder a checkpoint that others can use.
_NEEDED = ("config.json", "plan.json", "README.md")


def push(folder: str | Path, repo: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Upload a folded checkpoint; the repository is made if it does not exist.

    The token is that of `hf auth login` or of the variable HF_TOKEN, as everywhere with the hub.

    Args:
        folder: the checkpoint, or the folder of a run: then its final model.
        repo: "owner/name"; the owner of a name alone is the account whose token it is.
        private: whether a new repository is private; by default what the account says.
        revision: branch to upload to; it is made if it does not exist.

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: it is no folded checkpoint, or its card cannot be read by the hub.
        UsageError: the name of the repository is not valid.
        FoldGPTError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder = _checkpoint_in(Path(folder))
    check_card(folder / "README.md")
    api = HfApi()
    try:
        address = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        # A name without an owner is completed here, and nowhere else.
        repo = address.repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, repo_type="model", exist_ok=True)
        note(f"uploading {folder} to {repo}")
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type="model",
            revision=revision,
            commit_message="Upload a model folded with FoldGPT",
            # What a killed process left half-written.
            ignore_patterns=[".foldgpt-partial-*"],
        )
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is not the name of a repository: {first_line(error)}") from error
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
    for final in (folder / "recovered", folder / "folded", folder):
        if (final / "config.json").is_file():
            missing = [name for name in _NEEDED if not (final / name).is_file()]
            if missing:
                raise ArtifactError(f"{final} lacks {', '.join(missing)}: it is not a folded checkpoint with its card")
            return final
    raise ArtifactError(f"{folder} is neither a folded checkpoint nor the folder of a run that has one")

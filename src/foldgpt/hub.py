"""A folded checkpoint to the Hugging Face hub, card and code included."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

import yaml

from foldgpt.artifacts import read_json
from foldgpt.errors import ArtifactError, FoldGPTError, UsageError, first_line
from foldgpt.formats import NOT_FILES, text_name
from foldgpt.progress import note
from foldgpt.run_folder import final_model

#: What makes a folder a checkpoint that others can use.
_NEEDED = ("config.json", "plan.json", "README.md")
#: What belongs to a checkpoint: weights, configs, tokenizer, code, records, card and licence.
_PARTS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.md", "LICENSE*", "NOTICE*")
#: What an earlier upload may have left in a repository and this one lacks: other weights would be loaded in place of
#: these, and tokenizer and records would be of another model.
_STALE = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "recovery.json",
    "history.json",
    "compensation.json",
    "sharing.json",
    "*_foldgpt.py",
    "generation_config.json",
    "chat_template.*",
    "additional_chat_templates/*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
)
#: JSON files with records of texts and models by where they lie on this machine, and where in them that is.
_RECORDS = {"plan.json": (), "recovery.json": (), "history.json": (), "config.json": ("fold_plan",)}
#: What any new repository may have.
_OF_ANY_REPOSITORY = (".gitattributes", ".gitignore", "README.md", "LICENSE*", "NOTICE*")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
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


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> str:
    """Upload a folded checkpoint; the repository is made if it does not exist.

    The token is that of `hf auth login` or of the variable HF_TOKEN, as everywhere with the hub. Only what belongs to
    a checkpoint goes up; see `check_upload`. Texts and models on this machine are named without their folders in the
    records that go up. Weights and records of an earlier upload that this one lacks are removed there.

    Args:
        folder: the checkpoint, or the folder of a run: then its final model.
        repo: "owner/name"; the owner of a name alone is the account whose token it is.
        private: whether a new repository is private; by default what the account says.
        revision: branch to upload to; it is made if it does not exist.
        overwrite: replace a model that was not uploaded from a folded checkpoint.

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: as `check_upload` says.
        UsageError: likewise, or the repository holds another kind of model.
        FoldGPTError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    upload = check_upload(folder, repo)
    if upload.left:
        note(f"left out, not known as a part of a checkpoint: {', '.join(upload.left)}")
    api = HfApi()
    with _as_it_goes_up(upload) as staging:
        try:
            address = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
            # A name without an owner is completed here, and nowhere else.
            repo = address.repo_id
            is_new = revision is not None and revision not in {ref.name for ref in api.list_repo_refs(repo).branches}
            # A new branch begins with the files of the first one, which keeps its own.
            if not (overwrite or is_new):
                _check_ours(repo, api.list_repo_files(repo, revision=revision))
            if revision is not None:
                api.create_branch(repo, branch=revision, repo_type="model", exist_ok=True)
            note(f"uploading {upload.folder} to {repo}")
            api.upload_folder(
                repo_id=repo,
                folder_path=staging,
                repo_type="model",
                revision=revision,
                commit_message="Upload a model folded with FoldGPT",
                delete_patterns=list(_STALE),
            )
        except FoldGPTError:
            raise
        except LocalTokenNotFoundError as error:
            raise FoldGPTError("no token for the hub: run `hf auth login`, or set HF_TOKEN") from error
        except HfHubHTTPError as error:
            raise FoldGPTError(f"the hub refuses {repo}: {first_line(error)}") from error
        except Exception as error:  # which library raises without a network depends on the client's version
            raise FoldGPTError(f"cannot reach the hub: {first_line(error)}") from error
    return str(address)


def _check_ours(repo: str, there: Sequence[str]) -> None:
    """Refuse to replace what no folded checkpoint was uploaded to.

    Raises:
        UsageError: there is something else.
    """
    others = [name for name in there if not any(fnmatch(name, pattern) for pattern in _OF_ANY_REPOSITORY)]
    if others and "plan.json" not in there:
        raise UsageError(
            f"{repo} holds something else ({', '.join(others[:3])}{', …' if len(others) > 3 else ''}), and its model "
            "would be replaced: choose another name or --revision, or pass --overwrite"
        )


@contextmanager
def _as_it_goes_up(upload: Upload) -> Iterator[Path]:
    """A folder with the files that go up, and in their records nothing of where things lie on this machine."""
    with tempfile.TemporaryDirectory(prefix="foldgpt-push-") as name:
        staging = Path(name)
        for file in upload.files:
            source, target = upload.folder / file, staging / file
            target.parent.mkdir(exist_ok=True)
            if file in _RECORDS:
                target.write_text(json.dumps(_public(read_json(source), _RECORDS[file]), indent=2), encoding="utf-8")
            else:
                try:
                    target.symlink_to(source.absolute())
                except OSError:  # Windows makes links for administrators alone
                    shutil.copyfile(source, target)
        yield staging


def _public(value: Any, place: tuple[str, ...]) -> Any:
    """A record with names in place of paths.

    Args:
        value: a JSON value.
        place: keys on the way to what is looked through; all of it where there are none.
    """
    if not isinstance(value, dict):
        return [_public(item, place) for item in value] if isinstance(value, list) else value
    if place:
        return {key: _public(part, place[1:]) if key == place[0] else part for key, part in value.items()}
    return {key: _named(key, part) for key, part in value.items()}


def _named(key: str, value: Any) -> Any:
    if key in ("texts", "specs", "calibration") and isinstance(value, list):
        return [text_name(each) if isinstance(each, str) else each for each in value]
    if key == "model" and isinstance(value, str) and not value.startswith(NOT_FILES):
        # A local folder may look like a name on the hub.
        return value if _HUB_ID.fullmatch(value) and not Path(value).exists() else PurePath(value).name
    return _public(value, ())


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
    final = final_model(folder)
    missing = [name for name in _NEEDED if not (final / name).is_file()]
    if missing:
        raise ArtifactError(f"{final} lacks {', '.join(missing)}: it is not a folded checkpoint with its card")
    return final

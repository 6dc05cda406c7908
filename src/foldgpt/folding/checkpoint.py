"""Folded checkpoints: where they may be saved, what lies in them, and that none appears unverified."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from foldgpt.artifacts import check_free_folder, from_home, staged_folder, write_json
from foldgpt.errors import ArtifactError, FoldGPTError, PlanError
from foldgpt.families import decoder_of
from foldgpt.folding.number_format import cast_
from foldgpt.folding.verify import Verification, verify_checkpoint
from foldgpt.plan import FoldPlan
from foldgpt.progress import quiet_libraries

#: Files by which the folder of a folded model is known.
_ALWAYS_THERE = ("config.json", "plan.json")
_SENTENCEPIECE = "tokenizer.model"


def check_place(folder: str | Path, *, replace: bool = False, read: Iterable[str | Path] = ()) -> None:
    """Look whether a folded model may be saved in a folder, before anything is loaded for it.

    Args:
        folder: where it is to be saved.
        replace: replace the folded model that is there, and nothing else.
        read: the models that it is made from; one that is not on this machine (a hub id) is in no folder's way.

    Raises:
        ArtifactError: the folder is, contains or lies inside one of `read`, holds something else than a folded model,
            is taken, or cannot be written.
    """
    folder = Path(folder)
    target = folder.resolve()
    for model in read:
        place = from_home(model)
        if not place.exists():
            continue
        place = place.resolve()
        if target == place:
            relation = "is"
        elif place.is_relative_to(target):
            relation = "contains"
        elif target.is_relative_to(place):
            relation = "lies inside"
        else:
            continue
        raise ArtifactError(f"{folder} {relation} the model {model}, which is read. Choose another place.")
    missing = [name for name in _ALWAYS_THERE if not (folder / name).is_file()]
    if missing and folder.is_dir() and any(folder.iterdir()):
        raise ArtifactError(
            f"{folder} holds something else than a folded model (it has no {' and no '.join(missing)}), which would be "
            "lost. Choose another place."
        )
    check_free_folder(folder, replace=replace)


#: Why a model may share nothing though it was folded by a plan with groups.
_UNFOLDED = (
    ". If it was unfolded, give the plan without groups: plan.model_copy(update={'groups': (), 'fitting': None})"
)


def check_folded_by(model: nn.Module, plan: FoldPlan) -> None:
    """Refuse a plan that is not the model's, as far as the model tells.

    Raises:
        PlanError: the model was folded by another one.
    """
    num_blocks = len(decoder_of(model).blocks)
    if num_blocks != len(plan.kept):
        raise PlanError(f"the plan keeps {len(plan.kept)} blocks, the model has {num_blocks}: it was folded by another")
    own: Any = getattr(model.config, "fold_plan", None)
    if own is None and plan.is_removal_only:
        return
    if own is None:
        raise PlanError(
            "the model was folded by another plan: it is of its source's own class, and what shares weights or lacks "
            f"sublayers is not{_UNFOLDED if plan.groups else ''}"
        )
    # It may be of an earlier version of the format.
    folded_by = FoldPlan.from_json_dict(own, "fold_plan in the model's config")
    cut = ("removed", "removed_attention", "removed_mlp", "groups")
    if any(getattr(folded_by, name) != getattr(plan, name) for name in cut):
        raise PlanError(
            "the model was folded by another plan: the one in its config (fold_plan) cuts something else"
            f"{_UNFOLDED if plan.groups and not folded_by.groups else ''}"
        )


def _keep_sentencepiece(tokenizer: Any, folder: Path) -> None:
    """Copy the tokenizer's SentencePiece model, which other programs read and transformers often does not save."""
    if not tokenizer.name_or_path or (folder / _SENTENCEPIECE).exists():
        return
    place = Path(tokenizer.name_or_path)
    # Without a tokenizer's own files beside it, as in the folder of a GGUF file, it may be another one's.
    if all((place / name).is_file() for name in ("tokenizer_config.json", _SENTENCEPIECE)):
        shutil.copyfile(place / _SENTENCEPIECE, folder / _SENTENCEPIECE)


def save_folded(
    model: nn.Module,
    plan: FoldPlan,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    expected_parameters: int | None = None,
    notes: Mapping[str, Any] | None = None,
    max_shard_size: str = "5GB",
    replace: bool = False,
    dtype: torch.dtype | None = None,
) -> Verification:
    """Save a folded model, verify it, and only then let it appear under its final name.

    The folder holds an ordinary Hugging Face checkpoint, the tokenizer, `plan.json` and `verification.json`.

    Args:
        model: a model on which `fold_` has been called; with `dtype` it has that afterwards.
        plan: the plan it was folded by.
        folder: where to save.
        tokenizer: saved beside the model, with its chat template.
        expected_parameters: unique parameters that `predicted_parameters` foretold.
        notes: further JSON files to put beside the model, by name.
        max_shard_size: largest size of one safetensors file.
        replace: replace an existing folder, if it holds a folded model.
        dtype: number format to save in; None for the one that the model has.

    Raises:
        PlanError: the model was folded by another plan.
        FoldGPTError: a weight is too large for `dtype`, or transformers refuses to save the model.
        VerificationError: the checkpoint does not do what the model does; nothing is left behind.
        ArtifactError: the folder exists, or cannot be written.
    """
    check_place(folder, replace=replace)
    check_folded_by(model, plan)
    if dtype is not None:
        cast_(model, dtype)
    with staged_folder(folder, replace=replace) as staging:
        try:
            with quiet_libraries():
                model.save_pretrained(staging, max_shard_size=max_shard_size)  # type: ignore[operator]
                if tokenizer is not None:
                    tokenizer.save_pretrained(staging)
                    _keep_sentencepiece(tokenizer, staging)
        except SafetensorError as error:
            raise ArtifactError(f"cannot write {folder}: {error}. Nothing was left behind.") from error
        except ValueError as error:  # a generation config that was changed into one that is not valid
            raise FoldGPTError(f"transformers does not save this model: {' '.join(str(error).split())}") from error
        plan.save(staging / "plan.json")
        for weights in staging.glob("*.safetensors"):
            # safetensors lets the owner alone read them, whatever the umask says.
            weights.chmod((staging / "plan.json").stat().st_mode)
        for name, value in (notes or {}).items():
            write_json(staging / name, value)
        verification = verify_checkpoint(staging, model, expected_parameters=expected_parameters)
        write_json(staging / "verification.json", asdict(verification))
    return verification

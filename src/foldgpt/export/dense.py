"""The folded model as a checkpoint of its source's own class, in which every position has weights of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foldgpt.artifacts import read_json
from foldgpt.compensation import COMPENSATION
from foldgpt.errors import FoldGPTError, UnsupportedModelError, UsageError
from foldgpt.folding import Verification, check_place, save_folded, unfold_
from foldgpt.history import known_history
from foldgpt.plan import FoldPlan
from foldgpt.recovery_result import RECOVERY
from foldgpt.sources import load_source


def export_dense(
    folder: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    max_memory_gb: float | None = None,
    trust_remote_code: bool = False,
    replace: bool = False,
) -> Verification:
    """Save a folded model so that it loads everywhere, without foldgpt and without code of its own.

    What is shared is copied to each position that borrows it, private terms are merged in, so the file is larger and
    the predictions are the same. Where nothing is shared it is the same model again. What folding and recovery said of
    it goes along.

    Args:
        folder: a folded or a recovered model.
        out: where to save it.
        device: where the two are compared; see `load_source`, as for the next two.
        max_memory_gb: memory that the weights may take.
        trust_remote_code: run modelling code that comes with the model.
        replace: replace the folded model that is there.

    Raises:
        UsageError: `folder` is no folded model.
        UnsupportedModelError: blocks lack an attention or an MLP, which no ordinary class leaves out.
        FoldGPTError: it does not fit in memory, or cannot be read.
        ArtifactError: `out` is taken, or cannot be written.
        VerificationError: what was saved computes something else; nothing is left behind.
    """
    folder = Path(folder)
    check_place(out, replace=replace, read=[folder])
    plan = folded_plan(folder)
    config = read_json(folder / "config.json", "config")
    if (config.get("fold_layout") or {}).get("absent"):
        raise UnsupportedModelError(
            f"blocks of {folder} lack an attention or an MLP, and no ordinary class leaves one out: it loads with "
            "foldgpt, or with trust_remote_code=True"
        )
    source = load_source(folder, device=device, max_memory_gb=max_memory_gb, trust_remote_code=trust_remote_code)
    if source.offloaded:
        raise FoldGPTError(
            f"{folder} does not fit in the memory that its weights may take; it has to, to be saved in another form"
        )
    model: Any = source.model
    if getattr(model.config, "fold_layout", None):
        unfold_(model)
    # Of the fits of what was shared it says nothing: the plan has no groups any more.
    notes = {name: read_json(folder / name) for name in (COMPENSATION, RECOVERY) if (folder / name).is_file()}
    # The plan goes with it, and so does the record of its recovery.
    notes |= known_history(folder, with_plan=False, with_recovery=False).notes
    return save_folded(
        model,
        plan.model_copy(update={"groups": (), "fitting": None}),
        out,
        tokenizer=source.tokenizer,
        expected_parameters=sum(parameter.numel() for parameter in model.parameters()),
        notes=notes,
        replace=replace,
    )


def folded_plan(folder: Path) -> FoldPlan:
    """The plan that a model was folded by.

    Raises:
        UsageError: `folder` holds none.
    """
    if not (folder / "plan.json").is_file() or not (folder / "config.json").is_file():
        why = "holds no plan.json beside a config.json" if folder.is_dir() else "is no folder"
        raise UsageError(f"{folder} {why}, so it is no model that foldgpt folded: there is nothing to export")
    return FoldPlan.load(folder)

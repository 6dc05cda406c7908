"""The step of a run that trains a folded model."""

from __future__ import annotations

import shutil
from pathlib import Path

from foldgpt.artifacts import from_home, read_json
from foldgpt.checks import check_applies, check_machine, check_names, check_training_tokens
from foldgpt.compensation import COMPENSATION
from foldgpt.corpus import absolute
from foldgpt.errors import FoldGPTError, UsageError
from foldgpt.history import known_history
from foldgpt.plan import FoldPlan
from foldgpt.recovery import (
    RecoveryResult,
    check_apart,
    check_plan_suits,
    check_trainable,
    recover,
    remove_work,
    work_beside,
)
from foldgpt.sharing import SHARING
from foldgpt.sources import resolve
from foldgpt.steps.tokenizers import same_ids
from foldgpt.workbench import Workbench


def check_recovery(bench: Workbench, out: Path) -> None:
    """What `make_recovered` would refuse, before the search and not behind it: of models and texts as they are.

    Args:
        bench: the inputs.
        out: where the recovered model will be.

    Raises:
        UnsupportedModelError: the model is quantised or in float16, and so will the folded one be.
        FoldGPTError: a text cannot be read or is too short, or the context is longer than the model's.
    """
    if bench.common is None:  # the rows of a comparison have a place each, and this one is of them all
        check_apart(out, teacher_cache=_teacher_cache(bench))
    check_trainable(bench.source.model)
    bench.training_windows(out)


def make_recovered(
    bench: Workbench, folded: Path, out: Path, *, replace: bool = False, keep: bool = False
) -> RecoveryResult:
    """Train a folded model against the recipe's, and save it, verified.

    Args:
        bench: the inputs; its model is the teacher, where a loss compares with one.
        folded: the folded model; it holds its plan.
        out: where the recovered one is saved.
        replace: replace an existing `out`.
        keep: leave what the same call goes on from, until `drop_recovery_work`.

    Raises:
        UsageError: too few tokens for one step, or the two have different tokenizers.
        FoldGPTError: the folded model does not fit in memory or cannot be trained, or the recovery failed.
    """
    check_training_tokens(bench)
    recipe, section = bench.recipe, bench.recipe.recover
    if not (folded / "plan.json").is_file():
        why = "holds no plan.json" if folded.is_dir() else "is no folder"
        raise UsageError(f"{folded} {why}, so it is no model that `foldgpt fold` wrote: there is nothing to recover")
    plan = FoldPlan.load(folded)
    # Before the text is read, and before the source writes one (`self:`).
    place = resolve(str(folded))
    if bench.recovery_settings.needs_teacher:
        check_applies(bench, plan)
    check_plan_suits(plan, bench.recovery_settings)
    check_apart(out, teacher_cache=_teacher_cache(bench))
    check_names(bench)
    check_machine(bench)
    train, held_out = bench.training_windows(out)
    if not bench.recovery_settings.needs_teacher:
        bench.let_go_of_source()
    student = bench.load(place, str(folded))
    if student.offloaded:
        raise FoldGPTError(
            f"{folded} does not fit in the memory that is free (or allowed by max_memory_gb); it cannot be trained "
            "from elsewhere"
        )
    if not same_ids(bench.tokenizer, student.tokenizer):
        raise UsageError(
            f"{folded} has another tokenizer than {recipe.model}, so it cannot learn from its predictions. "
            f"Give the model that it was folded from ({plan.source.model}) as teacher."
        )
    check_trainable(student.model)
    teacher = bench.source.model if bench.recovery_settings.needs_teacher else None
    if teacher is not None and bench.source.offloaded:
        raise FoldGPTError(
            f"{recipe.model} does not fit in the memory that is free (or allowed by max_memory_gb) beside {folded}; "
            "recovery needs both. Load them in 16 bits (dtype), or take a larger machine"
        )
    # What folding said of its fits holds for this model too.
    notes = {name: read_json(folded / name) for name in (COMPENSATION, SHARING) if (folded / name).is_file()}
    # The plan goes with it.
    notes |= known_history(folded, with_plan=False).notes
    result = recover(
        student.model,
        teacher,
        plan,
        train,
        held_out,
        bench.recovery_settings,
        out,
        tokenizer=student.tokenizer,
        notes=notes,
        teacher_cache=_teacher_cache(bench),
        report_to=section.report_to,
        replace=replace,
        keep_work=keep,
        save_dtype=bench.save_dtype(folded),
        text={
            "texts": [absolute(text) for text in recipe.training_texts],
            "context": section.context,
            "num_held_out": section.held_out_tokens,
            "separate_documents": section.separate_documents,
            "seed": recipe.seed,
        },
        taught_by={"model": recipe.model, "revision": recipe.revision, "fingerprint": bench.fingerprint},
    )
    if not keep:
        drop_recovery_work(bench, out)
    return result


def drop_recovery_work(bench: Workbench, out: Path) -> None:
    """Remove what a recovery goes on from: its checkpoints, and its windows where no other recovery has them as well.

    Args:
        bench: its inputs.
        out: where the recovered model is.
    """
    remove_work(work_beside(out))
    if bench.common is None:
        shutil.rmtree(bench.training_folder(out), ignore_errors=True)


def _teacher_cache(bench: Workbench) -> Path | None:
    """Where the teacher's states are kept, if they are; what the rows of a comparison have in common keeps them."""
    named = bench.recipe.recover.teacher_cache
    if named:
        return from_home(named)
    return None if bench.common is None else bench.common / "teacher"

"""A tiny recovery, in its process or in one of its own, or several."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import forked
from foldgpt.artifacts import read_json
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.recovery import RecoveryResult, RecoverySettings, TrainingWindows, compiled, recover
from models import tiny_model

#: What a process of its own said, beside what it made.
SAID = "said.txt"


def tiny_windows(num_windows: int, seed: int) -> Tensor:
    """Random walks over the vocabulary, so that there is something to predict; [windows, 16]."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, 120, (num_windows, 1), generator=generator)
    steps = torch.randint(1, 4, (num_windows, 15), generator=generator)
    return (torch.cat([start, steps], dim=1).cumsum(1) - 3) % 120 + 3


def tiny_pair(family: str = "llama", shared: bool = True, **changes: Any) -> tuple[Any, Any, FoldPlan]:
    """A folded model, its source and the plan: block 2 removed, and 0 and 4 sharing their weights."""
    teacher = tiny_model(family, **changes)
    groups = [Group(blocks=(0, 4))] if shared else []
    plan = FoldPlan.create(source_model_of(teacher), removed=[2], groups=groups)
    student = copy.deepcopy(teacher)
    fold_(student, plan)
    return student, teacher, plan


def tiny_recovery(folder: Path, **changes: Any) -> RecoveryResult:
    """Recover it into `folder / "recovered"`."""
    student, teacher, plan = tiny_pair(shared=bool(changes.pop("shared", True)))
    if changes.pop("bf16", False):
        student, teacher = student.bfloat16(), teacher.bfloat16()
    cache = changes.pop("teacher_cache", None)
    given = {"batch_size": 4, "micro_batch_size": 2, "evaluate_every": 3, "rank": 4, "learning_rate": 3e-3, **changes}
    return recover(
        student,
        teacher,
        plan,
        TrainingWindows(tiny_windows(int(given.pop("windows", 48)), seed=1)),
        TrainingWindows(tiny_windows(8, seed=2)),
        RecoverySettings(**given),
        folder / "recovered",
        teacher_cache=cache,
    )


def step_losses(history: list[dict[str, float]]) -> dict[int, float]:
    """Step → training loss."""
    return {int(row["step"]): row["loss"] for row in history if "loss" in row}


def recover_by(folder: Path, changes: dict[str, Any]) -> None:
    """A tiny recovery, for a process of its own."""
    tiny_recovery(folder, **changes)


def recover_compiled(folder: Path, changes: dict[str, Any]) -> None:
    """The same with compiled blocks and losses, by a compiler of graphs that needs none of C++."""
    compiled._BACKEND = "aot_eager"
    tiny_recovery(folder, **{"compile": True, **changes})


def run(
    folder: Path,
    changes: dict[str, Any],
    num_processes: int = 1,
    work: Callable[[Path, dict[str, Any]], None] = recover_by,
    **variables: str,
) -> dict[str, Any]:
    """A tiny recovery in a process of its own, or several; its result."""
    folder.mkdir(parents=True, exist_ok=True)
    forked.together(folder / SAID, num_processes, work, folder, changes, **variables)
    found: dict[str, Any] = read_json(folder / "recovered" / "recovery.json")
    return found


def recovered_by(
    teacher: Any, plan: FoldPlan, out: Path, settings: RecoverySettings, *, windows: tuple[int, int], **options: Any
) -> RecoveryResult:
    """Fold a teacher by a plan, and recover it on so many windows, judged on so many others."""
    student = copy.deepcopy(teacher)
    fold_(student, plan)
    train, held_out = (TrainingWindows(tiny_windows(number, seed)) for seed, number in enumerate(windows, 1))
    return recover(student, teacher, plan, train, held_out, settings, out, **options)


def recovered_on(train: TrainingWindows, out: Path, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """A recovery of the tiny pair on some windows, four in a step."""
    student, teacher, plan = tiny_pair()
    given = RecoverySettings(**{"batch_size": 4, "rank": 2, **(settings or {})})
    return recover(student, teacher, plan, train, TrainingWindows(tiny_windows(4, seed=2)), given, out, **options)

"""What can be refused of a recipe before anything is measured for it: mistakes show now, not after hours of work."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from foldgpt.corpus import reused_texts
from foldgpt.errors import PlanError, UsageError
from foldgpt.families import check_config
from foldgpt.folding import check_same_architecture
from foldgpt.history import known_history
from foldgpt.progress import note
from foldgpt.recovery import check_compiler, check_device, check_loggers
from foldgpt.selection import Request, check_request, number_to_remove
from foldgpt.sources import device_of

if TYPE_CHECKING:
    from foldgpt.plan import FoldPlan
    from foldgpt.recipe import Recipe
    from foldgpt.workbench import Workbench


def check_inputs(bench: Workbench) -> None:
    """Make what is calibrated and measured on, and look for what is trained on.

    Raises:
        FoldGPTError: a text or a task that is not there, too long windows, a harness that is not installed.
    """
    check_without_files(bench)
    _make_tests(bench)
    _ = bench.calibration
    if bench.recipe.recover.num_tokens:
        _ = bench.recovery_texts
    _say_what_is_reused(bench)


def check_without_files(bench: Workbench) -> None:
    """The part of `check_inputs` that needs the model's config alone: no text, no rows of tasks, no tokenizer, and not
    the machine that it is to run on.

    Raises:
        UsageError: too few calibration tokens, too long windows, or as `check_names` says.
    """
    check_names(bench)
    bench.check_calibration_tokens()
    _check_contexts(bench)


def check_tests(bench: Workbench) -> None:
    """Make what is measured on, before a model is loaded to be measured.

    Raises:
        FoldGPTError: a text or a task that is not there, too long windows, a harness that is not installed.
    """
    bench.check_tasks()
    check_tested_contexts(bench)
    _make_tests(bench)


def check_tested_contexts(bench: Workbench) -> None:
    """Refuse windows to measure on that are longer than the model has positions.

    Raises:
        UsageError: they are.
    """
    measured = bench.recipe.evaluate
    for text in measured.texts:
        bench.check_context(f"evaluate.context is {measured.context} for {text}", measured.context)


def check_plan(bench: Workbench) -> None:
    """Look at what is to be cut, and for tokens enough to fit and train on, before anything is measured for it.

    Raises:
        UsageError: nothing is asked for, or no block or more than the model can lose, or what the selector cannot
            do, or one window to fit on, or too few tokens to train on.
        UnsupportedModelError: the model's config has a field that no rule of removal covers.
        PlanError: the model is folded already.
    """
    check_training_tokens(bench)
    bench.check_calibration_tokens()
    layout = getattr(bench.text_config, "fold_layout", None)
    if layout is not None:
        # What lacks sublayers cannot be unfolded: no code but its own knows blocks without them.
        or_unfold = "" if layout.get("absent") else ", or give it weights of its own with foldgpt.unfold_ first"
        raise PlanError(
            f"{bench.recipe.model} is folded already, and shares weights or lacks sublayers: fold its source, by "
            f"one plan{or_unfold}"
        )
    select, share, text = bench.recipe.select, bench.recipe.share, bench.recipe.calibration
    removes = select.removes_anything
    if not removes and share.method == "none":
        raise UsageError(
            "nothing is to be removed and nothing to be shared: say how many blocks (select.remove, "
            "select.remove_ratio, select.target) or how weights are shared (share.method)"
        )
    if share.start == "zero" and not removes:
        raise UsageError(
            "share.start is zero, which is for removed blocks, and nothing is to be removed: say how many "
            "(select.remove, select.remove_ratio, select.target), or let kept blocks share (share.start hard)"
        )
    num_blocks = getattr(bench.text_config, "num_hidden_layers", None)
    if num_blocks is not None:
        check_config(bench.text_config)
        num_remove = number_to_remove(num_blocks, remove=select.remove, ratio=select.remove_ratio)
        if num_remove >= num_blocks:
            asked = f"remove is {select.remove}" if select.remove else f"remove_ratio is {select.remove_ratio}"
            raise UsageError(
                f"select.{asked}, and {bench.recipe.model} has {num_blocks} blocks, of which one must stay"
            )
        if select.remove_ratio and not num_remove:
            raise UsageError(
                f"select.remove_ratio is {select.remove_ratio}, which of {num_blocks} blocks is none. The least "
                f"that removes one is {math.ceil(1000 * 0.5 / num_blocks + 1e-9) / 1000:g}."
            )
        request = Request(
            num_blocks,
            num_remove,
            objective=select.objective,
            sublayers=select.sublayers,
            options=select.options,
        )
        check_request(select.method, request)
    fitted = {
        "compensate.method": bench.recipe.compensate.method != "none" and removes,
        "share.fit": share.fit,
        "share.method auto": share.method == "auto",
    }
    asking = [name for name, fits in fitted.items() if fits]
    if asking and text.num_tokens < 2 * text.context:
        raise UsageError(
            f"calibration.num_tokens is {text.num_tokens:,}, which makes one window of {text.context:,}: what is "
            f"fitted ({', '.join(asking)}) is judged on other windows, so there must be two. Give more tokens or a "
            "shorter context, or do without what is fitted."
        )


def check_applies(bench: Workbench, plan: FoldPlan) -> None:
    """Refuse a plan of another architecture by the model's config, before its weights are read.

    Raises:
        PlanError: the plan is for other blocks than this model has.
    """
    whole, text = bench.config, bench.text_config
    num_blocks = getattr(text, "num_hidden_layers", None)
    if num_blocks is None:
        return
    # The class that is loaded decides which of the two a plan names.
    names = [getattr(whole, "source_model_type", whole.model_type), text.model_type]
    name = plan.source.model_type if plan.source.model_type in names else names[0]
    check_same_architecture(plan, name, num_blocks, bench.recipe.model)


def check_training_tokens(bench: Workbench) -> None:
    """Look whether the recovery, if there is one, has tokens for one step and to judge by; nothing is loaded.

    Raises:
        UsageError: it has not.
    """
    section, batch_size = bench.recipe.recover, bench.recovery_settings.batch_size
    if not section.num_tokens:
        return
    step = batch_size * section.context
    if section.num_tokens < step:
        raise UsageError(
            f"recover.num_tokens is {section.num_tokens:,}, and one step takes {step:,}: {batch_size} windows "
            f"(batch_size in recover.settings) of {section.context:,} tokens (recover.context). Give at least "
            f"{step:,} tokens, fewer windows or a shorter context."
        )
    if section.held_out_tokens < section.context:
        raise UsageError(
            f"recover.held_out_tokens is {section.held_out_tokens:,}, less than one window of {section.context:,} "
            f"(recover.context). Give at least {section.context:,}, or a shorter context."
        )


def check_names(bench: Workbench) -> None:
    """What a recipe names, and this machine has or has not.

    Raises:
        UsageError: an unknown task or one without a text, a logger that is not there, or a cache for a teacher that no
            loss looks at.
    """
    bench.check_tasks()
    section = bench.recipe.recover
    if section.num_tokens:
        check_loggers(section.report_to)
        # The rows of a comparison have the cache in common, whatever each compares with.
        if section.teacher_cache and bench.common is None and not bench.recovery_settings.needs_teacher:
            raise UsageError(
                f"recover.teacher_cache is {section.teacher_cache}, and no loss compares with the teacher: leave it out"
            )


def check_machine(bench: Workbench) -> None:
    """Whether this machine has the device, and can train on it if there is to be a recovery.

    Raises:
        UsageError: it has not, or blocks are to be compiled where that does not work.
    """
    device = device_of(bench.recipe.device)
    if bench.recipe.recover.num_tokens:
        check_device(device)
        if bench.recovery_settings.compile:
            check_compiler(device)


def _check_contexts(bench: Workbench) -> None:
    calibrated, recover = bench.recipe.calibration, bench.recipe.recover
    bench.check_context(f"calibration.context is {calibrated.context}", calibrated.context)
    check_tested_contexts(bench)
    if recover.num_tokens:
        bench.check_context(f"recover.context is {recover.context}", recover.context)


def _make_tests(bench: Workbench) -> None:
    _ = bench.tests
    _ = bench.tasks


@functools.cache
def _say_once(message: str) -> None:
    """Say it once: the rows of a comparison are all measured on the same texts."""
    note(message)


def say_what_is_idle(recipe: Recipe) -> None:
    """Say what a recipe asks of a recovery that it does not have; `--recover-tokens 0` may have taken it out."""
    if recipe.recover.num_tokens:
        return
    section, usual = recipe.recover, type(recipe.recover)()
    keys = [f"recover.{key}" for key in type(section).model_fields if getattr(section, key) != getattr(usual, key)]
    keys += ["compare.recovered"] if recipe.compare.recovered else []
    if keys:
        note(f"nothing is trained, for recover.num_tokens is 0: {', '.join(keys)} change nothing")


def _say_what_is_reused(bench: Workbench) -> None:
    """Say it before hours of work where a result will be no test."""
    recipe = bench.recipe
    uses = {"calibration": recipe.calibration.texts}
    if recipe.recover.num_tokens:
        uses["training"] = recipe.training_texts
    # A model that was folded or recovered before was made by texts too.
    for use, texts in known_history(bench.place).uses.items():
        uses[use] = [*uses.get(use, []), *texts]
    for text, names in reused_texts(recipe.evaluate.texts, uses).items():
        _say_once(f"{text} is used for {' and '.join(names)} too: the perplexity on it will be no test of the model")

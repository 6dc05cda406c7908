"""Flags as parts of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from foldgpt.assignments import assignments
from foldgpt.cli.flags import OPTIONS

if TYPE_CHECKING:
    from foldgpt.analysis import Analysis
    from foldgpt.recipe import Recipe


def recipe_of(**values: Any) -> Recipe:
    """A recipe from flags; None stands for the default."""
    from foldgpt.recipe import Recipe

    given: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = {key: part for key, part in value.items() if part is not None}
        if value is not None:
            given[name] = value
    return Recipe.from_dict(given, OPTIONS)


def calibration_of(text: list[str] | None, context: int | None, tokens: int | None) -> dict[str, Any]:
    """The section `calibration` of a recipe."""
    return {"texts": text or None, "context": context, "num_tokens": tokens}


def like_analysis(analysis: Analysis, given: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """Changes to the recipe of a plan from an analysis: calibration and seed as that was made, but for what is given.

    Args:
        analysis: made before.
        given: what `calibration_of` made of the flags.
        seed: the flag.
    """
    from foldgpt.progress import note

    made = analysis.calibration
    if made is None or made.specs is None or not {"context", "seed"} <= made.protocol.keys():
        note("the analysis does not say which text it was made on; what is fitted is fitted on that of the flags")
        return {}
    before = {"texts": made.specs, "context": made.protocol["context"], "num_tokens": made.num_tokens}
    section = {name: value if given[name] is None else given[name] for name, value in before.items()}
    if section != before:
        text = " + ".join(section["texts"])
        note(
            f"the blocks are ranked by the analysis, on {' + '.join(made.specs)}; what is fitted is fitted on "
            f"{section['num_tokens']:,} tokens of {text} in windows of {section['context']:,}"
        )
    return {"calibration": section, "seed": made.protocol["seed"] if seed is None else seed}


def select_of(
    *,
    method: str | None,
    remove: int | None,
    remove_ratio: float | None,
    target: str | None,
    search_tokens: int | None,
    copies: float | None,
    objective: str | None,
    sublayers: bool | None,
    options: list[str] | None,
    over: Recipe | None = None,
) -> dict[str, Any]:
    """The section `select` of a recipe, as flags give it; options stand over those of the recipe for its selector."""
    there = over.select.options if over is not None and method in (None, over.select.method) else {}
    return {
        "method": method,
        "remove": remove,
        "remove_ratio": remove_ratio,
        "target": target,
        "num_tokens": search_tokens,
        "copies": copies,
        "objective": objective,
        "sublayers": sublayers,
        "options": {**there, **assignments(options, "--option")} if options else None,
    }


def check_objective(given: str | None, recipe: Recipe) -> None:
    """Refuse `--objective` where it would have no effect. What a recipe says may be its default.

    Args:
        given: the flag; None if it is left out.
        recipe: the recipe, the flag in it.

    Raises:
        UsageError: the selector measures no objective, or always the same.
    """
    from foldgpt.errors import UsageError
    from foldgpt.selection import WITH_OBJECTIVE

    method = recipe.select.method
    if given is not None and method not in WITH_OBJECTIVE:
        raise UsageError(
            f"--objective with the selector {method!r}, for which there is nothing to choose: leave it out, or "
            f"--select one of {', '.join(sorted(WITH_OBJECTIVE))}"
        )


def recover_of(
    tokens: int | None,
    texts: list[str] | None,
    minutes: float | None,
    settings: list[str] | None,
    *,
    over: Mapping[str, Any],
) -> dict[str, Any]:
    """The section `recover` of a recipe, as flags of a run give it; settings stand over those of the recipe."""
    return {
        "num_tokens": tokens,
        "texts": texts or None,
        "minutes": minutes,
        "settings": {**over, **assignments(settings, "--recover-set")} if settings else None,
    }


def check_recovers(given: Mapping[str, object], recipe: Recipe) -> None:
    """Refuse flags about a recovery where there is none.

    Args:
        given: name behind `--recover-` → value of the flag.
        recipe: the recipe, the flags in it.

    Raises:
        UsageError: one is given, and nothing is trained.
    """
    from foldgpt.errors import UsageError

    idle = [f"--recover-{name}" for name, value in given.items() if value]
    if idle and not recipe.recover.num_tokens:
        raise UsageError(f"{' and '.join(idle)}, and nothing is trained: say on how many tokens (--recover-tokens)")


def check_search_text(given: int | None, copies: float | None, recipe: Recipe, *, analyses: bool) -> None:
    """Refuse `--search-tokens` and `--copies` where they would have no effect. What a recipe says may be its default.

    Args:
        given: how many tokens; None if the flag is left out.
        copies: the share of a window that repeats; None if the flag is left out.
        recipe: the recipe, the flags in it.
        analyses: whether redundancy is measured on the calibration text.

    Raises:
        UsageError: nothing is measured on them, or there are not so many.
    """
    from foldgpt.errors import UsageError
    from foldgpt.selection import MEASURED

    flags = {"--search-tokens": given, "--copies": copies}
    method, there, context = recipe.select.method, recipe.calibration.num_tokens, recipe.calibration.context
    # The best donors are measured on these tokens too, and what any selector chose is where the text is read anyway.
    measures = (_removes(recipe) and _reads(recipe, analyses)) or method in MEASURED or recipe.share.donor == "best"
    for flag, value in flags.items():
        if value is not None and not measures:
            raise UsageError(
                f"{flag} with the selector {method!r}, which measures nothing on them: leave it out, or "
                f"--select one of {', '.join(sorted(MEASURED))}"
            )
    if given is None:
        return
    if given > there:
        raise UsageError(
            f"--search-tokens is {given:,}, and the calibration text has {there:,} (calibration.num_tokens): give at "
            f"most {there:,}, or more of them"
        )
    if given < context:
        raise UsageError(
            f"--search-tokens is {given:,}, and a window has {context:,} (calibration.context): give at least "
            f"{context:,}, or shorter windows (--context)"
        )


def say_what_is_not_read(given: Mapping[str, object], recipe: Recipe, *, analyses: bool) -> None:
    """Say that flags about the calibration text of a plan change nothing where none is read.

    They are not refused: the same flags with another selector are a comparison.

    Args:
        given: flag → its value; None if it is left out.
        recipe: the recipe, the flags in it.
        analyses: whether redundancy is measured on the calibration text.
    """
    from foldgpt.progress import note
    from foldgpt.selection import MEASURED

    idle = [flag for flag, value in given.items() if value]
    if idle and recipe.select.method not in MEASURED and not _reads(recipe, analyses):
        note(
            f"no calibration text is read, so {' and '.join(idle)} change nothing: the selector "
            f"{recipe.select.method!r} needs none here, and nothing is compensated or fitted"
        )


def _removes(recipe: Recipe) -> bool:
    return recipe.select.removes_anything or recipe.share.size is not None


def _reads(recipe: Recipe, analyses: bool) -> bool:
    """Whether text is read for something else than the search of a selector that measures."""
    from foldgpt.planning import will_read_text

    return analyses or will_read_text(recipe) or (_removes(recipe) and recipe.compensate.method != "none")

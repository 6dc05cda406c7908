"""The steps of a run that measure models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foldgpt.checks import check_tested_contexts, check_tests
from foldgpt.corpus import reused_texts
from foldgpt.errors import UsageError
from foldgpt.evaluation import Evaluation, Measured, Subject, evaluate
from foldgpt.history import known_history
from foldgpt.plan import FoldPlan
from foldgpt.progress import note
from foldgpt.recovery_result import RECOVERY
from foldgpt.run_folder import PLAN
from foldgpt.sources import resolve
from foldgpt.steps.tokenizers import same_ids
from foldgpt.workbench import Workbench


def make_source_evaluation(bench: Workbench) -> Evaluation:
    """Measure the recipe's model by itself, but for its speed: that means something only beside another's."""
    return evaluate(
        _source_of(bench),
        **_tests(bench),
        speed=False,
        memory=bench.recipe.evaluate.memory,
        num_generations=_num_generations(bench),
    )


def make_evaluation_before_recovery(bench: Workbench, folded: Path) -> Evaluation:
    """Measure what a folded model predicts before it is trained: what the training is worth is seen beside it."""
    model = bench.load(folded, str(folded))
    subject = Subject("folded", model.model, folded, model.tokenizer)
    return evaluate(subject, **_tests(bench), speed=False, memory=False)


def make_evaluation(
    bench: Workbench,
    folded: str | Path,
    *,
    compare: bool = True,
    source: Measured | None = None,
    before_recovery: Measured | None = None,
) -> Evaluation:
    """Measure a model, beside the recipe's unless that is the very one.

    Args:
        bench: the inputs; its model is the baseline.
        folded: the model to measure, usually a saved folded one.
        compare: measure the baseline too, and give ratios.
        source: what `make_source_evaluation` measured of the baseline; it is not measured again.
        before_recovery: what `make_evaluation_before_recovery` measured.
    """
    recipe, section = bench.recipe, bench.recipe.evaluate
    # The model itself, measured alone, may be of a revision of its own.
    place = bench.place if not compare and str(folded) == recipe.model else resolve(str(folded))
    check_tests(bench)
    if compare:
        check_tested_contexts(Workbench(recipe.model_copy(update={"model": str(place), "revision": None})))
    measured = bench.load(place, str(folded))
    reused = reused_texts(section.texts, known_history(place).uses)
    if bench.test is not None:
        _check_comparable(bench.tokenizer, measured.tokenizer, bench.recipe.model, str(folded))
    speed = section.speed
    if speed and (measured.offloaded or (compare and bench.source.offloaded)):
        note("without speed: there is not enough memory for both models, and bringing weights would be timed as well")
        speed = False
    baseline = None
    if compare and (source is None or speed):
        baseline = _source_of(bench, _baseline_name(bench, place) if source is None else source.name)
    # That of a run is the run's, and another run with the same inputs may take over what was measured.
    spec, revision = (str(folded), None if compare else recipe.revision) if source is None else (None, None)
    return evaluate(
        Subject(_what_is(place), measured.model, place, measured.tokenizer, spec, revision),
        baseline,
        **_tests(bench),
        speed=speed,
        memory=section.memory,
        num_generations=_num_generations(bench),
        known=source,
        reused=reused,
        before_recovery=before_recovery,
    )


def _source_of(bench: Workbench, name: str = "source") -> Subject:
    source = bench.source
    return Subject(name, source.model, bench.place, source.tokenizer, bench.recipe.model, source.revision)


def _baseline_name(bench: Workbench, place: Path) -> str:
    """What tables call the model that another is compared with: its source, unless that is known to be another."""
    kind = _what_is(bench.place)
    if kind == "model" or ((place / PLAN).is_file() and FoldPlan.load(place).source.fingerprint == bench.fingerprint):
        return "source"
    return "baseline" if kind == _what_is(place) else kind


def _tests(bench: Workbench) -> dict[str, Any]:
    """What `evaluate` measures predictions on, whichever model it is."""
    return {
        "windows": bench.test,
        "text": next(iter(bench.tests), None),
        "further_windows": bench.further_tests,
        "tasks": bench.tasks,
        "seed": bench.recipe.seed,
    }


def _num_generations(bench: Workbench) -> int:
    return bench.recipe.evaluate.generations if bench.test is not None else 0


def _what_is(place: Path) -> str:
    """What tables call the model of a folder."""
    return "recovered" if (place / RECOVERY).is_file() else "folded" if (place / PLAN).is_file() else "model"


def _check_comparable(tokenizer: Any, other: Any, name: str, other_name: str) -> None:
    """Refuse to measure models side by side whose tokenizers number words differently.

    Raises:
        UsageError: they do; perplexities per token could not be compared either.
    """
    if not same_ids(tokenizer, other):
        raise UsageError(
            f"{other_name} has another tokenizer than {name}, so perplexities and generations on the same tokens "
            "cannot be compared. Measure each by itself, without a baseline."
        )

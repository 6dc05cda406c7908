"""The measurements of a folded model, and of its source beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldgpt.errors import UsageError
from foldgpt.evaluation.errors import MeasurementError
from foldgpt.evaluation.generations import generations
from foldgpt.evaluation.last_word import last_word
from foldgpt.evaluation.memory import PeakMemory, peak_memory
from foldgpt.evaluation.performance import measure_speed
from foldgpt.evaluation.perplexity import perplexity
from foldgpt.evaluation.result import AVERAGE, Evaluation, Measured
from foldgpt.evaluation.size import folder_bytes, size_of
from foldgpt.evaluation.tasks import Retained, Suite, retained, retained_on_average
from foldgpt.families import brings_own_code
from foldgpt.formats import dtype_name
from foldgpt.progress import note
from foldgpt.sources import stored_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foldgpt.corpus import Windows


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        name: how the result calls it, e.g. "source" or "folded".
        model: the loaded model.
        folder: where it is saved (a folder, or a GGUF file); None leaves out bytes on disk and peak memory.
        tokenizer: its tokenizer; needed for tasks, last words and generations alone.
        spec: which model it is, for the record.
        revision: its revision on the hub, for the record.
    """

    name: str
    model: PreTrainedModel
    folder: Path | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    spec: str | None = None
    revision: str | None = None


def evaluate(
    folded: Subject,
    baseline: Subject | None = None,
    *,
    windows: Windows | None = None,
    text: str | None = None,
    further_windows: Mapping[str, Windows] | None = None,
    speed: bool = True,
    memory: bool = True,
    tasks: Suite | None = None,
    num_generations: int = 0,
    seed: int = 0,
    known: Measured | None = None,
    reused: Mapping[str, Sequence[str]] | None = None,
    before_recovery: Measured | None = None,
) -> Evaluation:
    """Measure a folded model and, in the same run, the model it is compared with.

    Args:
        folded: the model in question.
        baseline: usually its source; the ratios refer to it.
        windows: text for the perplexity, the same for both; None leaves perplexity out.
        text: what that text is called in full, should a further one have the same name in another folder.
        further_windows: further texts for it, by what they are called in full. Last words and generations are of
            `windows` alone.
        speed: measure prefill and decode speed, the two models taking turns.
        memory: measure peak memory, for subjects saved as a Hugging Face folder. It is left out, with a note, for one
            that is offloaded, and where the process that is to load the model once more fails, as it does where there
            is not enough memory for that.
        tasks: multiple-choice tasks; they need `windows`, on which last words are measured beside them, because
            choosing an answer may still work where writing one does not.
        num_generations: continue the beginnings of the first so many windows.
        seed: of the random prompt whose speed is measured.
        known: what was measured of the baseline before, with the same arguments: only its speed is measured again,
            because models must take turns for that. Without `speed` no `baseline` is needed then.
        reused: for the record of the folded model: see `Measured.reused`.
        before_recovery: what was measured of it before it was trained, with the same arguments.

    Raises:
        UsageError: the two subjects have one name, one lacks the tokenizer that is needed, tasks are asked for
            without a text, or the speed of a baseline is to be measured that is only known.
        FoldGPTError: a measurement failed; see `perplexity`, `measure_speed`, `folder_bytes`.
    """
    subjects = [folded] if baseline is None else [baseline, folded]
    other_name = baseline.name if baseline is not None else None if known is None else known.name
    if other_name == folded.name:
        raise UsageError(f"both models are called {folded.name!r}; they need two names to be told apart.")
    if known is not None and baseline is None and speed:
        raise UsageError(f"the speed of {known.name} can only be compared if it is there to take turns.")
    if tasks is not None and windows is None:
        raise UsageError(
            "tasks need a text as well (windows): multiple choice alone can hide that a model no longer writes, so "
            "perplexity and last words stand beside it"
        )
    for subject in subjects:
        if subject.tokenizer is None and (tasks is not None or num_generations):
            raise UsageError(f"tasks and generations of {subject.name} need its tokenizer.")
    speeds = measure_speed({subject.name: subject.model for subject in subjects}, seed=seed) if speed else {}
    further = further_windows or {}
    measured = [
        Measured(
            name=subject.name,
            model=subject.spec,
            revision=subject.revision,
            size=size_of(subject.model),
            bytes_on_disk=None if subject.folder is None else folder_bytes(subject.folder),
            stored_in=None if subject.folder is None else _stored_in(subject.folder),
            perplexity=None if windows is None else perplexity(subject.model, windows),
            text=None if windows is None else text,
            further_perplexities={text: perplexity(subject.model, each) for text, each in further.items()} or None,
            speed=speeds.get(subject.name),
            peak_memory=_peak_memory(subject) if memory else None,
            reused={text: list(uses) for text, uses in (reused or {}).items()} or None if subject is folded else None,
            **_written(subject, windows, tasks, num_generations),
        )
        for subject in (subjects if known is None else [folded])
    ]
    if known is not None:
        measured.insert(0, replace(known, speed=speeds.get(known.name)))
    if len(measured) == 1:
        return Evaluation(measured[0], None, None, before_recovery=before_recovery)
    other, own = measured
    return Evaluation(own, other, _ratios(own, other), _retained(own, other), before_recovery)


def _stored_in(folder: Path) -> str | None:
    if folder.is_file():
        return "GGUF"
    dtype = stored_dtype(folder) if (folder / "config.json").is_file() else None
    return None if dtype is None else dtype_name(dtype)


def _written(subject: Subject, windows: Windows | None, tasks: Suite | None, num_generations: int) -> dict[str, Any]:
    """What needs a tokenizer: fields of `Measured`."""
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return {}
    fields: dict[str, Any] = {}
    if windows is not None and tasks is not None:
        # First: it takes little time, and a text without words is an error, which should not cost scored tasks.
        fields["last_word"] = last_word(subject.model, tokenizer, windows)
    if tasks is not None:
        fields["tasks"] = tasks.measure(subject.model, tokenizer)
    if windows is not None and num_generations:
        fields["generations"] = generations(subject.model, tokenizer, windows, num=num_generations)
    return fields


def _retained(folded: Measured, baseline: Measured) -> dict[str, Retained] | None:
    if not folded.tasks or not baseline.tasks:
        return None
    each = {task: retained(score, baseline.tasks[task]) for task, score in folded.tasks.items()}
    return {**each, AVERAGE: retained_on_average(folded.tasks, baseline.tasks)}


def _peak_memory(subject: Subject) -> PeakMemory | None:
    # A GGUF file is dequantised on the way in, so it has no peak of its own to compare.
    if subject.folder is None or not subject.folder.is_dir():
        return None
    if any(parameter.is_meta for parameter in subject.model.parameters()):
        note(f"without peak memory of {subject.name}: it is offloaded, and a process of its own would load it whole")
        return None
    dtype = dtype_name(subject.model.dtype)
    try:
        return peak_memory(
            subject.folder,
            dtype=dtype,
            device=str(subject.model.device),
            trust_remote_code=brings_own_code(subject.model),
        )
    except MeasurementError as error:
        # Most often beside the models that are loaded already; what was measured of them is worth keeping.
        note(f"without peak memory of {subject.name}: {error}")
        return None


def _ratios(folded: Measured, baseline: Measured) -> dict[str, float | None]:
    own, other = folded.figures(), baseline.figures()
    ratios: dict[str, float | None] = {}
    for name, value in own.items():
        base = other.get(name)
        ratios[name] = None if value is None or not base else value / base
    if folded.speed is not None:
        ratios["prefill_tokens_per_s"] = folded.speed.prefill.ratio
        ratios["decode_tokens_per_s"] = folded.speed.decode.ratio
    return ratios

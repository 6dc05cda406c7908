"""All measurements of a folded model, and of its source beside it, as one result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from foldgpt.artifacts import read_json
from foldgpt.errors import ArtifactError, UsageError, first_problem
from foldgpt.evaluation.errors import NotEnoughMemoryError
from foldgpt.evaluation.generations import Generation, generations
from foldgpt.evaluation.last_word import LastWord, last_word
from foldgpt.evaluation.memory import PeakMemory, peak_memory
from foldgpt.evaluation.performance import Speed, measure_speed
from foldgpt.evaluation.perplexity import Perplexity, perplexity
from foldgpt.evaluation.size import ModelSize, folder_bytes, size_of
from foldgpt.evaluation.tasks import Retained, Suite, TaskScore, retained, retained_on_average
from foldgpt.evaluation.tasks.score import average
from foldgpt.families import brings_own_code
from foldgpt.formats import dtype_name
from foldgpt.progress import note
from foldgpt.sources import stored_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foldgpt.corpus import Windows

FORMAT = "foldgpt.evaluation"
VERSION = 1

#: What `Evaluation.retained` calls the mean over tasks.
AVERAGE = "average"


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        name: how the result calls it, e.g. "source" or "folded".
        model: the loaded model.
        folder: where it is saved (a folder, or a GGUF file); None leaves out bytes on disk and peak memory.
        tokenizer: its tokenizer; needed for tasks, last words and generations alone.
    """

    name: str
    model: PreTrainedModel
    folder: Path | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


def _text_of(scores: Perplexity) -> str:
    return " + ".join(scores.protocol.get("texts", [])) or "text"


@dataclass(frozen=True)
class Measured:
    """What was measured of one model; None where a measurement was not asked for or not possible.

    Attributes:
        name: of the subject.
        size: parameters, bytes, KV cache.
        bytes_on_disk: of the weight files.
        perplexity: with its protocol.
        speed: prefill and decode, with its protocol.
        peak_memory: of a fresh process that loads and runs the saved model.
        tasks: task → accuracies.
        last_word: how well it finds the last word of passages.
        generations: what it writes.
        further_perplexities: text → perplexity, of texts beyond the first.
        text: the first text in full. None where that is not known, as in results of earlier versions.
        reused: text in full → what the model was made by on it as well ("calibration", "training"): a figure on it is
            no test.
        stored_in: number format of the weight files, such as "bfloat16"; "GGUF" of such a file, whatever is in it.
    """

    name: str
    size: ModelSize
    bytes_on_disk: int | None
    perplexity: Perplexity | None
    speed: Speed | None
    peak_memory: PeakMemory | None
    tasks: dict[str, TaskScore] | None = None
    last_word: LastWord | None = None
    generations: list[Generation] | None = None
    further_perplexities: dict[str, Perplexity] | None = None
    text: str | None = None
    reused: dict[str, list[str]] | None = None
    stored_in: str | None = None

    def perplexities(self) -> dict[str, tuple[str, Perplexity]]:
        """Figure → what the text is called and its perplexity, the first text first.

        A text is called by its name without folders, and in full if another one has that name.
        """
        if self.perplexity is None:
            return {}
        texts = {"perplexity": (self.text or _text_of(self.perplexity), self.perplexity)}
        texts |= {f"perplexity.{text}": (text, scores) for text, scores in (self.further_perplexities or {}).items()}
        names = Counter(_text_of(scores) for _, scores in texts.values())
        return {
            figure: (text if names[_text_of(scores)] > 1 else _text_of(scores), scores)
            for figure, (text, scores) in texts.items()
        }

    def figures(self) -> dict[str, float | None]:
        """The headline numbers by name, in the order in which a table shows them.

        Those of tasks (`task.NAME`, their mean `task_average`), of last words and of further texts
        (`perplexity.TEXT`) are there only if measured, `private_bytes` only if there are private terms.
        """
        figures: dict[str, float | None] = {
            "num_blocks": self.size.num_blocks,
            "unique_parameters": self.size.unique_parameters,
            "block_parameters": self.size.block_parameters,
            "bytes_on_disk": self.bytes_on_disk,
            "perplexity": None if self.perplexity is None else self.perplexity.value,
            **{f"perplexity.{text}": scores.value for text, scores in (self.further_perplexities or {}).items()},
            "prefill_tokens_per_s": None if self.speed is None else self.speed.prefill.median,
            "decode_tokens_per_s": None if self.speed is None else self.speed.decode.median,
            "peak_memory_bytes": None if self.peak_memory is None else self.peak_memory.peak_rss,
            "kv_bytes_per_token": self.size.kv_bytes_per_token,
        }
        if self.size.private_bytes:
            figures["private_bytes"] = self.size.private_bytes
        if self.last_word is not None:
            figures |= {
                "last_word_accuracy": self.last_word.accuracy,
                "last_word_perplexity": self.last_word.perplexity,
            }
        if self.tasks:
            figures |= {f"task.{task}": score.accuracy.value for task, score in self.tasks.items()}
            figures["task_average"] = average(self.tasks)
        return figures


@dataclass(frozen=True)
class Evaluation:
    """What was measured, ready for JSON.

    Attributes:
        folded: the model in question.
        baseline: the model it is compared with; None if there was none.
        ratios: folded / baseline for each of `Measured.figures()`; None where either is missing. The speeds'
            are medians of paired ratios, not ratios of medians.
        retained: task → what is left of the baseline's accuracy, and "average" over them; None without tasks or
            baseline.
    """

    folded: Measured
    baseline: Measured | None
    ratios: dict[str, float | None] | None
    retained: dict[str, Retained] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with its format and version. Pass it to `artifacts.write_json`."""
        return {"format": FORMAT, "version": VERSION, **_ADAPTER.dump_python(self, mode="json")}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str = "the evaluation") -> Evaluation:
        """Read the JSON form back.

        Args:
            value: what `to_dict` gave.
            where: what the value is or comes from, for the error message.

        Raises:
            ArtifactError: another format or version, or a field that is missing or of the wrong type.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            raise ArtifactError(f"{where} is not an evaluation (its format should be {FORMAT!r}).")
        if value.get("version") != VERSION:
            raise ArtifactError(f"{where} has version {value.get('version')}; this foldgpt reads {VERSION}.")
        try:
            return _ADAPTER.validate_python({name: value.get(name) for name in _NAMES})
        except ValidationError as error:
            raise ArtifactError(f"{where}: {first_problem(error)}") from error

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read an evaluation file. Raises `ArtifactError` as `read_json` and `from_dict` do."""
        return cls.from_dict(read_json(path, "evaluation"), str(path))


_ADAPTER = TypeAdapter(Evaluation)
_NAMES = ("folded", "baseline", "ratios", "retained")


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
            that is offloaded, and where there is not enough memory to load a model once more.
        tasks: multiple-choice tasks; they need `windows`, on which last words are measured beside them, because
            choosing an answer may still work where writing one does not.
        num_generations: continue the beginnings of the first so many windows.
        seed: of the random prompt whose speed is measured.
        known: what was measured of the baseline before, with the same arguments: only its speed is measured again,
            because models must take turns for that. Without `speed` no `baseline` is needed then.
        reused: for the record of the folded model: see `Measured.reused`.

    Raises:
        UsageError: the two subjects have one name, one lacks the tokenizer that is needed, tasks are asked for
            without a text, or the speed of a baseline is to be measured that is only known.
        FoldGPTError: a measurement failed; see `perplexity`, `measure_speed`, `peak_memory`, `folder_bytes`.
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
        return Evaluation(measured[0], None, None)
    other, own = measured
    return Evaluation(own, other, _ratios(own, other), _retained(own, other))


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
    except NotEnoughMemoryError as error:
        # Beside the models that are loaded already; what was measured of them is worth keeping.
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

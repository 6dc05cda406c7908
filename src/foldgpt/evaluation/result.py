"""What was measured of models, as values and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from foldgpt.artifacts import read_json
from foldgpt.errors import ArtifactError, first_problem
from foldgpt.evaluation.generations import Generation
from foldgpt.evaluation.last_word import LastWord
from foldgpt.evaluation.memory import PeakMemory
from foldgpt.evaluation.performance import Speed
from foldgpt.evaluation.perplexity import Perplexity
from foldgpt.evaluation.size import ModelSize
from foldgpt.evaluation.tasks import Retained, TaskScore
from foldgpt.evaluation.tasks.score import average

FORMAT = "foldgpt.evaluation"
VERSION = 1

#: What `Evaluation.retained` calls the mean over tasks.
AVERAGE = "average"


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
        model: which model it is: a folder, a file or a name on the hub. None of the model of a run, which is the run's
            own, and in results of earlier versions.
        revision: its revision on the hub, if one was given.
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
    model: str | None = None
    revision: str | None = None

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
        (`perplexity.TEXT`) are there only if measured, `peak_accelerator_bytes` only on CUDA, `private_bytes` only if
        there are private terms.
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
        if self.peak_memory is not None and self.peak_memory.peak_accelerator is not None:
            figures["peak_accelerator_bytes"] = self.peak_memory.peak_accelerator
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
        before_recovery: the folded model as it was before it was trained, where that was measured: what it predicts;
            speed and memory are those of the trained one.
    """

    folded: Measured
    baseline: Measured | None
    ratios: dict[str, float | None] | None
    retained: dict[str, Retained] | None = None
    before_recovery: Measured | None = None

    @property
    def models(self) -> list[Measured]:
        """All that were measured, in the order of what was done: source, folded, recovered."""
        return [model for model in (self.baseline, self.before_recovery, self.folded) if model is not None]

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
_NAMES = ("folded", "baseline", "ratios", "retained", "before_recovery")

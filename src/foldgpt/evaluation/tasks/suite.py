"""Tasks ready to be measured: the harness's own definitions, with rows from the hub or from local files."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from foldgpt.artifacts import from_home, hash_of
from foldgpt.errors import FoldGPTError, SourceError, UsageError, did_you_mean, first_line
from foldgpt.evaluation.tasks.catalog import TASKS, TaskDefinition
from foldgpt.evaluation.tasks.rows import find_file, read_rows
from foldgpt.evaluation.tasks.score import Accuracy, TaskScore
from foldgpt.formats import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The harness's definitions are read as they stand: nothing is put before the prompt, no examples, no chat template.
_NUM_SHOTS = 0
_SPLIT = "test"


@dataclass(frozen=True)
class _LoadedTask:
    """A task of the harness, and where its rows come from, as the protocol says it."""

    task: Any
    definition: TaskDefinition
    data: str


@dataclass(frozen=True)
class Suite:
    """Tasks, loaded and checked. Get one with `load_suite`; it may be measured with any number of models.

    Attributes:
        limit: score only the first so many items of each task; None for all.
    """

    tasks: dict[str, _LoadedTask]
    limit: int | None

    @property
    def fingerprint(self) -> str:
        """Identity of all that decides which items are scored and how: definitions, rows and limit."""
        parts = [
            [name, loaded.definition.model_dump(mode="json"), [dict(doc) for doc in loaded.task.eval_docs]]
            for name, loaded in self.tasks.items()
        ]
        return hash_of([parts, self.limit, _harness_version()])

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, TaskScore]:
        """Score a model on each task.

        Args:
            model: a causal language model, on any device. Its training flag is as before when this returns.
            tokenizer: its tokenizer; BOS is put before a prompt if the tokenizer itself does so.

        Returns:
            Task → score, in the order in which the tasks were asked for.

        Raises:
            MeasurementError: the model's output is not finite.
        """
        from foldgpt.evaluation.tasks.harness_model import LoadedModel

        was_training = model.training
        try:
            with _quiet_harness():
                wrapped = LoadedModel(model, tokenizer)
                return {name: self._score(name, wrapped) for name in self.tasks}
        finally:
            model.train(was_training)

    def _score(self, name: str, wrapped: Any) -> TaskScore:
        from lm_eval.evaluator import evaluate

        loaded = self.tasks[name]
        num_items = len(loaded.task.eval_docs)
        wrapped.doing = f"Task {name}, {min(num_items, self.limit or num_items):,} items"
        truncated_before = wrapped.num_truncated
        results = evaluate(wrapped, {"tasks": {name: loaded.task}}, limit=self.limit, bootstrap_iters=0)
        samples = results["samples"][name]
        metrics = {entry["metric"] for entry in loaded.task.config.metric_list}
        return TaskScore(
            metrics={
                metric: Accuracy.of([bool(sample[metric]) for sample in samples])
                for metric in ("acc", "acc_norm")
                if metric in metrics
            },
            headline=loaded.definition.headline,
            chance=fmean(1 / len(sample["arguments"]) for sample in samples),
            num_items=len(samples),
            fingerprint=hash_of([[sample["arguments"], sample["target"], sample["doc"]] for sample in samples]),
            protocol={
                "harness": f"lm_eval {_harness_version()}",
                "task_version": loaded.task.VERSION,
                "data": loaded.data,
                "items": f"the first {len(samples):,} of {num_items:,}" if len(samples) < num_items else "all",
                "shots": _NUM_SHOTS,
                "dtype": dtype_name(wrapped.model.dtype),
                "truncated_requests": wrapped.num_truncated - truncated_before,
            },
        )


def load_suite(names: Sequence[str], *, data_dir: str | Path | None = None, limit: int | None = None) -> Suite:
    """Load tasks and check their rows, before any model is loaded.

    Args:
        names: of `TASKS`.
        data_dir: folder of JSON-lines files to read the rows from; None takes them from the hub.
        limit: score only the first so many items of each task, as the harness does; None for all.

    Raises:
        UsageError: an unknown task, one named twice, no task at all, a limit below 1, or no such folder.
        SourceError: a file or a field is missing, a row is malformed, or the hub cannot be read.
        FoldGPTError: the harness is not installed.
    """
    check_task_names(names)
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; at least one item of each task must be scored.")
    definitions = [TASKS[name] for name in names]
    rows: dict[str, tuple[Path, list[dict[str, Any]]]] = {}
    if data_dir is not None:
        for definition in definitions:
            file = find_file(from_home(data_dir), definition.files, definition.task)
            rows[definition.task] = (file, read_rows(file, definition.fields))
    if importlib.util.find_spec("lm_eval") is None:
        raise FoldGPTError(
            "tasks need lm-evaluation-harness, which is not installed: pip install 'foldgpt[tasks]' (in foldgpt's own "
            "folder: '.[tasks]')"
        )
    with _quiet_harness():
        loaded = {name: _load(TASKS[name], *rows.get(name, (None, None))) for name in names}
    return Suite(loaded, limit)


def check_task_names(names: Sequence[str]) -> None:
    """Check names alone, where no rows are at hand.

    Raises:
        UsageError: an unknown task, one named twice, or no task at all.
    """
    if not names:
        raise UsageError(f"no task was named. Known tasks are {', '.join(TASKS)}.")
    for name in names:
        if name not in TASKS:
            raise UsageError(f"unknown task {name!r}.{did_you_mean(name, TASKS)}")
        if names.count(name) > 1:
            raise UsageError(f"the task {name!r} is named twice")


def _load(definition: TaskDefinition, file: Path | None, rows: list[dict[str, Any]] | None) -> _LoadedTask:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / definition.harness
    # The harness has thousands of tasks; only this one's folder is read.
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
    if file is None or rows is None:
        return _load_from_hub(definition, manager)
    changes = {**definition.local, **_splits(rows)}
    # A group is the harness's way to load one of its tasks with some keys changed.
    spec = {"group": f"local {definition.task}", "task": [{"task": definition.task, **changes}]}
    return _LoadedTask(manager.load(spec)["tasks"][definition.task], definition, file.name)


def _load_from_hub(definition: TaskDefinition, manager: Any) -> _LoadedTask:
    try:
        task = manager.load(definition.task)["tasks"][definition.task]
    except Exception as error:  # the client passes on errors of many libraries
        raise SourceError(
            f"cannot read the rows of {definition.task} from the hub: {first_line(error)}. "
            "Rows from local files: --data-dir"
        ) from error
    return _LoadedTask(task, definition, " ".join(filter(None, (task.config.dataset_path, task.config.dataset_name))))


def _splits(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Keys of a task's definition that make it read these rows."""
    import datasets

    table = datasets.Dataset.from_list(rows)
    return {
        "custom_dataset": lambda **_: {_SPLIT: table},
        "training_split": None,
        "validation_split": None,
        "fewshot_split": None,
        "test_split": _SPLIT,
    }


def _harness_version() -> str:
    return importlib.metadata.version("lm_eval")


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Neither the harness's log, nor its bars and those of the data it reads: progress is shown here."""
    import datasets
    from lm_eval.api import task as harness_task

    # The hub's client says of each failed try what the last one's error says.
    loggers = {name: logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")}
    levels = {name: logger.level for name, logger in loggers.items()}
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # The harness has no way to switch off the bar it shows while it makes requests of rows.
    harness_bar = harness_task.tqdm
    harness_task.tqdm = functools.partial(harness_bar, disable=True)
    try:
        yield
    finally:
        harness_task.tqdm = harness_bar
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        if not bars:
            datasets.enable_progress_bars()

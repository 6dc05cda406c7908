"""Tasks score what the harness would, agree with a plain scorer, and refuse data that would make them lie."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-evaluation-harness is not installed (extra 'tasks')", allow_module_level=True)

import datasets
import lm_eval.tasks
import torch
from accelerate import cpu_offload
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr
from lm_eval.models.huggingface import HFLM

from foldgpt.corpus import Windows
from foldgpt.errors import FoldGPTError, SourceError, UsageError
from foldgpt.evaluation import Evaluation, MeasurementError, Subject, evaluate
from foldgpt.evaluation.tasks import TASKS, Accuracy, TaskScore, load_suite, retained, retained_on_average
from foldgpt.evaluation.tasks.harness_model import LoadedModel
from foldgpt.folding import fold_, save_folded, source_model_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.sources import load_source
from models import tiny_model
from multiple_choice import ITEMS, hits
from task_data import FILES, HUB, LOCAL, write_task_data
from tiny import tiny_tokenizer

VOCABULARY = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_data(tmp_path_factory.mktemp("tasks"))


def model(**changes: Any) -> Any:
    return tiny_model("llama", vocab_size=VOCABULARY, **{"max_position_embeddings": 256, **changes})


def the_harness_s_own(task: str) -> Any:
    """The harness's task as it stands, on rows laid out as on the hub."""
    manager = lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=str(Path(lm_eval.tasks.__file__).parent / TASKS[task].harness)
    )
    table = datasets.Dataset.from_list(HUB[task])
    rows = dict.fromkeys(("train", "validation", "test"), table)
    spec = {"group": "own", "task": [{"task": task, "custom_dataset": lambda **_: rows}]}
    return manager.load(spec)["tasks"][task]


def requests_of(task: Any) -> list[tuple[str, str]]:
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("task", list(TASKS))
def test_local_rows_make_the_requests_that_the_harness_makes_of_the_hub_s(task: str, data: Path) -> None:
    own, ours = the_harness_s_own(task), load_suite([task], data_dir=data).tasks[task].task
    for own_doc, our_doc in zip(own.eval_docs, ours.eval_docs, strict=True):
        assert own.doc_to_text(own_doc) == ours.doc_to_text(our_doc)
        assert own.doc_to_choice(own_doc) == ours.doc_to_choice(our_doc)
        assert own.doc_to_target(own_doc) == ours.doc_to_target(our_doc)
    assert requests_of(own) == requests_of(ours)
    assert own.config.metric_list == ours.config.metric_list


@pytest.mark.parametrize(("family", "bos"), [("llama", False), ("llama", True), ("gemma3", True), ("gpt2", False)])
def test_equals_a_plain_scorer(family: str, bos: bool, data: Path) -> None:
    source = tiny_model(family, vocab_size=VOCABULARY, max_position_embeddings=256)
    tokenizer = tiny_tokenizer(VOCABULARY, bos=bos)
    scores = load_suite(list(TASKS), data_dir=data).measure(source, tokenizer)
    assert list(scores) == list(TASKS)
    for task, score in scores.items():
        plain, normed = hits(source, tokenizer, [ITEMS[task](row) for row in LOCAL[task]])
        assert score.metrics["acc"].hits == plain, task
        assert "acc_norm" not in score.metrics or score.metrics["acc_norm"].hits == normed, task
        assert score.num_items == len(LOCAL[task])


def test_log_likelihoods_equal_the_unchanged_harness(data: Path) -> None:
    source, tokenizer = model(max_position_embeddings=40), tiny_tokenizer(VOCABULARY, bos=True)
    # One of them is longer than the model's positions, two differ in their last token only.
    pairs = [
        ("abc " * 20, "then"),
        ("The sun", " is a star"),
        ("Is it", " y"),
        ("Is it", " n"),
        ("", "alone"),
        ("x ", "y"),
    ]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    ours = LoadedModel(source, tokenizer)
    expected = HFLM(pretrained=source, tokenizer=tokenizer, backend="causal").loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (other, other_greedy) in zip(ours.loglikelihood(requests), expected, strict=True):
        assert value == pytest.approx(other, rel=1e-5)
        assert greedy == other_greedy
    assert ours.num_truncated == 1


def test_a_folded_model_scores_the_same_in_memory_and_from_its_folder(data: Path, tmp_path: Path) -> None:
    """The harness ties a model's weights anew when it wraps it: sharing must survive that."""
    folded, tokenizer = model(), tiny_tokenizer(VOCABULARY)
    made = FoldPlan.create(source_model_of(folded, name="tiny"), removed=[1], groups=[Group(blocks=(2, 3))])
    fold_(folded, made)
    save_folded(folded, made, tmp_path / "folded", tokenizer=tokenizer)
    suite = load_suite(["arc_easy", "boolq"], data_dir=data)
    num_parameters = sum(parameter.numel() for parameter in folded.parameters())
    scores = suite.measure(folded, tokenizer)
    assert sum(parameter.numel() for parameter in folded.parameters()) == num_parameters
    assert suite.measure(load_source(str(tmp_path / "folded")).model, tokenizer) == scores
    plain, _ = hits(folded, tokenizer, [ITEMS["arc_easy"](row) for row in LOCAL["arc_easy"]])
    assert scores["arc_easy"].metrics["acc"].hits == plain


def test_output_that_is_not_finite_is_refused(data: Path) -> None:
    broken = model()
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    with pytest.raises(MeasurementError, match="not finite"):
        load_suite(["piqa"], data_dir=data).measure(broken, tiny_tokenizer(VOCABULARY))


def test_a_tokenizer_that_marks_neither_begin_nor_end_is_scored_alike(data: Path) -> None:
    suite, source = load_suite(["piqa"], data_dir=data), model()
    plain = tiny_tokenizer(VOCABULARY)
    assert plain.bos_token_id is not None or plain.eos_token_id is not None
    bare = tiny_tokenizer(VOCABULARY)
    bare.bos_token = bare.eos_token = None
    assert suite.measure(source, bare)["piqa"].metrics == suite.measure(source, plain)["piqa"].metrics


def test_an_answer_longer_than_the_model_s_positions_is_refused_by_its_words(data: Path) -> None:
    short = model(max_position_embeddings=2)
    with pytest.raises(MeasurementError, match=r"an answer of \d+ tokens .* with 2 positions: '"):
        load_suite(["piqa"], data_dir=data).measure(short, tiny_tokenizer(VOCABULARY))


def test_small_batches_change_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, source, tokenizer = load_suite(["hellaswag"], data_dir=data), model(), tiny_tokenizer(VOCABULARY)
    whole = suite.measure(source, tokenizer)
    monkeypatch.setattr("foldgpt.evaluation.tasks.harness_model._BATCH_TOKENS", 1)
    assert suite.measure(source, tokenizer) == whole


def test_chance_follows_the_choices_of_each_row(data: Path) -> None:
    scores = load_suite(["arc_easy", "boolq"], data_dir=data).measure(model(), tiny_tokenizer(VOCABULARY))
    assert scores["arc_easy"].chance == pytest.approx((1 / 4 + 1 / 3 + 1 / 5 + 1 / 4) / 4)
    assert scores["boolq"].chance == 0.5


def test_limit_takes_the_first(data: Path) -> None:
    source, tokenizer = model(), tiny_tokenizer(VOCABULARY)
    whole = load_suite(["arc_easy"], data_dir=data).measure(source, tokenizer)["arc_easy"]
    first = load_suite(["arc_easy"], data_dir=data, limit=3).measure(source, tokenizer)["arc_easy"]
    assert first.accuracy.hits == whole.accuracy.hits[:3]
    assert first.protocol["items"] == "the first 3 of 4"
    assert whole.protocol["items"] == "all"
    assert whole.protocol["data"] == FILES["arc_easy"]
    with pytest.raises(MeasurementError, match="different items"):
        retained(first, whole)


def test_measuring_leaves_model_and_tokenizer_as_they_were(data: Path) -> None:
    source, tokenizer = model().train(), tiny_tokenizer(VOCABULARY)
    load_suite(["piqa"], data_dir=data).measure(source, tokenizer)
    assert source.training
    assert tokenizer.pad_token is None


def test_the_fingerprint_tells_data_and_limit_apart(data: Path, tmp_path: Path) -> None:
    suites = [load_suite(["piqa"], data_dir=data), load_suite(["piqa"], data_dir=data, limit=1)]
    other = write_task_data(tmp_path / "other")
    (other / FILES["piqa"]).write_text(json.dumps(LOCAL["piqa"][0]) + "\n")
    suites.append(load_suite(["piqa"], data_dir=other))
    assert len({suite.fingerprint for suite in suites}) == 3
    assert suites[0].fingerprint == load_suite(["piqa"], data_dir=data).fingerprint


@pytest.mark.parametrize("right", [[True, False, True], [True], [False] * 4])
def test_standard_errors_are_the_harness_s(right: list[bool]) -> None:
    accuracy = Accuracy.of(right)
    if len(right) == 1:
        assert accuracy.standard_error is None
    else:
        assert accuracy.standard_error == pytest.approx(mean_stderr([float(item) for item in right]))
    assert accuracy.hits == "".join(str(int(item)) for item in right)


def score_of(hits: str, chance: float = 0.25, fingerprint: str = "same") -> TaskScore:
    return TaskScore({"acc": Accuracy.of([hit == "1" for hit in hits])}, "acc", chance, len(hits), fingerprint, {})


def test_retained() -> None:
    source, folded = score_of("1" * 75 + "0" * 25), score_of("1" * 50 + "0" * 50)
    kept = retained(folded, source)
    assert kept.raw == pytest.approx(2 / 3)
    assert kept.above_chance == pytest.approx(0.5)
    assert kept.difference == pytest.approx(-0.25)
    differences = torch.tensor([0.0] * 50 + [-1.0] * 25 + [0.0] * 25, dtype=torch.float64)
    assert kept.standard_error == pytest.approx(float(differences.std()) / 10)
    # Paired: the same items were missed by both, so the error is smaller than that of independent accuracies.
    assert kept.standard_error < math.hypot(source.accuracy.standard_error, folded.accuracy.standard_error)  # type: ignore[arg-type, operator]


def test_above_chance_means_nothing_near_chance() -> None:
    assert retained(score_of("1" * 27 + "0" * 73), score_of("1" * 28 + "0" * 72)).above_chance is None
    assert retained(score_of("0000"), score_of("0000")).raw is None


def test_a_few_right_answers_may_be_luck() -> None:
    """Where all are right their own standard error is 0, and two coins fall right in one of four cases."""
    lucky = score_of("11", chance=0.5)
    assert retained(lucky, lucky).above_chance is None
    assert retained_on_average({"t": lucky}, {"t": lucky}).above_chance is None
    assert retained(score_of("1", chance=0.05), score_of("1", chance=0.05)).above_chance is None
    sure = score_of("1" * 20, chance=0.5)
    assert retained(sure, sure).above_chance == 1.0


def test_the_average_counts_tasks_not_items() -> None:
    source = {"a": score_of("1" * 100), "b": score_of("10" * 5, 0.5)}
    folded = {"a": score_of("10" * 50), "b": score_of("10" * 5, 0.5)}
    kept = retained_on_average(folded, source)
    assert kept.raw == pytest.approx(0.5 / 0.75)
    assert kept.above_chance == pytest.approx((0.5 - 0.375) / (0.75 - 0.375))


@pytest.mark.parametrize(
    ("names", "limit", "message"),
    [
        (["arc_esy"], None, r"unknown task 'arc_esy'\. Did you mean 'arc_easy'\?"),
        (["piqa", "piqa"], None, "named twice"),
        ([], None, "no task was named"),
        (["piqa"], 0, "limit is 0"),
    ],
)
def test_wrong_requests_are_refused(names: list[str], limit: int | None, message: str, data: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_suite(names, data_dir=data, limit=limit)


@pytest.mark.parametrize("before", [0, 1], ids=["first", "later"])
@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("boolq", {"label": 2}, "label must be 0 or 1, not 2"),
        ("piqa", {"sol1": ""}, "sol1 must be text that is not empty, not ''"),
        ("piqa", {"label": 2}, "the answer is choice 2, but there are 2 (from 0)"),
        ("hellaswag", {"endings": ["", "b"]}, "endings must be a list of at least two texts that are not empty"),
        ("arc_easy", {"label": 4}, "the answer is choice 4, but there are 4 (from 0)"),
        ("winogrande", {"option2": " "}, "option2 must be text that is not empty, not ' '"),
    ],
    ids=str,
)
def test_what_the_harness_would_stumble_over_or_score_all_the_same_is_refused(
    task: str, change: dict[str, Any], message: str, before: int, tmp_path: Path
) -> None:
    """It looks into the first row while it loads a task, and into no other."""
    data = write_task_data(tmp_path)
    rows = [*LOCAL[task][:before], {**LOCAL[task][0], **change}]
    (data / FILES[task]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(SourceError, match=re.escape(f"{FILES[task]} line {before + 1}: {message}")):
        load_suite([task], data_dir=data)


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("piqa", "{", "piqa_valid.jsonl line 3: not valid JSON"),
        ("piqa", "[1]", "line 3: a JSON object is needed, not list"),
        (
            "piqa",
            '{"goals": "a", "sol1": "b", "sol2": "c", "label": 0}',
            "field 'goal' is missing. Did you mean 'goals'",
        ),
        (
            "piqa",
            '{"goal": "a", "sol1": 1, "sol2": "c", "label": 0}',
            "line 3: sol1 must be text that is not empty, not 1",
        ),
        (
            "piqa",
            r'{"goal": "a", "sol1": "b\ud83d", "sol2": "c", "label": 0}',
            "line 3: holds '\\ud83d', half of a character",
        ),
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c", "label": true}', "label must be an index, from 0, not True"),
        (
            "piqa",
            '{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}',
            "line 3: the answer is choice 2, but there are 2",
        ),
        (
            "openbookqa",
            '{"question_stem": "a", "choices": ["b"], "label": 0}',
            "choices must be a list of at least two",
        ),
        ("winogrande", '{"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}', "text with a gap"),
        ("winogrande", '{"sentence": "_", "option1": "b", "option2": "c", "answer": "3"}', 'must be "1" or "2"'),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(task: str, line: str, message: str, tmp_path: Path) -> None:
    data = write_task_data(tmp_path)
    rows = [json.dumps(row) for row in LOCAL[task][:1]]
    # An empty line is passed over, but counted.
    (data / FILES[task]).write_text("\n".join([*rows, "", line]) + "\n", encoding="utf-8")
    with pytest.raises(SourceError) as raised:
        load_suite([task], data_dir=data)
    assert message in str(raised.value)


def test_missing_and_ambiguous_files(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_suite(["piqa"], data_dir=tmp_path / "none")
    (tmp_path / "piqa_val.jsonl").write_text("")
    with pytest.raises(
        SourceError, match=r"no file piqa_valid\*.jsonl for the task piqa .* Did you mean 'piqa_val.jsonl'"
    ):
        load_suite(["piqa"], data_dir=tmp_path)
    for name in ("boolq_val.jsonl", "boolq_val_half.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UsageError, match="several files for the task boolq"):
        load_suite(["boolq"], data_dir=tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILES["piqa"]).write_text("\n")
    with pytest.raises(SourceError, match="holds no rows"):
        load_suite(["piqa"], data_dir=tmp_path)


def test_without_the_harness_it_says_what_to_install(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FoldGPTError, match=r"pip install 'foldgpt\[tasks\]'"):
        load_suite(["piqa"], data_dir=data)


def test_without_a_hub_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        SourceError, match=r"piqa from the hub: no route to the hub\. Rows from local files: --data-dir"
    ):
        load_suite(["piqa"])


@pytest.mark.parametrize("task", list(TASKS))
def test_by_name_the_task_is_the_harness_s_own(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def hub(path: str, name: str | None = None, **_: Any) -> Any:
        asked.append((path, name))
        table = datasets.Dataset.from_list(HUB[task])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), table))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    suite = load_suite([task])
    score = suite.measure(model(), tiny_tokenizer(VOCABULARY))[task]
    assert requests_of(suite.tasks[task].task) == requests_of(the_harness_s_own(task))
    assert score.protocol["data"] == " ".join(part for part in asked[0] if part)


def text_windows(tokenizer: Any) -> Windows:
    text = "The sun is a star and the moon goes round the earth once in every month of the year. " * 3
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    table = torch.tensor([ids[start : start + 60] for start in (0, 60, 120, 180)])
    protocol = {"texts": ["x"], "context": 60, "stride": 60, "bos": False, "vocabulary_size": VOCABULARY}
    return Windows(table, torch.ones(4, dtype=torch.int64), protocol)


def test_what_an_offloaded_model_predicts_is_measured_wherever_its_embedding_is(data: Path) -> None:
    tokenizer, suite = tiny_tokenizer(VOCABULARY), load_suite(["arc_easy"], data_dir=data)
    found = []
    for offloaded in (False, True):
        source = model()
        if offloaded:
            cpu_offload(source, torch.device("cpu"))
            assert source.get_input_embeddings().weight.is_meta
        measured = evaluate(
            Subject("m", source, None, tokenizer),
            windows=text_windows(tokenizer),
            tasks=suite,
            speed=False,
            memory=False,
            num_generations=1,
        ).folded
        found.append(measured.figures() | {"written": measured.generations})
    assert found[0] == found[1] and found[0]["perplexity"] is not None and found[0]["kv_bytes_per_token"]


def test_an_evaluation_with_tasks_survives_json_and_an_old_one_is_read(data: Path) -> None:
    tokenizer = tiny_tokenizer(VOCABULARY)
    whole = evaluate(
        Subject("folded", tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=2), None, tokenizer),
        Subject("source", tiny_model("llama", vocab_size=VOCABULARY), None, tokenizer),
        windows=text_windows(tokenizer),
        speed=False,
        memory=False,
        tasks=load_suite(["piqa", "arc_easy"], data_dir=data),
        num_generations=2,
    )
    assert Evaluation.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    assert whole.retained is not None and list(whole.retained) == ["piqa", "arc_easy", "average"]
    assert whole.folded.last_word is not None
    assert whole.folded.generations is not None and len(whole.folded.generations) == 2
    figures = whole.folded.figures()
    assert figures["task_average"] == pytest.approx((figures["task.piqa"] + figures["task.arc_easy"]) / 2)  # type: ignore[operator]
    assert whole.ratios is not None and set(whole.ratios) == set(figures)

    old = whole.to_dict()
    del old["retained"]
    for name in ("folded", "baseline"):
        for field in ("tasks", "last_word", "generations"):
            del old[name][field]
    assert Evaluation.from_dict(old).folded.tasks is None


def test_tasks_need_a_tokenizer(data: Path) -> None:
    windows, tasks = text_windows(tiny_tokenizer(VOCABULARY)), load_suite(["piqa"], data_dir=data)
    with pytest.raises(UsageError, match="need its tokenizer"):
        evaluate(Subject("folded", model()), windows=windows, speed=False, memory=False, tasks=tasks)


def test_tasks_are_not_measured_without_a_text(data: Path) -> None:
    """Multiple choice hides collapse, so it never stands alone: not on the command line, and not in Python."""
    subject = Subject("folded", model(), None, tiny_tokenizer(VOCABULARY))
    tasks = load_suite(["piqa"], data_dir=data)
    with pytest.raises(UsageError, match=r"tasks need a text as well \(windows\)"):
        evaluate(subject, speed=False, memory=False, tasks=tasks)


def test_the_table_of_tasks_in_the_docs_is_the_one_in_the_code() -> None:
    page = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text("utf-8")
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in page.splitlines() if "*.jsonl" in line
    ]
    assert rows == [[task.task, task.files, task.headline] for task in TASKS.values()]

"""One evaluation holds both models, their ratios, and survives JSON."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import LlamaConfig, LlamaForCausalLM

from foldgpt.artifacts import write_json
from foldgpt.corpus import Windows
from foldgpt.errors import ArtifactError, UsageError
from foldgpt.evaluation import Evaluation, Subject, evaluate
from foldgpt.progress import console

PROTOCOL = {"context": 8, "stride": 8, "bos": True, "vocabulary_size": 61}


def subject(name: str, num_blocks: int, folder: Path | None = None) -> Subject:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=num_blocks, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    if folder is not None:
        model.save_pretrained(folder)
    return Subject(name, model, folder)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("models")
    windows = Windows(torch.arange(24).view(3, 8), torch.ones(3, dtype=torch.int64), PROTOCOL)
    return evaluate(subject("folded", 2, folder / "folded"), subject("source", 4, folder / "source"), windows=windows)


def test_everything_is_measured_of_both(evaluation: Evaluation) -> None:
    for measured, num_blocks in ((evaluation.baseline, 4), (evaluation.folded, 2)):
        assert measured is not None
        assert measured.size.num_blocks == num_blocks
        assert all(value is not None and value > 0 for value in measured.figures().values())
        assert measured.perplexity is not None
        assert measured.perplexity.protocol == PROTOCOL


def test_ratios_are_folded_over_source(evaluation: Evaluation) -> None:
    assert evaluation.baseline is not None
    assert evaluation.ratios is not None
    own, other = evaluation.folded.figures(), evaluation.baseline.figures()
    assert list(evaluation.ratios) == list(own)
    for name in ("num_blocks", "block_parameters", "kv_bytes_per_token"):
        assert evaluation.ratios[name] == 0.5
    assert evaluation.ratios["perplexity"] == own["perplexity"] / other["perplexity"]  # type: ignore[operator]
    assert evaluation.folded.speed is not None
    assert evaluation.ratios["decode_tokens_per_s"] == evaluation.folded.speed.decode.ratio


def test_what_is_known_of_the_baseline_is_not_measured_again(evaluation: Evaluation) -> None:
    windows = Windows(torch.arange(24).view(3, 8), torch.ones(3, dtype=torch.int64), PROTOCOL)
    assert evaluation.baseline is not None
    known = replace(evaluation.baseline, speed=None, bytes_on_disk=123_456)
    quick = evaluate(subject("folded", 2), windows=windows, speed=False, memory=False, known=known)
    assert quick.baseline == known
    assert quick.ratios is not None and evaluation.ratios is not None
    assert quick.ratios["perplexity"] == evaluation.ratios["perplexity"]
    timed = evaluate(subject("folded", 2), subject("source", 4), memory=False, known=known)
    assert timed.baseline is not None and timed.baseline.bytes_on_disk == 123_456
    assert timed.baseline.speed is not None and timed.baseline.perplexity == known.perplexity
    with pytest.raises(UsageError, match="take turns"):
        evaluate(subject("folded", 2), known=known)


def test_each_text_has_a_perplexity_of_its_own() -> None:
    first, second = (
        Windows(torch.arange(start, start + 24).view(3, 8), torch.ones(3, dtype=torch.int64), PROTOCOL)
        for start in (0, 30)
    )
    alone = evaluate(subject("m", 2), windows=second, speed=False, memory=False).folded.perplexity
    both = evaluate(
        subject("m", 2), windows=first, further_windows={"second.txt": second}, speed=False, memory=False
    ).folded
    assert both.further_perplexities == {"second.txt": alone}
    assert alone is not None and both.figures()["perplexity.second.txt"] == alone.value != both.figures()["perplexity"]


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        # The whole name of the one is the short name of the other.
        ("eval/test.txt", "test.txt", ["eval/test.txt", "test.txt"]),
        ("test.txt", "eval/test.txt", ["test.txt", "eval/test.txt"]),
        ("eval/test.txt", "other.txt", ["test.txt", "other.txt"]),
    ],
)
def test_texts_of_one_name_are_all_told_apart(first: str, second: str, names: list[str]) -> None:
    windows = {
        text: Windows(
            torch.arange(24).view(3, 8),
            torch.ones(3, dtype=torch.int64),
            {**PROTOCOL, "texts": [Path(text).name]},
        )
        for text in (first, second)
    }
    measured = evaluate(
        subject("m", 2),
        windows=windows[first],
        text=first,
        further_windows={second: windows[second]},
        speed=False,
        memory=False,
    ).folded
    assert [name for name, _ in measured.perplexities().values()] == names
    assert list(measured.perplexities()) == ["perplexity", f"perplexity.{second}"]


def test_an_offloaded_model_is_not_loaded_whole_for_its_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "nothing must be started")
    large = subject("large", 2, tmp_path / "large")
    cpu_offload(large.model.model.layers[1], torch.device("cpu"))
    with console.capture() as notes:
        assert evaluate(large, speed=False).folded.peak_memory is None
    assert "without peak memory of large: it is offloaded" in notes.get()


def test_a_peak_that_cannot_be_measured_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho 'RuntimeError: CUDA error: busy' >&2; exit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with console.capture() as notes:
        assert evaluate(subject("m", 2, tmp_path / "m"), speed=False).folded.peak_memory is None
    assert "without peak memory of m" in notes.get() and "CUDA error: busy" in " ".join(notes.get().split())


def test_a_full_memory_costs_the_peak_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    windows = Windows(torch.arange(24).view(3, 8), torch.ones(3, dtype=torch.int64), PROTOCOL)
    with console.capture() as notes:
        measured = evaluate(subject("m", 2, tmp_path / "m"), windows=windows, speed=False).folded
    assert measured.peak_memory is None and measured.perplexity is not None
    assert "without peak memory of m: measuring" in notes.get() and "the process was killed" in notes.get()


def test_survives_json(evaluation: Evaluation, tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    write_json(file, evaluation.to_dict())
    assert json.loads(file.read_text())["format"] == "foldgpt.evaluation"
    assert Evaluation.load(file) == evaluation


def test_without_baseline_text_speed_memory_or_folder() -> None:
    alone = evaluate(subject("folded", 2), speed=False, memory=False)
    assert alone.baseline is None
    assert alone.ratios is None
    missing = {name for name, value in alone.folded.figures().items() if value is None}
    assert missing == {
        "bytes_on_disk",
        "perplexity",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "peak_memory_bytes",
    }
    assert Evaluation.from_dict(alone.to_dict()) == alone


def test_a_missing_figure_has_no_ratio() -> None:
    both = evaluate(subject("folded", 2), subject("source", 4), speed=False, memory=False)
    assert both.ratios is not None
    assert both.ratios["perplexity"] is None
    assert both.ratios["unique_parameters"] is not None


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="both models are called 'x'"):
        evaluate(subject("x", 2), subject("x", 4))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "foldgpt.plan", "not an evaluation"),
        (("version",), 2, "version 2; this foldgpt reads 1"),
        (("folded", "size", "num_blocks"), "many", r"folded\.size\.num_blocks"),
    ],
)
def test_a_bad_file_is_refused(path: tuple[str, ...], value: Any, message: str, evaluation: Evaluation) -> None:
    content = copy.deepcopy(evaluation.to_dict())
    target = content
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ArtifactError, match=message):
        Evaluation.from_dict(content)

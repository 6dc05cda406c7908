"""The benchmarks of tasks count what they say, on a tiny model and a few rows."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from foldgpt.evaluation import TASKS
from foldgpt.sources import Source, load_source
from run_inputs import tiny_source
from task_data import LOCAL, write_task_data

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_data(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return load_source(str(tiny_source(tmp_path_factory.mktemp("model") / "model")), dtype="float32")


def test_speed_counts_tokens_padding_and_shared_prefixes(source: Source, data: Path) -> None:
    speed = benchmark("task_speed")
    rows = {row["task"]: row for row in speed.measure(source, list(TASKS), data_dir=str(data), limit=2, repeats=2)}
    assert set(rows) == set(TASKS)
    boolq = rows["boolq"]
    # One token for each character; of " no" and " yes" all but the last are run, in two inputs with one beginning.
    lengths = [len(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:") for row in LOCAL["boolq"][:2]]
    assert boolq["items"] == 2 and boolq["inputs"] == 4
    assert boolq["tokens"] == sum(2 * length + len(" n") + len(" ye") for length in lengths)
    shared = sum(length + 1 for length in lengths)
    beginning = len("I")  # "Ice is …" and "Iron is …"
    assert boolq["repeated_ratio"] == pytest.approx((shared + beginning) / boolq["tokens"], abs=1e-4)
    assert 0 <= boolq["padding_ratio"] < 0.5
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) >= 0 for row in rows.values())
    # Counting ends with the measurement.
    assert speed.LoadedModel._batches.__qualname__ == "LoadedModel._batches"


def test_agreement_sees_agreement_and_its_absence(source: Source, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agreement = benchmark("task_agreement")
    rows = agreement.measure(source, ["piqa", "arc_easy", "boolq"], data_dir=str(data), limit=None)
    assert [(row["task"], row["num_different"]) for row in rows] == [("piqa", 0), ("arc_easy", 0), ("boolq", 0)]
    assert all(row["harness"] == row["plain"] for row in rows)
    assert [row["items"] for row in rows] == [len(LOCAL[task]) for task in ("piqa", "arc_easy", "boolq")]
    monkeypatch.setattr(agreement, "hits", lambda model, tokenizer, items: ("0" * len(items), "0" * len(items)))
    wrong = agreement.measure(source, ["arc_easy", "boolq"], data_dir=str(data), limit=None)
    assert [row["num_different"] for row in wrong] == [round(row["harness"] * row["items"]) for row in wrong]


@pytest.mark.parametrize("name", ["task_speed", "task_agreement"])
def test_as_a_command(name: str, data: Path, tmp_path: Path) -> None:
    model = tiny_source(tmp_path / "tiny")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--model", str(model), "--dtype", "float32"]
    command += ["--task", "piqa", "--data-dir", str(data), "--limit", "1", "--out", str(tmp_path / "results")]
    subprocess.run(command, check=True, capture_output=True, cwd=BENCHMARKS)
    written = json.loads((tmp_path / "results" / f"{name}_tiny.json").read_text("utf-8"))
    assert written["rows"][0]["task"] == "piqa" and written["rows"][0]["items"] == 1
    assert "| piqa" in (tmp_path / "results" / f"{name}_tiny.md").read_text("utf-8")

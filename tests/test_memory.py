"""Peak memory is the child's own, grows with the model, and failures are told in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foldgpt.errors import ArtifactError
from foldgpt.evaluation import MeasurementError, NotEnoughMemoryError, peak_memory

MB = 2**20


def save_llama(folder: Path, intermediate_size: int, **fields: int) -> int:
    """Save a random fp32 model; the bytes of its parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=256,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        **fields,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_llama(folder, 64)
    return folder


def test_peak_holds_the_weights(tmp_path: Path, small: Path) -> None:
    weight_bytes = save_llama(tmp_path, 64 * 1024)  # 400 MB
    large, little = peak_memory(tmp_path), peak_memory(small)
    growth = (large.peak_rss - large.baseline_rss) - (little.peak_rss - little.baseline_rss)
    assert weight_bytes * 0.95 < growth < weight_bytes * 2.5
    assert (large.device, large.dtype, large.peak_accelerator) == ("cpu", "float32", None)


def test_a_large_parent_does_not_inflate_the_figure(small: Path) -> None:
    ballast = np.ones(1024 * MB, dtype=np.uint8)
    measured = peak_memory(small)
    assert ballast.nbytes == 1024 * MB
    assert 50 * MB < measured.baseline_rss <= measured.peak_rss < 900 * MB


def test_dtype_and_short_positions(tmp_path: Path) -> None:
    save_llama(tmp_path, 64, max_position_embeddings=8)
    assert peak_memory(tmp_path, dtype="bfloat16").dtype == "bfloat16"


def test_failure_names_folder_and_reason(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=rf"{tmp_path.name} failed: .*config\.json|model_type") as error:
        peak_memory(tmp_path)
    assert "\n" not in str(error.value) and not isinstance(error.value, NotEnoughMemoryError)


@pytest.mark.parametrize(
    "script",
    [
        "kill -9 $$",
        "echo 'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.' >&2; exit 1",
        'echo "RuntimeError: DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 8 bytes." >&2; exit 1',
        "echo MemoryError >&2; exit 1",
        # What CUDA says of memory that others have taken ends with advice.
        "printf 'Traceback\\ntorch.AcceleratorError: CUDA error: out of memory\\nUse `X`\\n' >&2; exit 1",
    ],
)
def test_a_process_without_enough_memory_is_told_apart(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(NotEnoughMemoryError, match=f"peak memory of {tmp_path}.*(killed|failed: .)"):
        peak_memory(tmp_path)


def test_the_error_is_told_and_not_the_advice_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\nprintf 'warning: out of memory soon\\nTraceback\\ntorch.AcceleratorError: CUDA error: busy\\n"
        "Compile with `X`\\n' >&2; exit 1\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(MeasurementError, match=r"failed: torch\.AcceleratorError: CUDA error: busy$") as caught:
        peak_memory(tmp_path)
    assert not isinstance(caught.value, NotEnoughMemoryError)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model folder not found: .*nowhere"):
        peak_memory(tmp_path / "nowhere")

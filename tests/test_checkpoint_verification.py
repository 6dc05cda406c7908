"""A checkpoint that is not the model it was saved from does not pass."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.llama import modeling_llama

from checkpoint_case import edit_config, edit_weights, folded
from foldgpt.artifacts import read_json
from foldgpt.errors import VerificationError
from foldgpt.folding import (
    save_folded,
    unfold_,
    verify_checkpoint,
)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A folded model and the folder of its checkpoint."""
    model, plan = folded()
    save_folded(model, plan, tmp_path / "folded")
    return model, tmp_path / "folded"


def test_an_untouched_checkpoint_passes(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    assert verify_checkpoint(folder, model).logits_identical


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # A stale num_hidden_layers (field note R2), both ways.
        (lambda folder: edit_config(folder, num_hidden_layers=6), r"missing keys on loading: model\.layers\.5\."),
        (lambda folder: edit_config(folder, num_hidden_layers=4), r"unexpected keys on loading: model\.layers\.4\."),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight")),
            r"missing keys on loading: model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors.update(stray=torch.ones(3))),
            "unexpected keys on loading: stray",
        ),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)})),
            "cannot be loaded",
        ),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"].zero_()),
            "computes something else than the one in memory",
        ),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan)),
            r"computes something else than the one in memory \(relative error inf",
        ),
        (
            lambda folder: edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
            "computes something else than the one in memory",
        ),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 5000),
            "the saved model cannot be loaded: ",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "the saved model cannot be loaded: "),
        (lambda folder: (folder / "model.safetensors").unlink(), "the saved model cannot be loaded: "),
        # Weights stored twice, as a file of an older save would be.
        (
            lambda folder: save_file({"x": torch.ones(1000)}, folder / "old.safetensors"),
            r"stores 191,776 bytes for 187,776 bytes of unique parameters",
        ),
    ],
    ids=[
        "too many blocks in the config",
        "too few blocks in the config",
        "a key is missing",
        "a key too many",
        "another shape",
        "another value",
        "not a number",
        "another config field",
        "truncated weights",
        "corrupt config",
        "no weights",
        "weights stored twice",
    ],
)
def test_a_damaged_checkpoint_does_not_pass(
    saved: tuple[Any, Path], change: Callable[[Path], object], message: str
) -> None:
    model, folder = saved
    change(folder)
    with pytest.raises(VerificationError, match=message):
        verify_checkpoint(folder, model)
    assert not model.training


def test_layer_types_of_other_blocks_do_not_pass(tmp_path: Path) -> None:
    """Field note R3, seen from the checkpoint: no key is wrong, only what the blocks compute."""
    model, plan = folded("gemma3", removed=(0,))
    save_folded(model, plan, tmp_path / "folded")
    types = read_json(tmp_path / "folded" / "config.json")["layer_types"]
    assert len(set(types)) == 2
    edit_config(tmp_path / "folded", layer_types=types[::-1])
    with pytest.raises(VerificationError, match="computes something else"):
        verify_checkpoint(tmp_path / "folded", model)


def test_a_checkpoint_of_another_class_does_not_pass(tmp_path: Path) -> None:
    model, _ = folded(shared=True)
    ordinary = copy.deepcopy(model)
    unfold_(ordinary)
    ordinary.save_pretrained(tmp_path / "ordinary")
    with pytest.raises(VerificationError, match="saved a FoldedLlamaForCausalLM, but it loads as LlamaForCausalLM"):
        verify_checkpoint(tmp_path / "ordinary", model)


def test_blocks_that_share_a_cache_slot_do_not_pass(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Field note R1, as a class with a fault of its own would have it: without a cache all is well."""
    model, folder = saved
    build = modeling_llama.LlamaAttention.__init__

    def build_with_stale_index(self: Any, config: Any, layer_idx: int) -> None:
        build(self, config, min(layer_idx, 3))

    monkeypatch.setattr(modeling_llama.LlamaAttention, "__init__", build_with_stale_index)
    with pytest.raises(VerificationError, match="decoding with a KV cache differs from decoding without"):
        verify_checkpoint(folder, model)


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (lambda model, arguments: True, "the model in memory cannot be run: no such length"),
        (
            lambda model, arguments: model.config.name_or_path != "in memory",
            "the saved model cannot be run: no such length",
        ),
        (
            lambda model, arguments: arguments.get("use_cache"),
            "the saved model, decoding with a KV cache, cannot be run: no such length",
        ),
    ],
    ids=["in memory", "saved", "with a cache"],
)
def test_a_model_that_cannot_be_run_does_not_pass(
    saved: tuple[Any, Path], fails: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    model.config.name_or_path = "in memory"
    run = modeling_llama.LlamaForCausalLM.forward

    @functools.wraps(run)
    def run_or_fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        if fails(self, kwargs):
            raise ValueError("no such length\nand more")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", run_or_fail)
    model.train()
    with pytest.raises(VerificationError, match=f"^{message}$"):
        verify_checkpoint(folder, model)
    assert model.training


def test_a_half_precision_checkpoint_is_held_to_its_own_precision(tmp_path: Path) -> None:
    model, plan = folded(shared=True)
    model.to(torch.bfloat16)
    verification = save_folded(model, plan, tmp_path / "folded")
    assert verification.weight_bytes == 2 * verification.num_parameters
    # Far less than 16 bits would take for rounding, but not rounding: in fp32 it shows.
    edit_weights(tmp_path / "folded", lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].mul_(1.02))
    with pytest.raises(VerificationError, match="computes something else"):
        verify_checkpoint(tmp_path / "folded", model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_that_a_change_of_format_rounded_are_no_other_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """S8: `.to(bfloat16)` rounds the rotary frequencies in memory; those of the reloaded model are made anew."""
    model, plan = folded(shared=False, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    exact = model.model.rotary_emb.inv_freq.clone()
    model.to(dtype)
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), exact)
    verification = save_folded(model, plan, tmp_path / "folded")
    assert not verification.logits_identical and verification.reload_error < 1e-4


def test_buffers_of_another_config_are_another_model_in_16_bits_too(tmp_path: Path) -> None:
    model, plan = folded(shared=False)
    model.to(torch.bfloat16)
    save_folded(model, plan, tmp_path / "folded")
    edit_config(tmp_path / "folded", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(VerificationError, match="computes something else"):
        verify_checkpoint(tmp_path / "folded", model)

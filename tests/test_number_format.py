"""What is computed in one number format is saved in another, as loading it in that would have it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli_case import foldgpt
from foldgpt import pipeline
from foldgpt.artifacts import read_json, write_json
from foldgpt.errors import FoldGPTError
from foldgpt.evaluation import Evaluation
from foldgpt.folding import cast_, fold_, round_, source_model_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.recipe import Recipe
from foldgpt.recovery import RecoverySettings, TrainingWindows, recover
from foldgpt.recovery_result import RecoveryResult
from foldgpt.sources import stored_dtype
from foldgpt.workbench import Workbench
from models import tiny_model
from recovery_case import tiny_windows
from run_inputs import tiny_recipe, tiny_text
from tiny import tiny_tokenizer


def source(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    tiny_model("llama").to(dtype).save_pretrained(folder)
    tiny_tokenizer(128).save_pretrained(folder)
    return folder


def formats(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for file in folder.glob("*.safetensors") for tensor in load_file(file).values()}


def test_weights_become_what_loading_them_in_the_format_makes_of_them(tmp_path: Path) -> None:
    model = tiny_model("llama-tied")
    model.save_pretrained(tmp_path / "wide")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    cast_(model, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    # In 16 bits the frequencies of late positions are wrong, which no checkpoint shows.
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    probe = torch.arange(20).unsqueeze(0)
    assert torch.equal(model(probe).logits, loaded(probe).logits)


def test_rounded_weights_compute_what_the_saved_ones_do() -> None:
    wide, narrow = tiny_model("llama"), tiny_model("llama")
    round_(wide, torch.bfloat16)
    cast_(narrow, torch.bfloat16)
    assert wide.dtype == torch.float32
    for ours, theirs in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())


def test_what_positions_share_stays_shared() -> None:
    model = tiny_model("llama")
    group = Group(blocks=(1, 2), private=("norms", "scales"), ranks=2)
    fold_(model, FoldPlan.create(source_model_of(model), removed=[4], groups=[group]))
    count = sum(parameter.numel() for parameter in model.parameters())
    cast_(model, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_transformers_keeps_in_fp32_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, dtype, wide in (
        ("_keep_in_fp32_modules_strict", torch.bfloat16, True),
        ("_keep_in_fp32_modules", torch.float16, True),
        ("_keep_in_fp32_modules", torch.bfloat16, False),
    ):
        model = tiny_model("llama")
        monkeypatch.setattr(model, name, {"input_layernorm"})
        cast_(model, dtype)
        block = model.model.layers[0]
        assert block.input_layernorm.weight.dtype == (torch.float32 if wide else dtype)
        assert block.post_attention_layernorm.weight.dtype == dtype


def test_a_weight_too_large_for_the_format_is_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = 1e5
    for change in (cast_, round_):
        with pytest.raises(FoldGPTError, match=r"layers\.2\.mlp\.up_proj\.weight holds values that float16 does not"):
            change(model, torch.float16)
    cast_(model, torch.bfloat16)


@pytest.mark.parametrize(
    ("computed", "asked", "stored", "saved"),
    [
        ("auto", "auto", torch.bfloat16, None),
        ("float32", "auto", torch.bfloat16, torch.bfloat16),
        ("float32", "auto", torch.float16, torch.float16),
        ("float32", "float32", torch.bfloat16, torch.float32),
        # Digits that were rounded away would be saved as zeros.
        ("bfloat16", "auto", torch.float32, None),
        ("bfloat16", "auto", torch.float16, None),
        ("auto", "float32", torch.bfloat16, torch.float32),
    ],
)
def test_which_format_is_saved(tmp_path: Path, computed: str, asked: str, stored: Any, saved: Any) -> None:
    place = source(tmp_path / "model", stored)
    assert stored_dtype(place) == stored
    recipe = Recipe.from_dict({"model": str(place), "dtype": computed, "save_dtype": asked})
    assert Workbench(recipe).save_dtype(place) == saved


def test_the_format_of_a_gguf_file_is_that_in_which_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    assert stored_dtype(tmp_path / "m.gguf") == torch.bfloat16


def test_a_run_in_fp32_leaves_a_model_in_the_format_of_its_source(tmp_path: Path) -> None:
    place, text = source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    recover = {"num_tokens": 512, "context": 32, "held_out_tokens": 128}
    recipe = Recipe.from_dict({**tiny_recipe(place, text, recover=recover), "dtype": "float32"})
    result = pipeline.run(recipe, tmp_path / "run")
    for name in ("folded", "recovered"):
        folder = tmp_path / "run" / name
        assert formats(folder) == {torch.bfloat16}
        assert read_json(folder / "config.json")["dtype"] == "bfloat16"
        assert read_json(folder / "verification.json")["logits_identical"]
    ratios = Evaluation.load(tmp_path / "run" / "evaluation.json").ratios
    assert ratios is not None and (ratios["bytes_on_disk"] or 1) < 1
    # The record is of the model that was saved, computed in fp32.
    recorded = RecoveryResult.load(tmp_path / "run" / "recovered")
    again = pipeline.run(recipe.changed(save_dtype="float32"), tmp_path / "wide")
    assert formats(again.model) == {torch.float32}
    assert RecoveryResult.load(tmp_path / "wide" / "recovered").after != recorded.after
    assert result.evaluation.folded.perplexity is not None
    assert result.evaluation.folded.perplexity.dtype == "float32"


def test_on_the_command_line(tmp_path: Path) -> None:
    place = source(tmp_path / "model")
    FoldPlan.create(source_model_of(tiny_model("llama")), removed=[2]).save(tmp_path / "plan.json")
    fold = ("fold", place, "--plan", tmp_path / "plan.json", "--dtype", "fp32", "-q")
    assert foldgpt(*fold, "--out", tmp_path / "a").exit_code == 0
    assert foldgpt(*fold, "--save-dtype", "float32", "--out", tmp_path / "b").exit_code == 0
    assert (formats(tmp_path / "a"), formats(tmp_path / "b")) == ({torch.bfloat16}, {torch.float32})
    refused = foldgpt(*fold, "--save-dtype", "bfloat", "--out", tmp_path / "c")
    assert refused.exit_code == 2 and "error: --save-dtype: " in refused.stderr and "'bfloat16'?" in refused.stderr


def test_what_is_saved_in_fewer_bits_is_trained_and_measured_in_the_format_of_the_source(tmp_path: Path) -> None:
    """Loaded as it is stored, a model in float16 could not be trained, and one in bf16 would be slow on many CPUs."""
    place, text = source(tmp_path / "model", torch.float32), tiny_text(tmp_path / "text.txt")
    recover = {"num_tokens": 512, "context": 32, "held_out_tokens": 128}
    recipe = Recipe.from_dict({**tiny_recipe(place, text, recover=recover), "save_dtype": "float16"})
    result = pipeline.run(recipe, tmp_path / "run")
    assert formats(result.model) == {torch.float16}
    for measured in (result.evaluation.folded, result.evaluation.baseline):
        assert measured is not None and measured.perplexity is not None
        assert measured.perplexity.dtype == "float32"
    assert result.evaluation.folded.stored_in == "float16"


def test_what_is_recorded_of_a_recovery_is_of_the_model_that_is_saved(tmp_path: Path) -> None:
    """Also of the blocks that teacher and student have in common, which the student's rounding changes."""
    teacher = tiny_model("stablelm")
    plan = FoldPlan.create(source_model_of(teacher), removed=[4])
    student = copy.deepcopy(teacher)
    fold_(student, plan)
    held_out = TrainingWindows(tiny_windows(8, seed=2))
    settings = RecoverySettings(batch_size=4, rank=2, train_blocks="behind", evaluate_every=1)
    train = TrainingWindows(tiny_windows(8, seed=1))
    place = tmp_path / "out"
    result = recover(student, teacher, plan, train, held_out, settings, place, save_dtype=torch.bfloat16)
    saved = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    with torch.no_grad():
        theirs, ours = (
            model(held_out.ids_WT.long()).logits[:, :-1].double().log_softmax(-1) for model in (teacher, saved)
        )
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert result.after["kl"] == pytest.approx(float(kl), rel=1e-4)


def test_a_config_without_a_format_leaves_it_to_the_weights(tmp_path: Path) -> None:
    place = source(tmp_path / "model")
    config = read_json(place / "config.json")
    del config["dtype"]
    write_json(place / "config.json", config)
    assert stored_dtype(place) == torch.bfloat16

"""The tiny stand-in of a dry run: whose config it has, and that one of every family runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from foldgpt.errors import SourceError, UnsupportedModelError
from foldgpt.families import FAMILIES
from foldgpt.rehearsal.tiny import config_of, save_tiny, shrunk
from models import tiny_config


def test_the_config_of_a_hub_model_is_that_of_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    for revision, commit, num_blocks in (("main", "a" * 40, 4), ("v1", "b" * 40, 5)):
        tiny_config("llama", num_hidden_layers=num_blocks).save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    assert config_of("some/model").num_hidden_layers == 4
    assert config_of("some/model", revision="v1").num_hidden_layers == 5
    with pytest.raises(SourceError, match="config of some/model at revision 'v2'"):
        config_of("some/model", revision="v2")


def test_the_tiny_model_is_of_the_same_make() -> None:
    config = config_of("google/gemma-2b")
    small = shrunk(config)
    assert (small.model_type, small.num_hidden_layers, small.tie_word_embeddings) == ("gemma", 18, True)
    assert small.num_key_value_heads == 1 and small.intermediate_size == 8 * small.hidden_size
    assert config.hidden_size == 2048, "the real config is as it was"


@pytest.mark.parametrize(
    ("model_type", "width"), [("gpt2", "n_inner"), ("opt", "ffn_dim"), ("falcon", "ffn_hidden_size")]
)
def test_families_with_names_of_their_own_are_made_small_too(model_type: str, width: str) -> None:
    config = AutoConfig.for_model(model_type)
    small = shrunk(config)
    assert small.hidden_size == 32 and small.num_hidden_layers == config.num_hidden_layers
    if getattr(config, width):
        assert getattr(small, width) == 32 * getattr(config, width) // config.hidden_size
    model = AutoModelForCausalLM.from_config(small)
    assert model(input_ids=torch.zeros((1, 4), dtype=torch.long)).logits.shape == (1, 4, 320)


#: Values of the real configs that the defaults of transformers leave out.
_AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3},
    "dots1": {
        "n_shared_experts": 2,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "qwen3_5_text": {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
}


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"gemma3"}))
def test_a_tiny_model_of_every_family_runs(model_type: str) -> None:
    """With the defaults of its config, which are mostly those of a real model: 8 of 64 experts, rotary channels."""
    config = AutoConfig.for_model(model_type, num_hidden_layers=4, **_AS_PUBLISHED.get(model_type, {}))
    small = shrunk(config)
    model = AutoModelForCausalLM.from_config(small)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert model(input_ids=torch.arange(8)[None], use_cache=False).logits.isfinite().all()
    assert small.num_hidden_layers == config.num_hidden_layers


def test_a_model_without_attention_is_an_error_and_no_traceback() -> None:
    with pytest.raises(UnsupportedModelError, match="the config of mamba has no num_attention_heads"):
        shrunk(AutoConfig.for_model("mamba", num_hidden_layers=2))


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(SourceError, match=r"no model at .*/modle\. Did you mean '.*/model'\?"):
        config_of(f"{tmp_path}/modle")


def test_a_tiny_model_that_does_not_run_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    config = shrunk(AutoConfig.for_model("llama", num_hidden_layers=2))
    config.num_key_value_heads = 3
    with pytest.raises(UnsupportedModelError, match=r"needs a tiny llama, .* it does not run: "):
        save_tiny(config, tmp_path)
    assert not list(tmp_path.iterdir())

"""Field notes S1 to S9: what goes wrong when blocks share weights."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from foldgpt.errors import PlanError, UnsupportedModelError
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, predicted_parameters, save_folded, source_model_of, unfold_
from foldgpt.plan import FoldPlan, Group
from foldgpt.recovery.inputs import check_trainable
from models import tiny_model, token_ids
from reference import stepwise_logits
from replaced import double_weights_, replace_linears_

GROUPS = [Group(blocks=(0, 1), donor="mean"), Group(blocks=(3, 4, 5), donor="first")]


def shared(family: str = "llama", **changes: Any) -> tuple[Any, FoldPlan]:
    model = tiny_model(family, **changes)
    plan = FoldPlan.create(source_model_of(model), groups=GROUPS)
    fold_(model, plan)
    return model, plan


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    model, plan = shared()
    save_folded(model, plan, tmp_path / "folded")
    return model, tmp_path / "folded"


@torch.no_grad()
def test_s1_positions_that_share_keep_their_own_cache_slots() -> None:
    model, _ = shared()
    indices = [block.self_attn.layer_idx for block in decoder_of(model).blocks]
    assert indices == [0, 1, 2, 3, 4, 5]
    ids = token_ids(model)
    output = model(ids, use_cache=True)
    keys = [layer.keys for layer in output.past_key_values.layers]
    assert not torch.equal(keys[3], keys[4])
    torch.testing.assert_close(stepwise_logits(model, ids, 5), output.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_s1_the_trap_is_real() -> None:
    """One block module at two depths writes one cache slot. If stepping were right, the contract is blind."""
    model = tiny_model("llama")
    decoder_of(model).blocks[1] = decoder_of(model).blocks[0]
    ids = token_ids(model)
    difference = (stepwise_logits(model, ids, 5) - model(ids, use_cache=False).logits).abs().max()
    assert difference > 0.1


def test_s2_shared_weights_are_stored_once(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.layers.3.self_attn.q_proj.weight" in names
    assert not any(name.startswith("model.layers.4.self_attn.q_proj") for name in names)
    assert "model.layers.4.input_layernorm.weight" in names
    unique = sum(p.numel() * p.element_size() for p in model.parameters())
    stored = (folder / "model.safetensors").stat().st_size
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") + 8
    assert stored - header == unique


def test_s2_without_foldgpt_and_its_code_nothing_half_loads_it(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    code = f"""
        import sys
        sys.modules["foldgpt"] = None
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained({str(folder)!r})
        except ValueError as error:
            print("\\nrefused:", "custom code" in str(error))  # after the question whether to run it
    """
    assert run_python(code, folder) == "refused: True"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_s3_tied_and_untied_embeddings_round_trip(family: str, tmp_path: Path) -> None:
    model, plan = shared(family)
    save_folded(model, plan, tmp_path / "folded")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    ids = token_ids(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == (family == "llama-tied")


@torch.no_grad()
def test_s4_an_update_of_the_owner_reaches_every_position_once() -> None:
    model, _ = shared()
    delta = torch.randn_like(model.model.layers[3].self_attn.q_proj.weight) * 0.1
    expected = copy.deepcopy(model)
    unfold_(expected)
    for index in (3, 4, 5):
        expected.model.layers[index].self_attn.q_proj.weight += delta
    named = [m for name, m in model.named_modules() if name.endswith("self_attn.q_proj")]
    assert len(named) == 3, "an adapter that walks the model meets the weights of each group once"
    model.model.layers[3].self_attn.q_proj.weight += delta
    ids = token_ids(model)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_s5_unique_parameters_are_counted_once() -> None:
    model = tiny_model("llama-tied")
    plan = FoldPlan.create(source_model_of(model), groups=GROUPS)
    predicted = predicted_parameters(model, plan)
    before = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for n, p in model.model.layers[1].named_parameters() if "norm" not in n)
    assert predicted == before - 3 * matrices
    fold_(model, plan)
    assert sum(p.numel() for p in model.parameters()) == predicted


@pytest.mark.parametrize(
    ("family", "blocks", "named"),
    [("gemma3", (1, 2), "layer_types"), ("qwen3_moe", (2, 3), "mlp"), ("smollm3", (1, 2), "no_rope_layers")],
)
def test_s6_mixed_kinds_are_refused(family: str, blocks: tuple[int, int], named: str) -> None:
    model = tiny_model(family)
    with pytest.raises(PlanError, match=rf"{named}.*block {blocks[0]}.*block {blocks[1]}"):
        fold_(model, FoldPlan.create(source_model_of(model), groups=[Group(blocks=blocks)]))


def test_s6_other_shapes_are_refused() -> None:
    model = tiny_model("llama")
    narrow = tiny_model("llama", intermediate_size=32).model.layers[1].mlp
    model.model.layers[1].mlp = narrow
    with pytest.raises(PlanError, match=r"mlp\.down_proj"):
        fold_(model, FoldPlan.create(source_model_of(model), groups=[Group(blocks=(0, 1))]))


def deepseek() -> Any:
    """A tiny DeepSeek V3 of four blocks, two of them dense, whose routers correct their scores."""
    torch.manual_seed(0)
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, first_k_dense_replace=2, **experts, **latent,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for block in model.model.layers[2:]:
        block.mlp.gate.e_score_correction_bias.normal_()
    return model


@torch.no_grad()
@pytest.mark.parametrize("donor", ["mean", "last"])
def test_s6_what_a_router_saves_beside_its_matrix_is_made_as_the_matrix_is(donor: Any, tmp_path: Path) -> None:
    model = deepseek()
    routers = [copy.deepcopy(block.mlp.gate) for block in model.model.layers[2:]]
    plan = FoldPlan.create(source_model_of(model), groups=[Group(blocks=(2, 3), donor=donor)])
    fold_(model, plan)
    for name in ("weight", "e_score_correction_bias"):
        first, last = (getattr(router, name) for router in routers)
        expected = last if donor == "last" else (first + last) / 2
        for block in model.model.layers[2:]:
            torch.testing.assert_close(getattr(block.mlp.gate, name), expected)
    assert save_folded(model, plan, tmp_path / "folded").logits_identical


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_s6_means_of_quantised_weights_are_refused(dtype: torch.dtype) -> None:
    """What a quantiser's numbers stand for, only it knows."""
    model = tiny_model("llama")
    for block in model.model.layers[:2]:
        weight = block.mlp.up_proj.weight
        block.mlp.up_proj.weight = torch.nn.Parameter((weight * 100).to(dtype), requires_grad=False)
    before = model.model.layers[0].mlp.up_proj.weight.float()
    quantised = rf"mlp\.up_proj\.weight of block 0 is quantised \({str(dtype).removeprefix('torch.')}\).*'mean'"
    plans = {
        donor: FoldPlan.create(source_model_of(model), groups=[Group(blocks=(0, 1), donor=donor)])
        for donor in ("mean", "first")
    }
    with pytest.raises(UnsupportedModelError, match=quantised):
        fold_(model, plans["mean"])
    with pytest.raises(UnsupportedModelError, match="quantised; recover the plain model"):
        check_trainable(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.float(), before)
    fold_(model, plans["first"])
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight.float(), before)


def test_s6_an_mlp_may_be_shared_between_kinds_of_attention() -> None:
    model = tiny_model("gemma3")
    fold_(model, FoldPlan.create(source_model_of(model), groups=[Group(blocks=(1, 2), sublayers=("mlp",))]))


@torch.no_grad()
def test_s7_offload_to_disk(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """Owner and borrower offloaded alike or apart: hooks bring the weights at each call."""
    model, folder = saved
    places = ["disk", "cpu", "disk", "disk", "cpu", "disk"]
    device_map = {f"model.layers.{index}": place for index, place in enumerate(places)}
    device_map |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[3].self_attn.q_proj.weight.is_meta
    ids = token_ids(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_device_map_auto(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    ids = token_ids(model)
    torch.testing.assert_close(loaded(ids.to(loaded.device)).logits.cpu(), model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_s8_dtype_chosen_at_construction_reloads_identically(saved: tuple[Any, Path], dtype: torch.dtype) -> None:
    _, folder = saved
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    half.save_pretrained(folder / "half")
    again = AutoModelForCausalLM.from_pretrained(folder / "half", dtype=dtype)
    ids = token_ids(half)
    assert torch.equal(half(ids).logits, again(ids).logits)
    assert again.model.layers[4].self_attn.q_proj.weight is again.model.layers[3].self_attn.q_proj.weight


@torch.no_grad()
def test_s9_unfolding_is_bit_identical_and_the_mean_is_rounded_once() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    # Of two the sum in 16 bits, halved, would be the same.
    blocks = (0, 1, 3)
    members = [model.model.layers[i].mlp.up_proj.weight.double() for i in blocks]
    fold_(model, FoldPlan.create(source_model_of(model), groups=[Group(blocks=blocks, donor="mean")]))
    expected = (sum(members) / 3).to(torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)
    ids = token_ids(model)
    before = model(ids).logits
    unfold_(model)
    assert torch.equal(model(ids).logits, before)


def test_weights_replaced_at_the_owner_are_replaced_everywhere() -> None:
    """What a weight-only quantiser does: it swaps the linear layers it finds by walking the model."""
    model, _ = shared()

    replace_linears_(model)
    expected = copy.deepcopy(shared()[0])
    unfold_(expected)
    double_weights_(expected)
    with torch.no_grad():
        ids = token_ids(model)
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


@torch.no_grad()
def test_base_model_loads_through_auto_model(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    base = AutoModel.from_pretrained(folder)
    ids = token_ids(model)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@torch.no_grad()
def test_sharded_save_round_trips(tmp_path: Path) -> None:
    model, plan = shared()
    save_folded(model, plan, tmp_path / "folded", max_shard_size="40KB")
    assert len(list((tmp_path / "folded").glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    ids = token_ids(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, _ = shared()
    model.train()
    ids = token_ids(model)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_torch_compile_whole_graph() -> None:
    model, _ = shared()
    ids = token_ids(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_loads_with_remote_code_where_foldgpt_is_not_importable(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    ids = token_ids(model, (1, 7))
    with torch.no_grad():
        expected = model(ids).logits[0, -1].double().sum().item()
    code = f"""
        import sys
        sys.modules["foldgpt"] = None
        try:
            import foldgpt
            raise SystemExit("foldgpt is importable")
        except ImportError:
            pass
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
        ids = torch.tensor({ids.tolist()})
        with torch.no_grad():
            total = model(ids).logits[0, -1].double().sum().item()
        generated = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        model.save_pretrained({str(folder / "again")!r})
        again = AutoModelForCausalLM.from_pretrained({str(folder / "again")!r}, trust_remote_code=True)
        with torch.no_grad():
            same = torch.equal(again(ids).logits, model(ids).logits)
        print(total, tuple(generated.shape), same)
    """
    total, rest = run_python(code, folder).split(" ", 1)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert rest == "(1, 10) True"


def test_remote_code_decodes_by_lookup_past_an_absent_attention(tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    plan = FoldPlan.create(source_model_of(model), removed_attention=[1])
    fold_(model, plan)
    save_folded(model, plan, tmp_path / "folded")
    prompt = token_ids(model, (1, 3)).repeat(1, 2)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, use_cache=False, **options)
    code = f"""
        import sys
        sys.modules["foldgpt"] = None
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "folded")!r}, trust_remote_code=True)
        prompt = torch.tensor({prompt.tolist()})
        print(model.generate(prompt, prompt_lookup_num_tokens=3, **{options}).tolist())
    """
    assert run_python(code, tmp_path / "folded") == str(expected.tolist())


@pytest.mark.parametrize("first", ["import foldgpt", "from transformers import AutoModelForCausalLM"])
def test_loads_after_import_foldgpt_in_any_order(saved: tuple[Any, Path], first: str) -> None:
    _, folder = saved
    code = f"""
        {first}
        import foldgpt
        from transformers import AutoModelForCausalLM
        print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)
    """
    assert run_python(code, folder) == "FoldedLlamaForCausalLM"


def run_python(code: str, folder: Path) -> str:
    """Run a script in a fresh process; the last line it prints."""
    environment = {**os.environ, "HF_HOME": str(folder.parent / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]

"""What is trained, and that merging it changes nothing but where the numbers are kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from foldgpt.errors import UnsupportedModelError, UsageError
from foldgpt.folding import fold_, private_modules, source_model_of
from foldgpt.modeling.modeling_foldgpt import Borrowed
from foldgpt.plan import FoldPlan, Group
from foldgpt.recovery import RecoverySettings, check_device, make_trainable_, merge_trained_
from foldgpt.recovery.cuts import blocks_beside_cuts, check_plan_suits
from foldgpt.recovery.lora import LoraLinear
from foldgpt.recovery.trainable import trained_scales
from models import tiny_model, token_ids
from recovery_case import tiny_pair


def folded(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[nn.Module, FoldPlan]:
    """A tiny folded model with a cut and, where its blocks are of one kind, a shared group."""
    model = tiny_model(family, **changes).to(dtype)
    groups = [] if family in ("gemma3", "qwen2") else [Group(blocks=(0, 4))]
    plan = FoldPlan.create(source_model_of(model), removed=[2], groups=groups)
    fold_(model, plan)
    return model, plan


def disturb_(model: nn.Module) -> None:
    """Move all that is trained, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.mark.parametrize("fully", ["cuts", "all"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "granite"])
def test_the_merged_model_is_the_adapted_one(family: str, fully: Any) -> None:
    model, plan = folded(family)
    ids = token_ids(model)
    keys, size = set(model.state_dict()), sum(p.numel() for p in model.parameters())
    untouched = model(input_ids=ids).logits
    scaled = {} if fully == "all" else {"rank": 4, "alpha": 12.0}
    trained = make_trainable_(model, plan, RecoverySettings(train_fully=fully, **scaled))
    assert trained > 0
    assert {layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLinear)} <= {3.0}
    torch.testing.assert_close(model(input_ids=ids).logits, untouched, rtol=1e-12, atol=1e-12)
    disturb_(model)
    adapted = model(input_ids=ids).logits.detach()
    assert float((adapted - untouched).abs().max()) > 0.1
    merge_trained_(model)
    torch.testing.assert_close(model(input_ids=ids).logits, adapted, rtol=1e-10, atol=1e-10)
    assert set(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == size
    assert not any(p.requires_grad for p in model.parameters())


def test_terms_begin_as_their_seed_says_and_nobody_elses_draws_are_moved() -> None:
    def first(seed: int) -> torch.Tensor:
        model, plan = folded("llama")
        make_trainable_(model, plan, RecoverySettings(seed=seed))
        return next(layer for layer in model.modules() if isinstance(layer, LoraLinear)).lora_A["default"].weight

    model, plan = folded("llama")
    drawn = torch.get_rng_state()
    make_trainable_(model, plan, RecoverySettings(seed=5))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_a_group_has_one_adapter_that_all_its_positions_use() -> None:
    student, _, plan = tiny_pair()
    make_trainable_(student, plan, RecoverySettings(rank=4))
    owner, borrower = student.model.layers[0].self_attn, student.model.layers[3].self_attn
    assert isinstance(owner.q_proj, LoraLinear)
    assert isinstance(borrower.q_proj, Borrowed) and borrower.q_proj.owned is owner.q_proj
    assert sum(isinstance(m, LoraLinear) for m in student.model.layers[3].modules()) == 0
    x = torch.randn(3, 32)
    before = borrower.q_proj(x)
    disturb_(student)
    assert float((borrower.q_proj(x) - before).abs().max().detach()) > 0.01


@pytest.mark.parametrize("mixed", [False, True])
def test_products_and_gradients_are_those_of_peft(mixed: bool) -> None:
    """Also in mixed precision, to which a backward pass of one's own has to see itself."""
    dtype = torch.float32 if mixed else torch.float64
    layers = nn.ModuleDict({"ours": nn.Linear(12, 7), "theirs": nn.Linear(12, 7)}).to(dtype)
    layers["theirs"].load_state_dict(layers["ours"].state_dict())
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["ours"])
    config._register_custom_module({nn.Linear: LoraLinear})
    inject_adapter_in_model(config, layers)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["theirs"]), layers)
    with torch.no_grad():
        for term in ("lora_A", "lora_B"):
            values = torch.randn_like(getattr(layers["ours"], term).default.weight)
            for layer in layers.values():
                getattr(layer, term).default.weight.copy_(values)
    results = []
    torch.manual_seed(0)
    inputs, outputs = torch.randn(2, 5, 12, dtype=dtype), torch.randn(2, 5, 7, dtype=dtype)
    for layer in layers.values():
        x = inputs.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            y = layer(x)
        assert y.dtype == (torch.bfloat16 if mixed else dtype)
        wanted = (x, layer.lora_A.default.weight, layer.lora_B.default.weight)
        results.append([y, *torch.autograd.grad(y, wanted, outputs.to(y.dtype))])
    for ours, theirs in zip(*results, strict=True):
        tolerance = {"rtol": 0.05, "atol": 0.05 * float(theirs.detach().abs().max())} if mixed else {}
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_terms_and_norms_of_a_16_bit_model_are_kept_in_fp32() -> None:
    """The trap is real: a small update of a bf16 scale is lost."""
    assert torch.tensor(1.0, dtype=torch.bfloat16) + 1e-3 == 1
    model, plan = folded("llama", torch.bfloat16)
    norm = model.model.layers[0].input_layernorm
    given = norm.weight.detach().clone()
    make_trainable_(model, plan, RecoverySettings())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trained = [p for p in norm.parameters() if p.requires_grad]
    with torch.no_grad():
        for _ in range(100):
            trained[0].add_(1e-3)
    assert norm.weight.dtype == torch.bfloat16
    merge_trained_(model)
    assert norm.weight.dtype == torch.bfloat16 and isinstance(norm.weight, nn.Parameter)
    torch.testing.assert_close(norm.weight.float(), given.float() + 0.1, rtol=5e-3, atol=5e-3)


def test_norms_in_front_of_the_blocks_stay_where_only_those_behind_the_cut_are_trained() -> None:
    """There the student's pass begins behind the blocks that it has in common with the teacher."""
    config = AutoConfig.for_model("bloom", vocab_size=128, hidden_size=32, n_layer=6, n_head=4)
    for where in ("behind", "all"):
        model = AutoModelForCausalLM.from_config(config)
        plan = FoldPlan.create(source_model_of(model), removed=[4])
        fold_(model, plan)
        make_trainable_(model, plan, RecoverySettings(rank=2, train_blocks=where))  # type: ignore[arg-type]
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert ("transformer.word_embeddings_layernorm.weight" in trained) == (where == "all")
        assert "transformer.ln_f.weight" in trained


def test_what_the_model_itself_does_not_train_stays() -> None:
    model, plan = folded("llama")
    correction = model.model.layers[1].mlp.up_proj.weight
    correction.requires_grad_(False)
    make_trainable_(model, plan, RecoverySettings(rank=0, train_fully="all"))
    assert not model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert model.model.layers[1].mlp.down_proj.weight.requires_grad
    frozen, plan = folded("llama")
    frozen.requires_grad_(False)
    make_trainable_(frozen, plan, RecoverySettings(rank=0, train_fully="all"))
    assert frozen.model.layers[1].mlp.up_proj.weight.requires_grad


def test_the_merge_is_rounded_once() -> None:
    model, plan = folded("llama", torch.bfloat16)
    make_trainable_(model, plan, RecoverySettings(rank=4))
    disturb_(model)
    layer = model.model.layers[1].mlp.down_proj
    a, b = layer.lora_A.default.weight.detach().double(), layer.lora_B.default.weight.detach().double()
    expected = (layer.base_layer.weight.detach().double() + b @ a).bfloat16()
    merge_trained_(model)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, expected)


def test_float16_is_refused() -> None:
    model, plan = folded("llama", torch.float16)
    with pytest.raises(UnsupportedModelError, match="bfloat16 or float32"):
        make_trainable_(model, plan, RecoverySettings())


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_embeddings_and_head_are_left_out(family: str) -> None:
    model, plan = folded(family)
    given = copy.deepcopy(model.get_output_embeddings().weight.detach())
    make_trainable_(model, plan, RecoverySettings(train_fully="cuts"))
    assert not any(p.requires_grad for p in model.get_input_embeddings().parameters())
    assert not any(p.requires_grad for p in model.get_output_embeddings().parameters())
    disturb_(model)
    merge_trained_(model)
    assert torch.equal(model.get_output_embeddings().weight, given)


def test_blocks_on_both_sides_of_each_cut() -> None:
    source = {"source": source_model_of(tiny_model("llama"))}
    assert blocks_beside_cuts(FoldPlan.create(**source, removed=[2, 3])) == [1, 2]
    assert blocks_beside_cuts(FoldPlan.create(**source, removed=[0])) == [0]
    assert blocks_beside_cuts(FoldPlan.create(**source, removed=[5])) == [4]
    with pytest.raises(UsageError, match="removes no whole block beside a kept one"):
        check_plan_suits(FoldPlan.create(**source, removed=[]), RecoverySettings(train_fully="cuts"))


def test_fully_trained_blocks_hold_no_lora() -> None:
    model, plan = folded("llama", torch.bfloat16)
    make_trainable_(model, plan, RecoverySettings(rank=4, train_fully="cuts"))
    for position in (1, 2):
        block = model.model.layers[position]
        assert not any(isinstance(module, LoraLinear) for module in block.modules())
        assert all(p.requires_grad for p in block.parameters())
    assert any(isinstance(module, LoraLinear) for module in model.model.layers[0].modules())


def test_all_blocks_behind_the_first_cut_in_full() -> None:
    model = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(model), removed=[2])
    fold_(model, plan)
    make_trainable_(model, plan, RecoverySettings(train_blocks="behind", train_fully="all"))
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    for position, block in enumerate(model.model.layers):
        assert {p.requires_grad for p in block.parameters()} == {position >= 1}


@pytest.mark.parametrize("fully", ["cuts", "all"])
def test_private_low_rank_terms_are_no_part_of_full_blocks(fully: Any) -> None:
    model = tiny_model("llama")
    zero = Group(blocks=(1, 2), donor="first", start="zero", private=("norms", "scales"), ranks=2)
    plan = FoldPlan.create(source_model_of(model), groups=[zero], removed=[3])
    fold_(model, plan)
    make_trainable_(model, plan, RecoverySettings(train_fully=fully, private_terms=False))
    terms = [p for module in private_modules(model) for p in module.parameters()]
    assert terms and not any(p.requires_grad for p in terms)
    assert model.model.layers[3].mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_private_terms_are_trained_at_their_positions_and_merged(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    zero = Group(blocks=(0, 2), donor="first", start="zero", private=("norms", "scales"), ranks=2)
    plan = FoldPlan.create(source_model_of(model), groups=[zero], removed=[3])
    fold_(model, plan)
    keys = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainable_(model, plan, RecoverySettings(rank=4))
    scales = trained_scales(model, plan)
    # Where a norm stands behind each sublayer it is the scale; both sublayers have one.
    assert len(scales) == 2 and all(parameter.requires_grad and parameter.ndim == 1 for parameter in scales)
    ids = token_ids(model)
    disturb_(model)
    trained = model(input_ids=ids).logits.detach()
    merge_trained_(model)
    if dtype == torch.float64:
        torch.testing.assert_close(model(input_ids=ids).logits, trained, rtol=1e-10, atol=1e-10)
    after = model.state_dict()
    assert {name: value.dtype for name, value in after.items()} == {name: value.dtype for name, value in keys.items()}
    terms = [name for name in keys if name.rpartition(".")[2] in ("scale", "up", "down")]
    assert terms and not any(torch.equal(after[name], keys[name]) for name in terms)


@pytest.mark.parametrize("chosen", ["rank", "norms", "private_terms"])
def test_each_kind_is_trained_alone(chosen: str) -> None:
    model = tiny_model("llama")
    plan = FoldPlan.create(
        source_model_of(model), groups=[Group(blocks=(1, 2), donor="mean", private=("norms", "scales"))]
    )
    fold_(model, plan)
    nothing: dict[str, Any] = {"rank": 0, "norms": False, "private_terms": False}
    make_trainable_(model, plan, RecoverySettings(**{**nothing, chosen: 1 if chosen == "rank" else True}))
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"private_terms": {"scale"}, "norms": {"weight"}, "rank": {"weight"}}[chosen]
    assert all(("norm" in name) == (chosen == "norms") for name, p in model.named_parameters() if p.requires_grad)


def test_private_terms_alone_need_some() -> None:
    model, plan = folded("llama")
    with pytest.raises(UsageError, match="no position has private terms"):
        make_trainable_(model, plan, RecoverySettings(rank=0, norms=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "revers"}, "Did you mean 'reverse'"),
        ({"kl": 0.0}, "nothing is asked"),
        ({"rank": 0, "norms": False, "private_terms": False}, "nothing is trained"),
        ({"scale_rate": 0.0}, "scale_rate must be more than 0"),
        ({"temperature": 0.0}, "temperature must be more than 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number, not inf"),
        ({"minutes": float("inf")}, "minutes must be a finite number, not inf"),
        ({"kl": float("nan")}, "kl must be a finite number, not nan"),
        ({"seed": -1}, "seed must be at least 0 and below 2.32, not -1"),
        ({"seed": 2**32}, "seed must be at least 0 and below 2.32, not 4294967296"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"skew": 1.0}, "skew"),
        ({"patience": 0}, "patience"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, not 2.5"),
        ({"rank": None}, "rank must be a whole number, not None"),
        ({"patience": 1.5}, "patience must be a whole number, not 1.5"),
        ({"norms": 0}, "norms must be true or false, not 0"),
        ({"compile": True, "states": 1.0, "states_at": "all"}, "compile with states_at=all: each block would"),
        ({"kl": True}, "kl must be a number, not True"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a number, not '1e-3'"),
        ({"kl": 0.0, "lm": 1.0, "temperature": 2.0}, "temperature is 2.0, but it is of the loss kl"),
        ({"kl": 0.0, "lm": 1.0, "divergence": "reverse"}, "divergence is reverse, but it is of the loss kl"),
        ({"skew": 0.3}, "skew is 0.3, but it is of the skewed divergence, and this one is forward"),
        ({"states_at": "all"}, "states_at is all, but it says where states are compared"),
        ({"rank": 0, "alpha": 8.0}, "alpha is 8.0, but it is of LoRA terms, and there are none: rank is 0"),
        (
            {"train_fully": "all", "rank": 8},
            "rank is 8, but it is of LoRA terms, and there are none: train_fully is all",
        ),
        ({"train_fully": "all", "alpha": 8.0}, "alpha is 8.0, but it is of LoRA terms, .* train_fully is all"),
        ({"norms": False, "private_terms": False, "scale_rate": 3.0}, "scale_rate is 3.0"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RecoverySettings(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"divergence": "skewed", "skew": 0.3},
        {"kl": 0.0, "lm": 1.0, "temperature": 1.0},
        {"states": 1, "states_at": "all"},
    ],
    ids=str,
)
def test_settings_that_are_read_are_taken(changes: dict[str, Any]) -> None:
    RecoverySettings(**changes)


def test_another_accelerator_than_the_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would move everything to the first, which may be in use by others."""
    with pytest.raises(UsageError, match=r"device cuda:1: .*CUDA_VISIBLE_DEVICES=1"):
        check_device(torch.device("cuda:1"))
    for name in ("cpu", "cuda", "cuda:0"):
        check_device(torch.device(name))
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_device(torch.device("cuda:1"))

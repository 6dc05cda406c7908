"""Every recipe runs through on a tiny model, and what is expected of the real one is what can be counted elsewhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from foldgpt import pipeline, rehearsal, side_by_side
from foldgpt.architectures import known_architectures
from foldgpt.cli import app
from foldgpt.comparison.rows import known_rows
from foldgpt.errors import SourceError, UnsupportedModelError, UsageError
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.recipe import Recipe
from foldgpt.recovery import RecoverySettings
from foldgpt.recovery.trainable import make_trainable_
from foldgpt.rehearsal import (
    Expectation,
    Memory,
    Rehearsal,
    expect,
    expectation_lines,
    expectation_table,
    rehearse,
)
from foldgpt.rehearsal.tiny import config_of
from models import tiny_config, tiny_model, token_ids
from run_inputs import tiny_recipe, tiny_source, tiny_text

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
#: Recipes of models that are too large for this project's own machines, and those of models that install with pip.
LARGE = [path for path in RECIPES if not Recipe.load(path).model.startswith("demo:")]
SMALL = [path for path in RECIPES if path not in LARGE]


@pytest.mark.parametrize("architecture", known_architectures().values(), ids=lambda value: value.model)
def test_shapes_give_the_published_number_of_parameters(architecture: object) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(architecture.model))  # type: ignore[attr-defined]
    assert sum(p.numel() for p in model.parameters()) == architecture.parameters  # type: ignore[attr-defined]


def without_numbers(recipe: Recipe) -> dict[str, Any]:
    """A recipe without how much goes, and how much is shared instead in a comparison."""
    values = recipe.model_dump(mode="json")
    row = values["compare"]["rows"]["gates + sharing"]
    values["select"]["remove"] = row["select"]["remove"] = row["share"]["group_size"] = None
    values["compare"]["budget_tolerance"] = None
    return values


@pytest.mark.parametrize("path", [path for path in LARGE if path.stem.endswith("-27")], ids=lambda path: path.stem)
def test_recipes_of_one_model_differ_in_numbers_alone(path: Path) -> None:
    """So what is rehearsed of the larger cut holds for the smaller one."""
    less, more = (Recipe.load(path.with_stem(path.stem.replace("-27", name))) for name in ("-27", "-36"))
    assert without_numbers(less) == without_numbers(more)
    num_blocks = config_of(less.model).num_hidden_layers
    for recipe, ratio in ((less, 0.27), (more, 0.36)):
        assert recipe.select.remove is not None
        # As near as whole blocks allow.
        assert abs(recipe.select.remove / num_blocks - ratio) <= 0.5 / num_blocks


@pytest.mark.parametrize(
    "path",
    [
        *(path for path in LARGE if not path.stem.endswith("-27")),
        *(pytest.param(path, marks=pytest.mark.real_model) for path in SMALL if path.stem != "demo"),
    ],
    ids=lambda path: path.stem,
)
def test_each_recipe_runs_through_on_a_tiny_model(path: Path) -> None:
    recipe = Recipe.load(path)
    ratio = int(path.stem.rpartition("-")[2]) / 100
    found = rehearse(recipe).rows["run"]
    num_blocks = config_of(recipe.model).num_hidden_layers
    assert recipe.select.remove is not None
    # As near as whole blocks allow.
    assert abs(recipe.select.remove / num_blocks - ratio) <= 0.5 / num_blocks
    assert found.kept_block_parameters == found.block_parameters * (num_blocks - recipe.select.remove) // num_blocks
    assert found.num_trained > 0
    assert set(found.memory) == {"search", "fits", "fold and verify", "recovery"}
    measured = {"source's perplexity", "perplexity before recovery", "perplexity"}
    assert set(found.flops) == {"analysis", "search", *measured, "teacher", "recovery"}
    assert found.flops["perplexity before recovery"] == found.flops["perplexity"]


def test_a_comparison_is_rehearsed_row_by_row_with_equal_budgets_on_the_real_model() -> None:
    recipe = Recipe.load(next(path for path in LARGE if path.stem == "llama-3.2-1b-36"))
    few = recipe.changed(
        compare={
            "rows": {"bi": None, "gates + sharing": (recipe.compare.rows or {})["gates + sharing"]},
            "recovered": ["bi"],
        }
    )
    found = rehearse(few, compare=True)
    assert list(found.rows) == ["bi", "gates + sharing", "bi + recovery"]
    sizes = {name: row.kept_block_parameters for name, row in found.rows.items()}
    assert abs(sizes["gates + sharing"] / sizes["bi"] - 1) <= recipe.compare.budget_tolerance
    # bi's folded model is trained, not made twice, and the source measured once.
    rows = [row.flops for row in found.rows.values()]
    in_common = sum(row["analysis"] + row["source's perplexity"] for row in rows[1:]) + rows[0]["search"]
    assert found.flops == pytest.approx(sum(sum(row.values()) for row in rows) - in_common)


def test_the_teacher_s_passes_are_counted_once_in_a_comparison() -> None:
    recipe = Recipe.load(next(path for path in LARGE if path.stem == "llama-3.2-1b-36"))
    rows = {"bi": None, "last": None, "bi + plain LoRA": None}
    found = rehearse(recipe.changed(compare={"rows": rows, "recovered": list(rows)}), compare=True)
    teachers = [row.flops["teacher"] for row in found.rows.values() if "teacher" in row.flops]
    assert len(teachers) == 2, "plain LoRA has none"
    only_once = sum(row.flops["analysis"] + row.flops["source's perplexity"] for row in list(found.rows.values())[1:])
    only_once += sum(row.flops["search"] for row in found.rows.values())
    only_once -= sum(found.rows[name].flops["search"] for name in ("bi", "last"))
    whole = sum(sum(row.flops.values()) for row in found.rows.values())
    assert found.flops == pytest.approx(whole - only_once - teachers[0])


def test_a_search_is_counted_once_for_the_rows_that_select_alike() -> None:
    recipe = Recipe.load(next(path for path in LARGE if path.stem == "llama-3.2-1b-36"))
    compensated = {"compensate": {"method": "linear"}}
    rows = {"bi": None, "gates": None, "the same": known_rows(recipe)["gates"], "other": compensated}
    found = rehearse(recipe.changed(compare={"rows": rows, "recovered": ["gates"]}), compare=True)
    assert found.searches["gates"] == found.searches["the same"] == found.searches["gates + recovery"]
    assert len({found.searches[name] for name in ("bi", "gates", "other")}) == 3
    flops = [row.flops for row in found.rows.values()]
    once = sum(row["analysis"] + row["source's perplexity"] for row in flops[1:])
    alike = 2 * found.rows["gates"].flops["search"]
    assert found.flops == pytest.approx(sum(sum(row.values()) for row in flops) - once - alike)


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_sharing_row_of_each_recipe_is_as_large_as_the_others(path: Path) -> None:
    """Counted on the real shapes; which blocks are removed does not matter, for all are alike."""
    recipe = Recipe.load(path)
    change = (recipe.compare.rows or {})["gates + sharing"]
    assert change is not None and recipe.select.remove is not None
    config = config_of(recipe.model)
    with torch.device("meta"):
        block = AutoModelForCausalLM.from_config(config).model.layers[0]
    whole, attention = (sum(p.numel() for p in module.parameters()) for module in (block, block.self_attn))
    if hasattr(block.self_attn, "q_norm"):
        attention -= sum(p.numel() for name, p in block.self_attn.named_parameters() if "norm" in name)
    kept = config.num_hidden_layers - change["select"]["remove"]
    size = change["share"]["group_size"]
    shared = kept * whole - kept // size * (size - 1) * attention
    removed = (config.num_hidden_layers - recipe.select.remove) * whole
    assert abs(shared / removed - 1) <= recipe.compare.budget_tolerance


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "gpt_neox"])
def test_what_is_counted_on_meta_is_what_a_real_model_has(family: str) -> None:
    config, model = tiny_config(family), tiny_model(family)
    plan = FoldPlan.create(source_model_of(model, name="m"), removed=[2, 3])
    recipe = Recipe.from_dict({"model": "m", "dtype": "float32", "recover": {"num_tokens": 512, "context": 32}})
    settings = RecoverySettings(rank=2, batch_size=4, micro_batch_size=2)
    found = expect(config, recipe, plan, settings)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    fold_(model, plan)
    assert found.kept_parameters == sum(p.numel() for p in model.parameters())
    assert found.memory["recovery"].weights == 4 * found.kept_parameters
    assert found.memory["recovery"].teacher == 4 * found.parameters
    assert found.num_trained == make_trainable_(model, plan, settings)
    kept = kept_by_autograd(model)
    # Without the mask that meta needs, and with attention as this device computes it.
    assert 0.5 <= found.memory["recovery"].activations / kept <= 1.6


def kept_by_autograd(model: nn.Module) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=token_ids(model, (2, 32)), use_cache=False)
    return sum(storage.nbytes() for storage in seen.values())


def test_operations_are_two_for_each_weight_and_token_and_double_with_the_way_back() -> None:
    """2 N for each token (Kaplan et al. 2020); frozen weights need no gradient, so the way back costs no more."""
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    plan = FoldPlan.create(source_model_of(tiny_model("llama", num_hidden_layers=4), name="m"), removed=[1])
    base = {"model": "m", "dtype": "bfloat16", "select": {"method": "bi", "remove": 1}, "evaluate": {"texts": []}}
    base["calibration"] = {"num_tokens": 1000, "context": 8}
    found = expect(config, Recipe.from_dict(base), plan, RecoverySettings())
    assert found.flops["analysis"] == pytest.approx(2 * found.block_parameters * 1000, rel=0.02)
    # What bi removes is measured: the recording, half of the blocks, and the head at every other position thrice.
    assert found.flops["search"] == pytest.approx(1.5 * found.flops["analysis"] + 3 * 500 * 2 * 64 * 256, rel=0.01)
    assert set(found.flops) == {"analysis", "search"}
    trained = {**base, "recover": {"num_tokens": 64, "context": 8, "held_out_tokens": 2}}
    settings = RecoverySettings(rank=1, kl=0, lm=1, norms=False, batch_size=1)
    recovery = expect(config, Recipe.from_dict(trained), plan, settings).flops["recovery"]
    head = 2 * 64 * 256
    assert recovery == pytest.approx(64 * (4 * found.kept_block_parameters + 2 * head), rel=0.2)
    # Of the teacher a divergence wants its logits too, and losses of states want nobody's.
    with_teacher, of_states = (
        expect(config, Recipe.from_dict(trained), plan, dataclasses.replace(settings, **losses)).flops["recovery"]
        for losses in ({"kl": 1}, {"lm": 0, "last_error": 1})
    )
    measured = 2 * (2 + 64 // 8 // settings.evaluate_every)
    assert with_teacher - recovery == pytest.approx((64 + measured) * head)
    assert recovery - of_states == pytest.approx((2 * 64 + measured) * head)


def test_a_teacher_in_a_file_spares_each_step_its_logits() -> None:
    """For two products with the head once; where the logits are needed, each step makes them."""
    recipe = Recipe.from_dict({"model": "m", "dtype": "float32", "recover": {"num_tokens": 512, "context": 32}})
    head = 2 * 128 * 32 * 512
    for family, divergence, saved in (("llama", "forward", 1), ("llama", "reverse", 0), ("gemma2", "forward", 0)):
        plan = FoldPlan.create(source_model_of(tiny_model(family), name="m"), removed=[1])
        config, settings = tiny_config(family), RecoverySettings(divergence=divergence)
        plain, kept = (expect(config, recipe, plan, settings, teacher_cached=cached).flops for cached in (False, True))
        assert plain["recovery"] - kept["recovery"] == pytest.approx(saved * head)
        assert kept["teacher"] - plain["teacher"] == pytest.approx(2 * saved * head)


def test_blocks_behind_the_first_cut_are_counted_as_if_all_were_trained() -> None:
    """The cuts of a rehearsal are the tiny model's; what the real one saves by its own is not known beforehand."""
    config, model = tiny_config("llama"), tiny_model("llama")
    recipe = Recipe.from_dict({"model": "m", "dtype": "float32", "recover": {"num_tokens": 512, "context": 32}})
    counted = {}
    for where in ("behind", "all"):
        settings = RecoverySettings(train_blocks=where, rank=2, batch_size=4, micro_batch_size=2)
        for removed in (1, 4):
            plan = FoldPlan.create(source_model_of(model, name="m"), removed=[removed])
            found = expect(config, recipe, plan, settings)
            counted[where, removed] = (found.num_trained, found.flops, found.memory)
    assert len({str(each) for each in counted.values()}) == 1
    # The trap is real: how much is trained does go by the place of the cut.
    trained = []
    for removed in (1, 4):
        folded, plan = tiny_model("llama"), FoldPlan.create(source_model_of(model, name="m"), removed=[removed])
        fold_(folded, plan)
        trained.append(make_trainable_(folded, plan, RecoverySettings(train_blocks="behind", rank=2)))
    assert counted["behind", 1][0] >= trained[0] > trained[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effort": "high"}, "the gates' effort must be a number above 0 and at most 1,000,000, not 'high'"),
        ({"effort": -1}, "not -1"),
        ({"steps": 0}, "the gates' steps must be a whole number from 1 on, not 0"),
    ],
    ids=str,
)
def test_options_that_the_real_run_refuses_are_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    """The toy has an effort and steps of its own."""
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    select = {"method": "gates", "remove": 2, "options": options}
    recipe = Recipe.from_dict(tiny_recipe(source, text, select=select))
    with pytest.raises(UsageError, match=message):
        rehearse(recipe)
    compared = {"rows": {"bi": None, "wrong": {"select": select}}}
    recipe = Recipe.from_dict(tiny_recipe(source, text, compare=compared))
    with pytest.raises(UsageError, match=f"row 'wrong': .*{message}"):
        rehearse(recipe, compare=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": {"context": 512, "num_tokens": 1024}}, "calibration.context is 512, .* has 128 positions"),
        ({"evaluate": {"context": 512}}, "evaluate.context is 512 for .* has 128 positions"),
        ({"recover": {"context": 512, "num_tokens": 4096}}, "recover.context is 512, .* has 128 positions"),
        ({"evaluate": {"tasks": ["piqq"]}}, r"unknown task 'piqq'\. Did you mean 'piqa'\?"),
        ({"evaluate": {"tasks": ["piqa", "piqa"]}}, "the task 'piqa' is named twice"),
        ({"evaluate": {"tasks": ["piqa"], "texts": []}}, "tasks need a text as well"),
        ({"recover": {"num_tokens": 4096, "report_to": ["wandbb"]}}, "unknown logger 'wandbb' in report_to"),
        (
            {"calibration": {"num_tokens": 16}, "compensate": {"method": "none"}},
            "calibration.num_tokens is 16, which does not fill one window of 32",
        ),
    ],
    ids=str,
)
def test_what_the_real_run_refuses_in_its_first_second_is_refused_alike(
    tmp_path: Path, changes: dict[str, dict[str, object]], message: str
) -> None:
    """The toy has contexts of its own, and neither tasks nor loggers."""
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    compared = {"rows": {"bi": None, "last": None}}
    recipe = Recipe.from_dict(tiny_recipe(source, text, compare=compared)).changed(**changes)
    told = []
    for runs in (
        lambda: rehearse(recipe),
        lambda: pipeline.run(recipe, tmp_path / "run"),
        lambda: rehearse(recipe, compare=True),
        lambda: side_by_side.compare(recipe, tmp_path / "comparison"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            runs()
        told.append(str(caught.value))
    assert len(set(told)) == 1, told


def test_a_rank_that_the_real_matrices_do_not_have_is_refused(tmp_path: Path) -> None:
    """Those of the toy are smaller, and so is its rank."""
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    share = {"method": "adjacent", "rank": 17}
    recipe = Recipe.from_dict(tiny_recipe(source, text, share=share))
    message = "share.rank is 17, and the smallest matrix that is shared has 16 rows or columns"
    for runs in (lambda: rehearse(recipe), lambda: pipeline.run(recipe, tmp_path / "run")):
        with pytest.raises(UsageError, match=message):
            runs()
    assert rehearse(recipe.changed(share={**share, "rank": 16})).rows
    compared = {"rows": {"bi": None, "shared": {"share": share}}, "unequal_budgets": "flag"}
    recipe = Recipe.from_dict(tiny_recipe(source, text, compare=compared))
    with pytest.raises(UsageError, match=f"row 'shared': {message}"):
        rehearse(recipe, compare=True)


def test_a_dry_run_is_of_a_machine_that_is_not_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldgpt.recovery.compiled._BACKEND", "nonsense")
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    recover = {"num_tokens": 4096, "context": 32, "settings": {"compile": True}}
    recipe = Recipe.from_dict(tiny_recipe(source, text, device="cuda:7", recover=recover))
    assert rehearse(recipe).rows["run"].flops["recovery"] > 0


def test_rows_may_have_a_cache_that_none_of_them_reads(tmp_path: Path) -> None:
    """The comparison itself runs: the cache is what its rows have in common."""
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    recover = {"num_tokens": 4096, "context": 32, "teacher_cache": "tc", "settings": {"kl": 0, "lm": 1}}
    compared = {"rows": {"bi": None, "last": None}}
    recipe = Recipe.from_dict(tiny_recipe(source, text, compare=compared, recover=recover))
    assert set(rehearse(recipe, compare=True).rows) >= {"bi", "last"}
    with pytest.raises(UsageError, match="no loss compares with the teacher"):
        rehearse(recipe)


def test_what_is_refused_at_once_names_the_real_model(tmp_path: Path) -> None:
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    recipe = Recipe.from_dict(tiny_recipe(source, text, select={"remove": 6}))
    with pytest.raises(UsageError, match=f"{source} has 6 blocks, of which one must stay"):
        rehearse(recipe)


def test_a_dry_run_takes_neither_a_revision_nor_code_that_it_cannot_look_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    recipe = Recipe.from_dict(tiny_recipe(source, text))
    with pytest.raises(UsageError, match="--revision is for hub models only"):
        rehearse(recipe.changed(revision="v1"))
    with pytest.raises(UsageError, match="--revision is for hub models only"):
        config_of("demo:smollm2-135m", revision="v1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    # The shape that comes with foldgpt is that of no revision in particular.
    with pytest.raises(SourceError, match=r"config of google/gemma-2b at revision 'v1': .* without a network and a"):
        config_of("google/gemma-2b", revision="v1")
    assert rehearse(recipe.changed(trust_remote_code=True)).rows, "trust in a model that brings none is no obstacle"
    path = source / "config.json"
    config = {**json.loads(path.read_text()), "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=f"a dry run cannot use a model's own code, which {source} brings"):
        rehearse(recipe.changed(trust_remote_code=True))
    assert rehearse(recipe).rows, "transformers knows this one without its code"


def test_what_cannot_be_counted_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    """Grouped products of a mixture know no meta tensors in fp32."""
    source = tiny_source(tmp_path / "model", "mixtral")
    recipe = Recipe.from_dict(
        {**tiny_recipe(source, tiny_text(tmp_path / "text.txt")), "dtype": "float32", "compensate": {"method": "none"}}
    )
    with pytest.raises(
        UnsupportedModelError, match=r"the real mixtral takes cannot be counted on .* meta device: Expected inputs"
    ):
        rehearse(recipe)


def test_auto_counts_in_the_format_of_the_checkpoint() -> None:
    model = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(model, name="m"), removed=[2])
    for dtype in (torch.float32, torch.bfloat16):
        found = expect(tiny_config("llama", dtype=dtype), Recipe.from_dict({"model": "m"}), plan, RecoverySettings())
        assert found.memory["search"].weights == dtype.itemsize * found.parameters


def test_auto_counts_in_the_format_of_the_weights_where_the_config_names_none(tmp_path: Path) -> None:
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    values = json.loads((source / "config.json").read_text())
    assert values.pop("dtype") == "float32"
    (source / "config.json").write_text(json.dumps(values))
    found = rehearse(Recipe.from_dict(tiny_recipe(source, text))).rows["run"]
    assert found.memory["search"].weights == 4 * found.parameters
    (source / "model.safetensors").unlink()
    assert rehearse(Recipe.from_dict(tiny_recipe(source, text))).rows["run"].parameters == found.parameters


def test_a_size_may_be_written_in_any_way(tmp_path: Path) -> None:
    """The toy is a thousand times smaller than what is meant: a size in parameters has to become a fraction."""
    source, text = tiny_source(tmp_path / "model", hidden_size=64), tiny_text(tmp_path / "text.txt")
    model = tiny_model("llama", hidden_size=64)
    total = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    found = {}
    for written in (0.7, "70%", str(total - round(0.3 * blocks))):
        recipe = Recipe.from_dict(tiny_recipe(source, text, select={"method": "greedy"}))
        recipe = Recipe.from_dict({**recipe.model_dump(), "share": {"method": "auto", "size": written}})
        found[written] = rehearse(recipe).rows["run"]
        assert found[written].kept_block_parameters <= 0.7005 * blocks
    assert len({row.flops["search"] for row in found.values()}) == 1
    assert found["70%"].flops["search"] > 1.5 * found["70%"].flops["analysis"] / 8192 * 256
    with pytest.raises(UsageError, match=r"share\.size '9B' is not between"):
        rehearse(recipe.changed(share={"size": "9B"}))


def test_private_terms_are_counted_at_their_real_sizes(tmp_path: Path) -> None:
    """The toy's layout tells its own sizes, and a rank that the real model has room for is too large for it."""
    source, text = tiny_source(tmp_path / "model", hidden_size=64), tiny_text(tmp_path / "text.txt")
    share = {"method": "adjacent", "sublayers": ["attention"], "rank": 12, "scales": True}
    recipe = Recipe.from_dict(tiny_recipe(source, text, share=share, compensate={"method": "none"}))
    found = rehearse(recipe).rows["run"]
    made = pipeline.run(recipe, tmp_path / "run").evaluation.folded.size
    assert made.private_parameters
    assert found.kept_block_parameters == made.block_parameters


def test_a_local_model_needs_no_known_shape_and_an_unknown_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    found = rehearse(Recipe.from_dict(tiny_recipe(source, text)))
    assert found.rows["run"].kept_block_parameters == found.rows["run"].block_parameters * 4 // 6
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match=r"cannot read the config of nobody/nothing: .*Qwen/Qwen3-1\.7B"):
        config_of("nobody/nothing")


def test_several_devices_share_the_recovery_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All else runs on one: a time divided by their number would be a promise that nobody can keep."""
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    recover = {"num_tokens": 4096, "context": 32, "held_out_tokens": 1024}
    compared = {"rows": {"bi": None, "last": None}, "recovered": ["bi"]}
    Recipe.from_dict(
        tiny_recipe(source, text, select={"method": "greedy", "remove": 2}, recover=recover, compare=compared)
    ).save(tmp_path / "recipe.yaml")
    ahead = ["--dry-run", "--quiet", "--tflops", "0.001"]
    found_before: dict[tuple[str, bool], Rehearsal] = {}

    def remembered(recipe: Recipe, *, compare: bool = False) -> Rehearsal:
        """However many devices there are, it is the same."""
        key = (recipe.model_dump_json(), compare)
        if key not in found_before:
            found_before[key] = rehearse(recipe, compare=compare)
        return found_before[key]

    monkeypatch.setattr(rehearsal, "rehearse", remembered)

    def shown(verb: str, *arguments: str) -> str:
        found = CliRunner().invoke(app, [verb, str(tmp_path / "recipe.yaml"), *ahead, *arguments])
        assert found.exit_code == 0, found.output
        return found.stdout

    run = json.loads(shown("run", "--json", "--devices", "4"))
    flops = run["rows"]["run"]["flops"]
    shared = flops.pop("teacher") + flops.pop("recovery")
    assert set(flops) == {"analysis", "search", "source's perplexity", "perplexity before recovery", "perplexity"}
    assert run["seconds"] == pytest.approx((sum(flops.values()) + shared / 4) / 1e9)
    # The teacher's states are made once for all rows, by one process.
    one, four = (json.loads(shown("compare", "--json", "--devices", number)) for number in ("1", "4"))
    trained = four["rows"]["bi + recovery"]["flops"]["recovery"]
    assert one["flops"] == four["flops"] == pytest.approx(1e9 * one["seconds"])
    assert one["seconds"] - four["seconds"] == pytest.approx(0.75 * trained / 1e9)
    lines = shown("run", "--devices", "4")
    assert "Shared by the 4 devices: teacher, recovery, if `foldgpt recover` is run by `accelerate launch`" in lines
    assert "Shared by the 4 devices: recovery, if" in shown("compare", "--devices", "4")
    assert "Nothing in this is shared by 4 devices" in shown("run", "--devices", "4", "--recover-tokens", "0")
    assert "hared by" not in shown("run")


def test_the_time_in_the_table_is_waited_for_what_one_device_does() -> None:
    flops = {"analysis": 3e12, "search": 5e12, "teacher": 8e12, "recovery": 40e12}
    memory = {"search": Memory(1.0)}
    row = Expectation(10, 8, 9, 7, 1, memory, flops, ("teacher", "recovery"))
    found = Rehearsal("m", {"run": row}, [], {"run": None})
    (time,) = expectation_table(found, teraflops=1, devices=4).columns[-1].cells
    assert time == "20 s"
    assert "All together 56.0 TFLOP: 20 s at 1 TFLOP/s" in "\n".join(expectation_lines(found, teraflops=1, devices=4))


def test_a_cached_teacher_is_no_faster_on_several_devices(tmp_path: Path) -> None:
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    recover = {"num_tokens": 4096, "context": 32, "held_out_tokens": 1024, "teacher_cache": str(tmp_path / "cache")}
    row = rehearse(Recipe.from_dict(tiny_recipe(source, text, recover=recover))).rows["run"]
    saved = row.seconds(1.0) - row.seconds(1.0, devices=2)
    assert saved == pytest.approx(row.flops["recovery"] / 2)
    assert not (tmp_path / "cache").exists()


def test_on_the_command_line(tmp_path: Path) -> None:
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    evaluate = {"texts": [str(text)], "context": 32, "max_windows": 4, "tasks": ["piqa"], "limit": 5}
    recipe = Recipe.from_dict(
        tiny_recipe(source, text, evaluate=evaluate, compare={"rows": {"bi": None, "last": None}})
    )
    recipe.save(tmp_path / "recipe.yaml")
    arguments = [str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), "--dry-run", "--quiet"]
    shown = CliRunner().invoke(app, ["run", *arguments, "--tflops", "0.5", "--devices", "2"])
    assert shown.exit_code == 0, shown.output
    for part in (
        "66.7 %",
        "Memory, search",
        "at 0.5 TFLOP/s sustained on each of 2 devices",
        "share.method auto",
        "texts are made up",
        "tasks are left out (piqa)",
    ):
        assert part in shown.output
    as_json = CliRunner().invoke(app, ["compare", *arguments, "--json"])
    assert list(json.loads(as_json.stdout)["rows"]) == ["bi", "last"]
    assert not (tmp_path / "out").exists()

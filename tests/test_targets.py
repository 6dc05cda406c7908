"""Budgets in other units than blocks: what people write, and how many blocks that means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cli_case import foldgpt
from foldgpt import pipeline, planning
from foldgpt.comparison import rows_of_recipe
from foldgpt.errors import UnsupportedModelError, UsageError
from foldgpt.families import decoder_of
from foldgpt.formats import what_goes
from foldgpt.plan import FoldPlan
from foldgpt.planning import expected_parameters
from foldgpt.recipe import Recipe
from foldgpt.rehearsal import rehearse
from foldgpt.selection import Share, budget, flops_of, number_for_target
from foldgpt.targets import Target, target
from foldgpt.workbench import Workbench
from models import tiny_model
from run_inputs import planned, tiny_recipe, tiny_source, tiny_text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("parameters=0.8", Target("parameters", 0.8, True)),
        ("parameters = 80%", Target("parameters", 0.8, True)),
        ("parameters=95M", Target("parameters", 95e6, False)),
        ("parameters=95_000_000", Target("parameters", 95e6, False)),
        ("flops=40G", Target("flops", 40e9, False)),
        ("flops=1.5 TFLOPs", Target("flops", 1.5e12, False)),
        ("prefill=0.5s", Target("prefill", 0.5, False)),
        ("decode=25ms", Target("decode", 0.025, False)),
        ("decode=75%", Target("decode", 0.75, True)),
    ],
)
def test_what_people_write_is_read(written: str, expected: Target) -> None:
    assert target(written) == expected


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("0.8", "write WHAT=HOW_MUCH"),
        ("latency=80%", "unknown target 'latency'. Valid choices: decode, flops, parameters, prefill"),
        ("paramters=80%", "Did you mean 'parameters'?"),
        ("decode=25", "'25' is no amount of decode, such as 25ms or 80%"),
        ("decode=0ms", "is no amount of decode"),
        ("decode=0%", "is no amount of decode"),
        ("flops=40", "is no amount of flops"),
        ("flops=120%", "'120%' is no amount of flops"),
        ("parameters=many", "is no amount of parameters, such as 95M or 80%"),
        ("parameters=", "is no amount of parameters"),
    ],
)
def test_what_is_no_target_is_refused(written: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        target(written)
    with pytest.raises(UsageError, match=r"select\.target: "):
        Recipe.from_dict({"model": "m", "select": {"target": written}})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return tiny_source(folder / "model"), tiny_text(folder / "text.txt")


def recipe_with(inputs: tuple[Path, Path], written: str, **select: Any) -> Recipe:
    return Recipe.from_dict(tiny_recipe(*inputs, select={"method": "bi", "target": written, **select}))


def number_of_blocks(inputs: tuple[Path, Path], written: str) -> int:
    return len(planned(Workbench(recipe_with(inputs, written))).removed)


def test_the_folded_model_has_no_more_parameters_and_would_with_a_block_more(inputs: tuple[Path, Path]) -> None:
    model = tiny_model("llama")
    total = sum(parameter.numel() for parameter in model.parameters())
    of_block = sum(parameter.numel() for parameter in decoder_of(model).blocks[0].parameters())
    assert number_of_blocks(inputs, f"parameters={total - 2 * of_block}") == 2
    assert number_of_blocks(inputs, f"parameters={total - 2 * of_block - 1}") == 3
    recipe = recipe_with(inputs, f"parameters={(total - 1.5 * of_block) / total}")
    plan = planned(Workbench(recipe))
    assert len(plan.removed) == 2
    assert expected_parameters(recipe, model) == total - 2 * of_block
    met = plan.origin["report"]["target"]
    assert (met["num_remove"], met["what"], met["source"]) == (2, "parameters", total)


def test_operations_are_those_of_a_calibration_window(inputs: tuple[Path, Path]) -> None:
    share = flops_of(tiny_model("llama").eval(), torch.zeros(1, 32, dtype=torch.long))
    left = share.total - 1.5 * share.per_block[0]
    assert number_of_blocks(inputs, f"flops={left / 1e6}M") == 2
    assert number_of_blocks(inputs, f"flops={left / share.total}") == 2


@pytest.mark.parametrize(("written", "tokens"), [("prefill=80ms", 32), ("decode=80ms", 1), ("decode=0.8", 1)])
def test_times_are_measured_on_a_window_or_a_token(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, written: str, tokens: int
) -> None:
    def seconds_of(model: Any, ids_BT: torch.Tensor) -> Share:
        assert ids_BT.shape == (1, tokens)
        return Share("seconds", 0.1, (0.011,) * 6)

    monkeypatch.setattr(budget, "seconds_of", seconds_of)
    assert number_of_blocks(inputs, written) == 2


def test_what_cannot_be_met_or_is_already_is_refused(inputs: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"parameters=99\.9M, and .* takes no more as it is .*nothing to remove"):
        number_of_blocks(inputs, "parameters=99.9M")
    with pytest.raises(UsageError, match="no number of removed blocks, whichever they are, brings the model to 10 "):
        number_of_blocks(inputs, "parameters=10")


def test_times_of_an_offloaded_model_are_refused(inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(recipe_with(inputs, "decode=80%", method="last"))
    object.__setattr__(bench.source, "offloaded", True)
    with pytest.raises(UsageError, match="the time of bringing its weights would be measured"):
        planning.make_selection(bench, None)


def test_operations_of_an_offloaded_model_are_counted(tmp_path: Path) -> None:
    """Its embedding may be on disk, and no place for token ids."""
    place, text = tiny_source(tmp_path / "model", vocab_size=128), tiny_text(tmp_path / "text.txt")
    recipe = Recipe.from_dict(
        {**tiny_recipe(place, text, select={"method": "last", "target": "flops=70%"}), "max_memory_gb": 2e-5}
    )
    bench = Workbench(recipe)
    assert bench.source.offloaded
    assert len(planning.make_selection(bench, None).removed) >= 2


def test_a_search_that_goes_on_has_the_same_end_whatever_the_clock_says_now(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = iter([0.1, 0.05])
    monkeypatch.setattr(budget, "seconds_of", lambda *_: Share("seconds", next(times), (0.011,) * 6))
    recipe, checkpoint = recipe_with(inputs, "decode=80ms", method="last"), tmp_path / "search.json"
    with monkeypatch.context() as patched:
        patched.setattr(planning.selecting, "select", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            planning.make_selection(Workbench(recipe), None, checkpoint)
    selection = planning.make_selection(Workbench(recipe), None, checkpoint)
    assert len(selection.removed) == 2
    planning.drop_search(checkpoint)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="takes no more as it is"):
        planning.make_selection(Workbench(recipe), None, checkpoint)


def test_positions_that_stay_meet_no_target(inputs: tuple[Path, Path]) -> None:
    """They keep scales and norms, and compute as before."""
    with pytest.raises(UsageError, match=r"with share\.start zero they keep positions"):
        recipe_with(inputs, "flops=70%").changed(share={"method": "adjacent", "start": "zero"})


def test_a_budget_is_given_once(inputs: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"give select\.remove or select\.target, not both"):
        recipe_with(inputs, "parameters=80%", remove=2)
    with pytest.raises(UsageError, match=r"with select\.sublayers, select\.target can be of parameters alone"):
        recipe_with(inputs, "flops=80%", method="loo", sublayers=True)
    recipe = recipe_with(inputs, "parameters=80%")
    assert recipe.changed(select={"remove": 1}).select.target is None
    assert Recipe.from_dict(tiny_recipe(*inputs)).changed(select={"target": "flops=80%"}).select.remove is None
    with pytest.raises(UsageError, match=r"leave select\.target out"):
        Recipe.from_dict({"model": "m", "select": {"target": "flops=80%"}, "share": {"method": "auto", "size": 0.7}})


def test_rows_of_a_comparison_have_one_size(inputs: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="times differ from one measurement to the next"):
        rows_of_recipe(recipe_with(inputs, "decode=80%"))
    rows = rows_of_recipe(recipe_with(inputs, "flops=80%"))
    assert {row.recipe.select.target for row in rows} == {"flops=80%"}


def test_a_rehearsal_counts_the_blocks_of_the_real_model(inputs: tuple[Path, Path]) -> None:
    """The tiny one has other shapes, and times of its own."""
    share = flops_of(tiny_model("llama").eval(), torch.zeros(1, 32, dtype=torch.long))
    ratio = 1 - 1.5 * share.per_block[0] / share.total
    for what in ("flops", "decode"):
        row = rehearse(recipe_with(inputs, f"{what}={ratio}")).rows["run"]
        assert row.kept_block_parameters / row.block_parameters == pytest.approx(4 / 6)
    with pytest.raises(UsageError, match="a rehearsal measures no times"):
        rehearse(recipe_with(inputs, "decode=25ms"))
    with pytest.raises(UsageError, match="takes no more as it is"):
        rehearse(recipe_with(inputs, "parameters=99M"))


def test_a_row_is_rehearsed_with_the_blocks_of_the_real_model(inputs: tuple[Path, Path]) -> None:
    model = tiny_model("llama")
    total = sum(parameter.numel() for parameter in model.parameters())
    of_block = sum(parameter.numel() for parameter in decoder_of(model).blocks[0].parameters())
    written = f"parameters={total - 2 * of_block}"
    rows = {"bi": {"select": {"method": "bi", "target": written}}, "last": None}
    recipe = Recipe.from_dict(tiny_recipe(*inputs, compare={"rows": rows}))
    found = rehearse(recipe, compare=True)
    kept = {name: row.kept_block_parameters / row.block_parameters for name, row in found.rows.items()}
    assert kept == pytest.approx({"bi": 4 / 6, "last": 4 / 6})


def test_a_model_that_cannot_be_counted_is_named(tmp_path: Path) -> None:
    place, text = tiny_source(tmp_path / "model", "opt"), tiny_text(tmp_path / "text.txt")
    recipe = Recipe.from_dict(tiny_recipe(place, text, select={"method": "bi", "target": "flops=70%"}))
    with pytest.raises(UnsupportedModelError, match=r"the real opt takes cannot be counted on PyTorch's meta device"):
        rehearse(recipe)


def test_a_run_meets_its_target_and_says_how(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    result = pipeline.run(recipe_with(inputs, "parameters=75%"), tmp_path / "run")
    assert result.evaluation.ratios is not None
    assert (result.evaluation.ratios["unique_parameters"] or 1) <= 0.75
    shown = foldgpt("show", tmp_path / "run").stdout
    assert "target parameters=75%: at most" in shown


def test_on_the_command_line(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = inputs
    arguments = ("plan", model, "--text", text, "--context", 32, "--tokens", 256, "--select", "bi", "-q")
    made = foldgpt(*arguments, "--target", "parameters=75%", "--out", tmp_path / "plan.json")
    assert made.exit_code == 0, made.output
    assert FoldPlan.load(tmp_path / "plan.json").removed
    wrong = foldgpt(*arguments, "--target", "parameters=75%", "--remove", 2, "--out", tmp_path / "other.json")
    assert wrong.exit_code == 2 and "give --remove or --target, not both" in wrong.stderr


def test_the_least_that_can_be_had_is_what_is_left_with_the_largest_block() -> None:
    with pytest.raises(UsageError, match=r"for certain is 70 parameters \(70\.0%\)"):
        number_for_target(Share("parameters", 100, (10.0, 30.0, 20.0)), 60)


def test_what_goes_is_said_of_one_and_of_sublayers() -> None:
    assert what_goes(1, sublayers=False) == "1 block goes"
    assert what_goes(4, sublayers=True) == "as many parameters as 4 blocks have go"

"""What a rehearsal expects of a search: passes, windows and memory, beside what the search takes."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from foldgpt.analysis import analyze
from foldgpt.folding import source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.recipe import Recipe
from foldgpt.recovery import RecoverySettings
from foldgpt.rehearsal import expect
from foldgpt.rehearsal.fits import bytes_of_priors
from foldgpt.replay import Replay
from foldgpt.selection import RemovalCost, Request, search_passes, select
from foldgpt.selection.cost import CACHE_BYTES, num_positions
from foldgpt.workbench import Workbench
from models import tiny_config, tiny_model, token_ids
from run_inputs import planned, tiny_recipe, tiny_source, tiny_text


def test_searches_take_about_as_many_passes_as_expected(tmp_path: Path) -> None:
    source, text = tiny_source(tmp_path / "model", num_hidden_layers=12), tiny_text(tmp_path / "text.txt")
    for method in ("greedy", "loo"):
        recipe = Recipe.from_dict(tiny_recipe(source, text, compensate={"method": "none"}))
        recipe = recipe.changed(select={"method": method, "remove": 4, "num_tokens": 128})
        took = planned(Workbench(recipe)).origin["report"]["forward_equivalents"]
        assert 0.5 <= search_passes(method, Request(12, 4)) / took <= 2
    ids = token_ids(tiny_model("llama"), (8, 32))
    for method in ("greedy", "loo", "taylor", "gates"):
        for per_block in (1, 2):
            if method == "taylor" and per_block == 2:
                continue
            model = tiny_model("llama", num_hidden_layers=8)
            request = Request(8, 2, model=model, ids_WT=ids, sublayers=per_block == 2)
            took = select(method, request).report["forward_equivalents"]
            expected = search_passes(method, request)
            # Gates may end before they have spent what they may.
            assert 0.65 <= expected / took <= (3 if method == "gates" else 1.2), (method, per_block)
    greedy = search_passes("greedy", Request(12, 4))
    assert search_passes("gates", Request(12, 4)) == pytest.approx(0.45 * greedy)
    assert search_passes("gates", Request(12, 4, compensate=True)) == greedy
    # What measures no set on its way has the one that it chose measured.
    request = dataclasses.replace(request, sublayers=False, analysis=analyze(model, ids))
    for method in ("bi", "angular", "last", "random"):
        took = select(method, request).report["forward_equivalents"]
        head = RemovalCost(Replay(model, ids)).head_cost * num_positions(ids.numel()) / ids.numel()
        assert 0.65 <= search_passes(method, request, head=head) / took <= 1.5, method
    assert search_passes("bi", Request(12, 0)) == 0


def test_a_search_is_counted_on_the_windows_that_it_has(tmp_path: Path) -> None:
    """Those of the calibration, of which it measures on the first, and on one at least."""
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    plan = FoldPlan.create(source_model_of(tiny_model("llama"), name="m"), removed=[2, 3])
    searched, flops = {}, {}
    for num_tokens in (20, 100, 256, 8192):
        select = {"method": "loo", "remove": 2, "num_tokens": num_tokens}
        changes = {"dtype": "float32", "compensate": {"method": "none"}}
        recipe = Recipe.from_dict({**tiny_recipe(source, text, select=select), **changes})
        found = expect(tiny_config("llama"), recipe, plan, RecoverySettings())
        searched[num_tokens] = Workbench(recipe).selection_ids.numel()
        states = searched[num_tokens] * 7 * tiny_config("llama").hidden_size * 4
        passes = found.flops["search"] / (found.flops["analysis"] * searched[num_tokens] / 256)
        # And those that measured sets leave behind.
        assert found.memory["search"].activations == pytest.approx(states * (1 + passes))
        flops[num_tokens] = found.flops["search"]
    assert searched == {20: 32, 100: 96, 256: 256, 8192: 256}
    assert flops[8192] == flops[256] == pytest.approx(8 * flops[20])


@pytest.mark.parametrize(("compensate", "others"), [("none", 96), ("linear", 256)])
def test_states_of_finals_are_counted(tmp_path: Path, compensate: str, others: int) -> None:
    """Of 96 tokens searched and 160 more: 96 at a time, or fitted on 192 and measured on 64, and 96 for priors."""
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    plan = FoldPlan.create(source_model_of(tiny_model("llama"), name="m"), removed=[2, 3])
    select = {"method": "gates", "remove": 2, "num_tokens": 100}
    changes = {"dtype": "float32", "compensate": {"method": compensate}}
    recipe = Recipe.from_dict({**tiny_recipe(source, text, select=select), **changes})
    found = expect(tiny_config("llama"), recipe, plan, RecoverySettings())
    states = (96 + others) * 7 * tiny_config("llama").hidden_size * 4
    passes = found.flops["search"] / (found.flops["analysis"] * 96 / 256)
    assert states * passes < CACHE_BYTES
    of_priors = 96 * 7 * 32 * 4 + bytes_of_priors(tiny_model("llama"), 96) if compensate == "linear" else 0
    assert found.memory["search"].activations == pytest.approx(states * (1 + passes) + of_priors)


def test_what_a_search_keeps_of_measured_sets_is_counted(tmp_path: Path) -> None:
    """The cache may be far more than what was recorded, and has a limit."""
    model, ids = tiny_model("llama", num_hidden_layers=12), token_ids(tiny_model("llama"), (16, 32))
    request = Request(12, 4, model=model, ids_WT=ids)
    cost = request.need_cost("greedy")
    sample = cost.sample(0, len(list(cost.replay.batches())))
    for removed in itertools.combinations(range(12), 2):
        cost.cost(frozenset(removed), sample)
    kept = sum(part.nbytes for parts in cost._cache.values() for part in parts)
    recorded = sum(state.nbytes for state in cost.replay.states.values())
    assert recorded < kept <= cost.replay.num_block_calls / 12 * recorded

"""Selectors that need no search (BI, angular run, last, random), and groups of neighbours."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foldgpt.analysis import Analysis
from foldgpt.artifacts import read_json, write_json
from foldgpt.errors import ArtifactError, PlanError, UsageError
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.recipe import Recipe
from foldgpt.selection import SELECTORS, Request, Selection, Units, check_request, number_to_remove, select
from foldgpt.sharing import adjacent_groups, zero_started_groups
from models import NUM_BLOCKS, tiny_hybrid, tiny_model


def analysis_of(bi: list[float], spans: dict[int, list[float]] | None = None) -> Analysis:
    """An analysis with the given BI, and angular distances by length of the run (0.5 where not given)."""
    n = len(bi)
    angular = [(spans or {}).get(length, [0.5] * (n - length + 1)) for length in range(1, n + 1)]
    return Analysis(
        model_type="llama",
        num_blocks=n,
        num_windows=1,
        num_tokens=8,
        seconds=0.0,
        bi=bi,
        relative_update=[0.1] * n,
        cosine=[[1.0] * (n + 1)] * (n + 1),
        angular=angular,
        # Other values than those above: a selector that reads these by mistake chooses otherwise.
        angular_last_token=[[1 - i / 100 for i in range(n - length)] for length in range(n)],
    )


BI = [0.9, 0.2, 0.4, 0.1, 0.3, 0.8]


# ------------------------------------------------------------------------------------------------------ BI


@pytest.mark.parametrize("method", ["bi", "angular", "last", "random"])
def test_what_a_simple_selector_cannot_do_is_refused(method: str) -> None:
    analysis = analysis_of(BI)
    with pytest.raises(UsageError, match=f"selector '{method}' has no option 'anything'"):
        select(method, Request(num_blocks=6, num_remove=2, analysis=analysis, options={"anything": 1}))
    with pytest.raises(UsageError, match=f"selector '{method}' removes whole blocks.*gates"):
        select(method, Request(num_blocks=6, num_remove=2, analysis=analysis, sublayers=True))


@pytest.mark.parametrize("method", SELECTORS)
def test_what_no_model_can_change_is_refused_without_one(method: str) -> None:
    options = {"blocks": "1-2"} if method == "blocks" else {}
    check_request(method, Request(num_blocks=6, num_remove=2, options=options))
    with pytest.raises(UsageError, match=f"selector '{method}' has no option 'anything'"):
        check_request(method, Request(num_blocks=6, num_remove=2, options={"anything": 1}))
    with pytest.raises(UsageError, match="cannot remove 6 of 6 blocks"):
        check_request(method, Request(num_blocks=6, num_remove=6, options=options))


@pytest.mark.parametrize("seed", [-1, "one", 1.5, True])
def test_a_seed_must_be_a_whole_number(seed: Any) -> None:
    with pytest.raises(UsageError, match="whole number from 0 on"):
        select("random", Request(num_blocks=6, num_remove=2, options={"seed": seed}))


def test_bi_removes_the_least_influential_blocks() -> None:
    selection = select("bi", Request(num_blocks=6, num_remove=3, analysis=analysis_of(BI)))
    assert selection.removed == (1, 3, 4)
    assert selection.order == (3, 1, 4, 2, 5, 0)
    assert (selection.method, selection.scores) == ("bi", tuple(BI))


def test_bi_breaks_ties_by_depth() -> None:
    selection = select("bi", Request(num_blocks=5, num_remove=2, analysis=analysis_of([0.2, 0.1, 0.1, 0.3, 0.1])))
    assert selection.order == (1, 2, 4, 0, 3)
    assert selection.removed == (1, 2)


# ------------------------------------------------------------------------------------------------- angular


def test_angular_removes_the_run_with_the_smallest_distance() -> None:
    spans = {1: [0.1, 0.2, 0.3, 0.3, 0.2, 0.4], 2: [0.5, 0.4, 0.3, 0.1, 0.6], 3: [0.3, 0.2, 0.2, 0.9]}
    analysis = analysis_of(BI, spans)
    assert select("angular", Request(6, 1, analysis)).removed == (0,)
    assert select("angular", Request(6, 2, analysis)).removed == (3, 4), "a run, not the two best blocks"
    three = select("angular", Request(6, 3, analysis))
    assert three.removed == three.order == (1, 2, 3), "the first of equals"
    assert three.scores == tuple(spans[1])


def test_the_longest_run_leaves_one_block() -> None:
    analysis = analysis_of(BI, {5: [0.4, 0.3]})
    assert select("angular", Request(6, 5, analysis)).removed == (1, 2, 3, 4, 5)


# ---------------------------------------------------------------------------------------- last and random


def test_last_removes_the_deepest_blocks() -> None:
    selection = select("last", Request(num_blocks=6, num_remove=2))
    assert (selection.removed, selection.order, selection.scores) == ((4, 5), (5, 4, 3, 2, 1, 0), None)


@pytest.mark.parametrize("written", ["4,1-2", [4, "1-2"], "4, 1–2"])
def test_blocks_that_are_named_go(written: object) -> None:
    selection = select("blocks", Request(num_blocks=6, num_remove=3, options={"blocks": written}))
    assert (selection.removed, selection.order) == ((1, 2, 4), (4, 1, 2, 0, 3, 5))
    # How many they are need not be said.
    recipe = Recipe.from_dict({"model": "m", "select": {"method": "blocks", "options": {"blocks": written}}})
    assert recipe.select.remove == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"removes what its option of that name says, such as blocks=13-18"),
        ({"blocks": "1-6"}, r"there is no block 6; the last one is 5"),
        ({"blocks": "1,3"}, r"are 2, and 3 are to be removed"),
        ({"blocks": "1-2,2"}, r"block 2 stands there twice"),
        ({"blocks": "1-x"}, r"'1-x' is neither a block nor a range of them"),
        ({"blocks": "3-1"}, r"'3-1' is neither a block nor a range of them"),
        ({"blocks": True}, r"neither a block nor"),
        ({"block": "1-3"}, r"no option 'block'\. Did you mean 'blocks'"),
    ],
)
def test_blocks_that_cannot_be_named_so_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select("blocks", Request(num_blocks=6, num_remove=3, options=options))


def test_random_depends_on_the_seed_alone() -> None:
    def drawn(num_remove: int, seed: int) -> tuple[int, ...]:
        selection = select("random", Request(num_blocks=30, num_remove=num_remove, seed=seed))
        assert selection.removed == tuple(sorted(selection.order[:num_remove]))
        assert sorted(selection.order) == list(range(30)) and selection.scores is None
        return selection.removed

    assert drawn(6, seed=3) == drawn(6, seed=3)
    assert len({drawn(6, seed) for seed in range(20)}) == 20
    assert set(drawn(6, seed=3)) < set(drawn(7, seed=3)), "a larger budget goes on where a smaller one ended"


def test_random_is_the_same_on_every_machine_and_in_every_version() -> None:
    """Pinned: a plan made from a recipe must not change with a release."""
    assert select("random", Request(num_blocks=12, num_remove=4, seed=0)).removed == (2, 4, 7, 9)


def test_random_draws_every_block_equally_often() -> None:
    counts = [0] * 10
    for seed in range(600):
        for block in select("random", Request(num_blocks=10, num_remove=3, seed=seed)).removed:
            counts[block] += 1
    # 180 each, with a standard deviation of 11; five of those is never exceeded by chance.
    assert all(125 < count < 235 for count in counts), counts


def test_random_draws_uniformly_among_what_may_go_where_blocks_read_from_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Block 3 reads from block 1, which may go once 3 is gone, and then as likely as any other."""
    units = replace(Units.blocks(5, 2), read_blocks=((3, 1),))
    monkeypatch.setattr(Units, "blocks", lambda *_: units)
    orders = [select("random", Request(num_blocks=5, num_remove=2, seed=seed)).order for seed in range(6000)]
    assert {order[0] for order in orders} == {0, 2, 3, 4}
    second = Counter(order[1] for order in orders if order[0] == 3)
    # A quarter of about 1,500 each, with a standard deviation of 17.
    assert second.keys() == {0, 1, 2, 4} and all(330 < count < 460 for count in second.values()), second
    assert Counter(order[1] for order in orders if order[0] != 3).keys() == {0, 2, 3, 4}


# ------------------------------------------------------------------------- models in which few blocks attend


@pytest.mark.parametrize(("method", "num_remove"), [("last", 4), ("bi", 2), ("angular", 2)])
def test_a_set_that_cannot_be_folded_is_refused_in_the_words_of_the_fold(method: str, num_remove: int) -> None:
    analysis = analysis_of(BI, {2: [0.5, 0.4, 0.1, 0.3, 0.6]})
    request = Request(num_blocks=6, num_remove=num_remove, analysis=analysis, model=tiny_hybrid(3))
    chosen = select(method, replace(request, model=None)).removed
    assert 3 in chosen, "without a model nothing is known of its blocks"
    with pytest.raises(PlanError) as of_the_fold:
        fold_(tiny_hybrid(3), FoldPlan.create(source_model_of(tiny_hybrid(3)), removed=chosen))
    with pytest.raises(PlanError, match=r"cannot remove all blocks that attend.* Keep at least one of \[3\]") as found:
        select(method, request)
    assert str(found.value) == str(of_the_fold.value)
    # Another block that attends is enough.
    assert select(method, replace(request, model=tiny_hybrid(0, 3))).removed == chosen


@pytest.mark.parametrize("num_remove", range(6))
def test_random_draws_sets_that_can_be_folded(num_remove: int) -> None:
    model = tiny_hybrid(1, 4)
    source = source_model_of(model)
    drawn = [select("random", Request(6, num_remove, model=model, seed=seed)) for seed in range(30)]
    for selection in drawn:
        assert len(selection.removed) == num_remove and not {1, 4} <= set(selection.removed)
        assert selection.removed == tuple(sorted(selection.order[:num_remove]))
        assert sorted(selection.order) == list(range(6))
    fold_(model, FoldPlan.create(source, removed=drawn[0].removed))
    # Where all blocks attend, a model changes nothing.
    llama = tiny_model("llama")
    for seed in range(5):
        request = Request(NUM_BLOCKS, num_remove, seed=seed)
        assert select("random", replace(request, model=llama)) == select("random", request)


# ----------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("method", ["bi", "angular", "last", "random"])
def test_nothing_to_remove_removes_nothing(method: str) -> None:
    assert select(method, Request(num_blocks=6, num_remove=0, analysis=analysis_of(BI))).removed == ()


@pytest.mark.parametrize("method", ["bi", "angular", "last", "random"])
@pytest.mark.parametrize("num_remove", [-1, 6, 7])
def test_a_number_that_cannot_be_removed_is_refused(method: str, num_remove: int) -> None:
    message = f"cannot remove {num_remove} of 6 blocks; a number from 0 to 5 leaves at least one"
    with pytest.raises(UsageError, match=re.escape(message)):
        select(method, Request(num_blocks=6, num_remove=num_remove, analysis=analysis_of(BI)))


@pytest.mark.parametrize("method", ["bi", "angular"])
def test_an_analysis_that_is_missing_or_of_another_model_is_refused(method: str) -> None:
    with pytest.raises(UsageError, match=f"selector '{method}' reads an analysis; run `foldgpt analyze` first"):
        select(method, Request(num_blocks=6, num_remove=1))
    with pytest.raises(UsageError, match="analysis is of a model with 6 blocks, this one has 8"):
        select(method, Request(num_blocks=8, num_remove=1, analysis=analysis_of(BI)))


def test_an_unknown_selector_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"unknown selector 'angualr'\. Did you mean 'angular'\?"):
        select("angualr", Request(num_blocks=6, num_remove=1))
    assert {"bi", "angular", "last", "random"} <= set(SELECTORS)


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"remove": 3, "ratio": None}, 3),
        ({"remove": 0, "ratio": None}, 0),
        ({"remove": None, "ratio": None}, 0),
        ({"remove": None, "ratio": 0.25}, 8),
        ({"remove": None, "ratio": 0.2}, 6),
        ({"remove": None, "ratio": 0.01}, 0),
    ],
)
def test_a_ratio_is_of_all_blocks(options: dict[str, Any], number: int) -> None:
    assert number_to_remove(30, **options) == number


# -------------------------------------------------------------------------------------------- adjacent groups


def blocks_of(groups: tuple[Group, ...]) -> list[tuple[int, ...]]:
    return [group.blocks for group in groups]


def test_neighbours_share_and_leftovers_stay_alone() -> None:
    decoder = decoder_of(tiny_model("llama"))
    assert blocks_of(adjacent_groups(decoder, range(6), size=2)) == [(0, 1), (2, 3), (4, 5)]
    assert blocks_of(adjacent_groups(decoder, range(6), size=4)) == [(0, 1, 2, 3)]
    assert adjacent_groups(decoder, range(6), size=7) == ()


def test_neighbours_are_so_among_the_kept() -> None:
    decoder = decoder_of(tiny_model("llama"))
    assert blocks_of(adjacent_groups(decoder, (0, 3, 4, 5), size=2)) == [(0, 3), (4, 5)]


def test_a_group_says_what_it_was_asked_for() -> None:
    decoder = decoder_of(tiny_model("llama"))
    (group,) = adjacent_groups(decoder, (1, 2), size=2, sublayers=("mlp",), donor="mean", rank=3, scales=True)
    private = ("norms", "scales")
    assert group == Group(blocks=(1, 2), sublayers=("mlp",), donor="mean", private=private, ranks=3)


@pytest.mark.parametrize(
    ("family", "sublayers", "groups"),
    [
        # gemma3: sliding, sliding, full, twice; only the attention cares.
        ("gemma3", ("attention", "mlp"), [(0, 1), (3, 4)]),
        ("gemma3", ("attention",), [(0, 1), (3, 4)]),
        ("gemma3", ("mlp",), [(0, 1), (2, 3), (4, 5)]),
        # qwen3_moe: blocks 3 and 5 are sparse, the others dense; only the MLP cares.
        ("qwen3_moe", ("attention", "mlp"), [(0, 1)]),
        ("qwen3_moe", ("attention",), [(0, 1), (2, 3), (4, 5)]),
        # smollm3: blocks 2 and 5 are without rotary embedding.
        ("smollm3", ("attention", "mlp"), [(0, 1), (3, 4)]),
    ],
)
def test_another_kind_ends_a_run(family: str, sublayers: Any, groups: list[tuple[int, ...]]) -> None:
    model = tiny_model(family)
    found = adjacent_groups(decoder_of(model), range(NUM_BLOCKS), size=2, sublayers=sublayers)
    assert blocks_of(found) == groups
    fold_(model, FoldPlan.create(source_model_of(model), groups=found))


def test_a_run_that_was_cut_short_begins_again() -> None:
    """Sizes of three: the sliding blocks 0 and 1 are too few, and must not be joined with 3."""
    decoder = decoder_of(tiny_model("gemma3"))
    assert adjacent_groups(decoder, range(6), size=3) == ()
    assert blocks_of(adjacent_groups(decoder, (0, 1, 3, 4), size=3)) == [(0, 1, 3)]


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(UsageError, match="a group needs at least 2 blocks, got --group-size 1"):
        adjacent_groups(decoder_of(tiny_model("llama")), range(6), size=1)


# ------------------------------------------------------------------------------------ positions that start at zero


def test_removed_blocks_borrow_from_the_nearest_kept_one() -> None:
    decoder = decoder_of(tiny_model("llama"))
    one, other = zero_started_groups(decoder, (0, 3, 5), (1, 2, 4), rank=2)
    assert (one.blocks, one.owner, one.started_at_zero) == ((0, 1), 0, (1,))
    # Block 4 lies between two; the earlier one lends.
    assert (other.blocks, other.owner, other.started_at_zero) == ((2, 3, 4), 3, (2, 4))
    assert {group.rank_of("mlp.up_proj", block) for group in (one, other) for block in group.started_at_zero} == {2}


def test_only_blocks_of_one_kind_lend_to_each_other() -> None:
    """gemma3: sliding, sliding, full, twice. Block 2 has no other full one among the kept."""
    decoder = decoder_of(tiny_model("gemma3"))
    assert blocks_of(zero_started_groups(decoder, (0, 3, 4), (1, 2, 5))) == [(0, 1)]
    assert blocks_of(zero_started_groups(decoder, (0, 3, 4, 5), (1, 2))) == [(0, 1), (2, 5)]
    assert blocks_of(zero_started_groups(decoder, (0, 3, 4), (1, 2, 5), sublayers=("mlp",))) == [(0, 1), (2, 3), (4, 5)]


# --------------------------------------------------------------------------------------------- on disk


def test_a_selection_is_the_same_read_back(tmp_path: Path) -> None:
    selection = Selection("gates", (0.5, 1.0), (1, 0), (1,), removed_mlp=(0,), report={"seconds": 1.5, "path": [[1]]})
    write_json(tmp_path / "selection.json", selection.to_json_dict())
    assert Selection.from_json_dict(read_json(tmp_path / "selection.json")) == selection
    plain = select("last", Request(num_blocks=6, num_remove=2))
    assert Selection.from_json_dict(plain.to_json_dict()) == plain


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "not a selection"),
        ({"format": "foldgpt.plan", "version": 1}, "not a selection"),
        ({**Selection("last", None, (1,), (1,)).to_json_dict(), "removed": ["x"]}, "invalid selection: removed.0"),
    ],
)
def test_what_is_no_selection_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Selection.from_json_dict(value)

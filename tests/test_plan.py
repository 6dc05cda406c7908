"""FoldPlan: every invariant, what is said when one is broken, and the file that a person edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pydantic
import pytest

from foldgpt.errors import ArtifactError, PlanError
from foldgpt.plan import Compensation, FoldPlan, Group, SourceModel

SOURCE = SourceModel(model="somebody/model", revision="main", model_type="llama", num_blocks=6)
PAIR = {"blocks": [2, 3]}


def plan_values(**changes: Any) -> dict[str, Any]:
    """A valid plan as JSON values, with some changed."""
    return {"source": SOURCE.model_dump(), "kept": [0, 2, 3, 4], "removed": [1, 5], **changes}


def test_create_keeps_what_is_not_removed() -> None:
    plan = FoldPlan.create(SOURCE, removed=[5, 1, 5], removed_mlp=[4], groups=[Group(blocks=(2, 3))])
    assert (plan.kept, plan.removed, plan.removed_mlp) == ((0, 2, 3, 4), (1, 5), (4,))
    assert plan.position_of == {0: 0, 2: 1, 3: 2, 4: 3}
    group = plan.groups[0]
    assert (group.sublayers, group.donor, group.private) == (("attention", "mlp"), "first", ("norms",))


@pytest.mark.parametrize(
    ("parts", "removal_only"),
    [
        ({}, True),
        ({"removed": [1]}, True),
        ({"removed_attention": [1]}, False),
        ({"removed_mlp": [1]}, False),
        ({"groups": [Group(blocks=(0, 1))]}, False),
    ],
)
def test_what_a_plan_amounts_to(parts: dict[str, Any], removal_only: bool) -> None:
    plan = FoldPlan.create(SOURCE, **parts)
    assert plan.is_removal_only == removal_only


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    pair = Group(blocks=(numpy.int64(2), 3))
    plan = FoldPlan.create(SOURCE, removed=list(numpy.argsort([3, 1, 2])[:1]), groups=[pair])
    assert plan.removed == (1,) and type(plan.removed[0]) is int and plan.groups[0].blocks == (2, 3)


def test_a_plan_is_frozen() -> None:
    plan = FoldPlan.create(SOURCE)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        plan.kept = (0,)  # type: ignore[misc]


# ----------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": [2, 0, 3, 4]}, "kept must be increasing and distinct, got [2, 0, 3, 4]"),
        ({"kept": ["0", 2, 3, 4]}, "kept.0: Input should be a valid integer (got '0')"),
        ({"removed": [1, True]}, "removed.1: Input should be a valid integer (got True)"),
        ({"groups": [{"blocks": [0, 2.0]}]}, "groups.0.blocks.1: Input should be a valid integer (got 2.0)"),
        (
            {"compensation": {"texts": ["x"], "context": 2, "num_tokens": 2, "fingerprint": "x", "ridge": -1}},
            "compensation.ridge: a penalty is a number from 0, or 'auto'; got -1",
        ),
        ({"removed": [1, 1, 5]}, "removed must be increasing and distinct, got [1, 1, 5]"),
        ({"removed_attention": [3, 2]}, "removed_attention must be increasing and distinct, got [3, 2]"),
        ({"removed_mlp": [3, 3]}, "removed_mlp must be increasing and distinct, got [3, 3]"),
        ({"removed": [1, 5, 6]}, "removed names block 6, but the model has blocks 0 to 5"),
        ({"kept": [-1, 0, 2, 3, 4]}, "kept names block -1, but the model has blocks 0 to 5"),
        ({"removed_mlp": [9]}, "removed_mlp names block 9, but the model has blocks 0 to 5"),
        ({"kept": [0, 1, 2, 3, 4]}, "blocks [1] are both kept and removed"),
        ({"kept": [0, 4]}, "blocks [2, 3] are neither kept nor removed"),
        ({"kept": [], "removed": [0, 1, 2, 3, 4, 5]}, "every block is removed (all 6); a model needs at least one"),
        ({"removed_attention": [1, 2]}, "removed_attention names blocks [1], which are removed whole"),
        ({"removed_mlp": [5]}, "removed_mlp names blocks [5], which are removed whole"),
        (
            {"removed_attention": [2, 3], "removed_mlp": [3]},
            "blocks [3] lose attention and MLP both; list them under removed instead",
        ),
        ({"groups": [{"blocks": [0, 1]}]}, "group [0, 1] holds block 1, which is not kept"),
        ({"groups": [{"blocks": [4, 7]}]}, "group [4, 7] holds block 7, which is not kept"),
        (
            {"groups": [{"blocks": [0, 2]}, {"blocks": [2, 3]}]},
            "groups [0, 2] and [2, 3] both share the attention of block 2",
        ),
        (
            {"groups": [PAIR, {"blocks": [3, 4], "sublayers": ["mlp"]}]},
            "groups [2, 3] and [3, 4] both share the mlp of block 3",
        ),
        ({"groups": [PAIR], "removed_attention": [3]}, "group [2, 3] shares the removed attention of block 3"),
        (
            {"groups": [{**PAIR, "sublayers": ["mlp"]}], "removed_mlp": [2]},
            "group [2, 3] shares the removed mlp of block 2",
        ),
        ({"groups": [{"blocks": [3, 2]}]}, "groups.0: blocks of a group must be increasing and distinct, got [3, 2]"),
        ({"groups": [{"blocks": [2, 2]}]}, "groups.0: blocks of a group must be increasing and distinct, got [2, 2]"),
        ({"groups": [{"blocks": [2]}]}, "groups.0.blocks: Tuple should have at least 2 items"),
        ({"groups": [{**PAIR, "sublayers": []}]}, "groups.0.sublayers: Tuple should have at least 1 item"),
        (
            {"groups": [{**PAIR, "sublayers": ["mlp", "mlp"]}]},
            "groups.0: sublayers of group [2, 3] are named twice: ['mlp', 'mlp']",
        ),
        (
            {"groups": [{**PAIR, "donor": "meen"}]},
            "groups.0.donor: Input should be 'first', 'last', 'owner', 'mean' or 'least_squares' (got 'meen'). Did you "
            "mean 'mean'?",
        ),
        (
            {"groups": [{**PAIR, "sublayers": ["ffn"]}]},
            "groups.0.sublayers.0: Input should be 'attention' or 'mlp' (got 'ffn')",
        ),
        # Norms are always private: a file that says otherwise would not be obeyed.
        (
            {"groups": [{**PAIR, "private": []}]},
            "groups.0: norms are private in every group, so private of group [2, 3]",
        ),
        (
            {"groups": [{**PAIR, "private": ["norms", "biases"]}]},
            "groups.0.private.1: Input should be 'norms' or 'scales' (got 'biases')",
        ),
        (
            {"groups": [{**PAIR, "private": ["norms", "norms"]}]},
            "groups.0: private of group [2, 3] are named twice: ['norms', 'norms']",
        ),
        ({"groups": [{**PAIR, "donor": "owner"}]}, "owner of group [2, 3] must be one of its blocks, got None"),
        (
            {"groups": [{**PAIR, "donor": "owner", "owner": 4}]},
            "owner of group [2, 3] must be one of its blocks, got 4",
        ),
        ({"groups": [{**PAIR, "donor": "mean", "owner": 2}]}, "group [2, 3] has owner 2 and donor 'mean'; only donor"),
        (
            {"groups": [{**PAIR, "donor": "mean", "start": "zero", "private": ["norms", "scales"]}]},
            "group [2, 3] starts at zero, so one member must give its weights: donor 'first', 'last' or 'owner', not",
        ),
        (
            {"groups": [{**PAIR, "start": "zero"}]},
            "group [2, 3] starts at zero, and what begins at 0 are the scales: name them in private",
        ),
        ({"groups": [{**PAIR, "start": "soft"}]}, "groups.0.start: Input should be 'hard' or 'zero' (got 'soft')"),
        ({"groups": [{**PAIR, "donor": "mean", "norms": "owner"}]}, "group [2, 3] has donor 'mean'; no member's norms"),
        (
            {"groups": [{**PAIR, "donor": "mean", "ranks": {"mlp.up_proj": [1, 2, 3]}}]},
            "group [2, 3] has 2 members, but 3 ranks for mlp.up_proj",
        ),
        (
            {"groups": [{**PAIR, "donor": "last", "ranks": {"mlp.up_proj": [1, 2]}}]},
            "block 3 gives group [2, 3] its weights and needs no low-rank term: its rank for mlp.up_proj must be 0",
        ),
        ({"groups": [{**PAIR, "ranks": -1}]}, "groups.0.ranks"),
        ({"source": {**SOURCE.model_dump(), "num_blocks": 0}}, "source.num_blocks: Input should be greater than"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_a_broken_invariant_is_named(changes: dict[str, Any], message: str) -> None:
    FoldPlan.from_json_dict(plan_values())
    with pytest.raises(PlanError) as caught:
        FoldPlan.from_json_dict(plan_values(**changes), "edited.json")
    assert str(caught.value).startswith("edited.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_which_sublayer_a_kept_block_lacks() -> None:
    plan = FoldPlan.create(SOURCE, removed=[1], removed_attention=[0, 3], removed_mlp=[2])
    assert plan.absent_sublayers == {0: "attention", 2: "mlp", 3: "attention"}
    assert FoldPlan.create(SOURCE, removed=[1]).absent_sublayers == {}


def test_attention_and_mlp_may_be_shared_in_different_groups() -> None:
    groups = [Group(blocks=(0, 2), sublayers=("attention",)), Group(blocks=(2, 3), sublayers=("mlp",))]
    plan = FoldPlan.create(SOURCE, groups=groups, removed_mlp=[0], removed_attention=[3])
    assert plan.groups == tuple(groups)


@pytest.mark.parametrize(
    ("options", "giver", "holder", "fitted"),
    [
        ({"donor": "first"}, 1, 1, (2, 4)),
        ({"donor": "last"}, 4, 4, (1, 2)),
        ({"donor": "owner", "owner": 2}, 2, 2, (1, 4)),
        ({"donor": "mean"}, None, 1, (1, 2, 4)),
        ({"donor": "least_squares"}, None, 1, (1, 2, 4)),
    ],
    ids=str,
)
def test_who_gives_the_weights_of_a_group_has_no_private_terms(
    options: dict[str, Any], giver: int | None, holder: int, fitted: tuple[int, ...]
) -> None:
    group = Group(blocks=(1, 2, 4), ranks=3, **options)
    assert (group.giver, group.holder, group.fitted_members, group.started_at_zero) == (giver, holder, fitted, ())
    assert [group.rank_of("mlp.up_proj", block) for block in (1, 2, 4)] == [3 * (b in fitted) for b in (1, 2, 4)]


def test_ranks_may_differ_by_leaf_and_member() -> None:
    group = Group(blocks=(1, 2), donor="mean", ranks={"self_attn.q_proj": 4, "mlp.up_proj": (0, 8)})
    leaves = ("self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj")
    assert [group.rank_of(leaf, block) for leaf in leaves for block in (1, 2)] == [4, 4, 0, 8, 0, 0]
    plan = FoldPlan.create(SOURCE, groups=[group])
    assert FoldPlan.from_json_dict(json.loads(json.dumps(plan.to_json_dict()))) == plan


def test_what_starts_at_zero_has_a_position_and_counts_as_removed_at_the_start() -> None:
    zero = {"start": "zero", "private": ("norms", "scales")}
    groups = [
        Group(blocks=(0, 1, 2), donor="owner", owner=1, **zero),
        Group(blocks=(3, 4), donor="last", sublayers=("mlp",), **zero),
        Group(blocks=(3, 4), donor="mean", sublayers=("attention",)),
    ]
    plan = FoldPlan.create(SOURCE, removed=[5], groups=groups)
    assert plan.kept == (0, 1, 2, 3, 4) and plan.position_of[2] == 2
    assert groups[0].started_at_zero == (0, 2) and groups[1].started_at_zero == (3,)
    start = plan.at_start
    assert (start.kept, start.removed) == ((1, 3, 4), (0, 2, 5))
    assert (start.removed_attention, start.removed_mlp) == ((), (3,))
    assert start.groups == (groups[2],)
    assert not plan.is_removal_only


def test_removing_every_block_is_refused() -> None:
    with pytest.raises(PlanError, match="every block is removed"):
        FoldPlan.create(SOURCE, removed=range(6))


# ------------------------------------------------------------------------------------------------- the file


def test_a_plan_survives_json(tmp_path: Path) -> None:
    plan = FoldPlan.create(
        SOURCE,
        removed=[0],
        removed_attention=[4],
        removed_mlp=[5],
        groups=[Group(blocks=(1, 2, 3), sublayers=("mlp",), donor="mean")],
        origin={"selector": "bi", "scores": [0.25, 1e-9], "note": "naïve"},
    )
    plan.save(tmp_path / "plan.json")
    assert FoldPlan.load(tmp_path / "plan.json") == plan
    assert FoldPlan.load(tmp_path) == plan, "a folder stands for the plan inside it"
    assert FoldPlan.from_json_dict(plan.to_json_dict()) == plan
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert (written["format"], written["version"]) == ("foldgpt.plan", 2)
    assert written["kept"] == [1, 2, 3, 4, 5]


def test_a_plan_of_version_1_is_upgraded(tmp_path: Path) -> None:
    """A file as the first version of the format wrote it."""
    group = {"blocks": [2, 3], "sublayers": ["attention", "mlp"], "donor": "last", "private": ["norms"]}
    calibration = {"texts": ["text.txt"], "context": 8, "num_tokens": 64, "seed": 1, "fingerprint": "f"}
    options = {"method": "linear", "features": "inner", "ridge": "auto", "rounds": 3}
    value = plan_values(format="foldgpt.plan", version=1, groups=[group], compensation={**options, **calibration})
    (tmp_path / "plan.json").write_text(json.dumps(value))
    plan = FoldPlan.load(tmp_path)
    assert plan == FoldPlan.create(
        SOURCE,
        removed=[1, 5],
        groups=[Group(blocks=(2, 3), donor="last")],
        compensation=Compensation(**calibration),
    )
    assert plan.to_json_dict()["version"] == 2
    assert plan.groups[0].start == "hard" and plan.groups[0].ranks == 0


def test_a_hand_edited_file_counts_as_it_stands(tmp_path: Path) -> None:
    FoldPlan.create(SOURCE, removed=[1, 5]).save(tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text())
    value["kept"].remove(4)
    value["removed"].insert(1, 4)
    value["groups"].append({"blocks": [2, 3], "donor": "mean"})
    (tmp_path / "plan.json").write_text(json.dumps(value))
    edited = FoldPlan.load(tmp_path / "plan.json")
    assert edited == FoldPlan.create(SOURCE, removed=[1, 4, 5], groups=[Group(blocks=(2, 3), donor="mean")])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"kpet": [0]}, "kpet: unknown key. Did you mean 'kept'?"),
        (
            {"groups": [{"block": [2, 3]}]},
            "groups.0.blocks: is missing; groups.0.block: unknown key. Did you mean 'blocks'?",
        ),
        ({"kept": [0, 2, "three", 4]}, "kept.2: Input should be a valid integer"),
        ({"kept": [0, 2.5, 3, 4]}, "kept.1: Input should be a valid integer"),
        ({"kept": None}, "kept: must be a list (got None)"),
        ({"source": "somebody/model"}, "source: must hold keys and values (got 'somebody/model')"),
        (
            {"groups": [{"blocks": [2, 3], "ranks": {"mlp.up_proj": [4, -1]}}]},
            "groups.0.ranks: a rank is a whole number from 0; give one for all layers, or for each layer by name one "
            "or a list of one for each block, got {'mlp.up_proj': [4, -1]}",
        ),
        ({"version": 3}, "plan of version 3, but this foldgpt reads versions up to 2"),
        ({"version": "1.1"}, "plan of version '1.1', but this foldgpt reads versions up to 2"),
        ({"format": "foldgpt.analysis"}, "not a plan: its 'format' is 'foldgpt.analysis', expected 'foldgpt.plan'"),
    ],
    ids=str,
)
def test_a_wrong_edit_is_named_with_its_place(edit: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_values(**edit)))
    with pytest.raises(PlanError) as caught:
        FoldPlan.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(PlanError, match=r"kept: is missing; removed\.0: .*; extra: unknown key"):
        FoldPlan.from_json_dict({"source": SOURCE.model_dump(), "removed": ["x"], "extra": 1})


def test_a_file_that_holds_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[1, 2]")
    with pytest.raises(PlanError, match="must hold keys and values"):
        FoldPlan.load(tmp_path / "plan.json")


def test_a_file_that_is_not_json_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"kept": [0, 1],\n "removed": [2,]}')
    with pytest.raises(ArtifactError, match=r"the plan .*plan\.json is not valid JSON: .* at line 2, column \d+"):
        FoldPlan.load(tmp_path / "plan.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"plan not found: .*plan\.json"):
        FoldPlan.load(tmp_path)

"""Recipe: one strict value for a whole run, and errors that say where and what was meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from foldgpt.artifacts import hash_of
from foldgpt.errors import ArtifactError, UsageError
from foldgpt.recipe import Recipe

EXAMPLE = """
model: demo:smollm2-135m
calibration:
  texts: [a.txt, b.jsonl]
  num_tokens: 4096
select: {method: random, remove: 6}
share:
  method: adjacent
  group_size: 3
  sublayers: [mlp]
evaluate:
  texts: []
  max_windows: null
seed: 7
"""


def test_yaml_is_read_and_the_rest_is_default(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(EXAMPLE)
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert (recipe.model, recipe.seed) == ("demo:smollm2-135m", 7)
    assert (recipe.calibration.texts, recipe.calibration.num_tokens) == (["a.txt", "b.jsonl"], 4096)
    assert recipe.calibration.context == Recipe(model="x").calibration.context
    assert (recipe.select.method, recipe.select.remove, recipe.select.remove_ratio) == ("random", 6, None)
    assert (recipe.share.group_size, recipe.share.sublayers) == (3, ["mlp"])
    assert (recipe.evaluate.texts, recipe.evaluate.max_windows) == ([], None)


def test_a_saved_recipe_spells_out_every_default_and_reads_back(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text(EXAMPLE)
    recipe = Recipe.load(tmp_path / "short.yaml")
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert set(written) == set(Recipe.model_fields)
    assert written["calibration"]["context"] == recipe.calibration.context
    assert next(iter(written)) == "model", "in the order in which a reader wants it"


def test_tokens_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: x\ncalibration: {num_tokens: 64k}\nrecover: {num_tokens: 2M, held_out_tokens: 1e4}\n"
    )
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert (recipe.calibration.num_tokens, recipe.recover.num_tokens) == (64_000, 2_000_000)
    assert recipe.recover.held_out_tokens == 10_000
    with pytest.raises(UsageError, match=r"recover\.num_tokens: '2Q' is not a count"):
        Recipe.from_dict({"model": "x", "recover": {"num_tokens": "2Q"}})


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe(model="x")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.select.remove = 1  # type: ignore[misc]


def test_every_field_is_documented_in_the_schema() -> None:
    schema = Recipe.model_json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    bare = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, value in section.get("properties", {}).items()
        if not (value.get("description") or schema["$defs"][value["$ref"].rpartition("/")[2]].get("description"))
    ]
    assert not bare
    assert all(section["additionalProperties"] is False for section in sections.values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "model: is missing"),
        ({"modle": "x", "model": "x"}, "modle: unknown key. Did you mean 'model'?"),
        ({"model": "x", "selct": {}}, "selct: unknown key. Did you mean 'select'?"),
        ({"model": "x", "calibration": {"contxt": 3}}, "calibration.contxt: unknown key. Did you mean 'context'?"),
        ({"model": "x", "share": {"goup_size": 3}}, "share.goup_size: unknown key. Did you mean 'group_size'?"),
        ({"model": "x", "evaluate": {"zzz": 3}}, "Valid choices: context, "),
        # Strict: a string is not a number, and a number is not a flag.
        ({"model": 3}, "model: Input should be a valid string (got 3)"),
        ({"model": "x", "calibration": {"context": "512"}}, "calibration.context: Input should be a valid integer"),
        ({"model": "x", "calibration": {"context": 512.0}}, "calibration.context: Input should be a valid integer"),
        ({"model": "x", "seed": True}, "seed: Input should be a valid integer (got True)"),
        ({"model": "x", "evaluate": {"speed": 1}}, "evaluate.speed: Input should be a valid boolean (got 1)"),
        (
            {"model": "x", "calibration": {"texts": "a.txt"}},
            "calibration.texts: must be a list (got 'a.txt')",
        ),
        ({"model": "x", "calibration": None}, "calibration: must hold keys and values (got None)"),
        # Ranges.
        ({"model": "x", "calibration": {"texts": []}}, "calibration.texts: List should have at least 1 item"),
        ({"model": "x", "calibration": {"context": 1}}, "calibration.context: Input should be greater than or equal"),
        ({"model": "x", "select": {"remove": -1}}, "select.remove: Input should be greater than or equal to 0"),
        ({"model": "x", "select": {"remove_ratio": 1}}, "select.remove_ratio: Input should be less than 1"),
        ({"model": "x", "share": {"group_size": 1}}, "share.group_size: Input should be greater than or equal to 2"),
        ({"model": "x", "max_memory_gb": 0}, "max_memory_gb: Input should be greater than 0"),
        # Choices, and values that contradict each other.
        ({"model": "x", "dtype": "float8"}, "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"model": "x", "share": {"sublayers": ["ffn"]}}, "share.sublayers.0: Input should be 'attention' or 'mlp'"),
        (
            {"model": "x", "select": {"remove": 1, "remove_ratio": 0.5}},
            "give select.remove or select.remove_ratio, not both",
        ),
        ({"model": "x", "recover": {"minutes": float("inf")}}, "recover.minutes: Input should be a finite number"),
        (
            {"model": "x", "share": {"donor": "mean"}},
            "share.donor says how blocks share weights, but share.method is none",
        ),
        ({"model": "x", "share": {"group_size": 3}}, "share.group_size says how blocks share weights"),
        (
            {"model": "x", "share": {"method": "adjacent", "sublayers": ["mlp", "mlp"]}},
            "share: sublayers are named twice: ['mlp', 'mlp']",
        ),
        ({"model": "x", "evaluate": {"limit": 5}}, "evaluate.limit is for tasks, and there are none"),
        ({"model": "x", "evaluate": {"data_dir": "d"}}, "evaluate.data_dir is for tasks, and there are none"),
        ({"model": "x", "evaluate": {"texts": [], "stride": 8}}, "evaluate.stride is for texts, and there are none"),
        (
            {"model": "x", "evaluate": {"stride": 513}},
            "evaluate.stride is 513, more than the context, and would pass over tokens: give at most 512",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:50],
)
def test_a_wrong_value_is_named_with_its_place(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        Recipe.from_dict(value, "recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml: ")


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"seed: .*; calibration\.context: "):
        Recipe.from_dict({"model": "x", "seed": "one", "calibration": {"context": 0}})


def test_a_stride_may_be_as_long_as_the_context() -> None:
    assert Recipe.from_dict({"model": "x", "evaluate": {"context": 64, "stride": 64}}).evaluate.stride == 64


def test_whole_numbers_do_for_fractions() -> None:
    recipe = Recipe.from_dict({"model": "x", "max_memory_gb": 8, "select": {"remove_ratio": 0}})
    assert (recipe.max_memory_gb, recipe.select.remove_ratio) == (8.0, 0.0)


# --------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: x\nselect: {method: bi\nseed: 1\n", r"is not valid YAML: .* at line \d+, column \d+"),
        ("model: x\n\tseed: 1\n", r"is not valid YAML: .* at line 2, column 1"),
        ("model: x\nseed: 2024-13-45\n", r"'2024-13-45' is no timestamp; put text in quotes at line 2, column 7"),
        ("model: x\nseed: !!int one\n", r"'one' is no int; put text in quotes at line 2, column 7"),
        ("- model\n", "must be a mapping of keys to values, such as `model: "),
        ("", "must be a mapping of keys to values"),
        ("model: x\nselct: {}\n", r"recipe\.yaml: selct: unknown key\. Did you mean 'select'"),
        ("model: !!python/object/apply:os.getcwd []\n", "is not valid YAML: could not determine a constructor"),
        ("model: " + "[" * 5000, "is not valid YAML: brackets in brackets without end"),
    ],
)
def test_a_file_that_is_no_recipe_is_a_usage_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        Recipe.load(tmp_path / "recipe.yaml")
    assert str(tmp_path / "recipe.yaml") in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"recipe not found: .*recipe\.yaml"):
        Recipe.load(tmp_path / "recipe.yaml")
    with pytest.raises(ArtifactError, match="cannot read the recipe"):
        Recipe.load(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ArtifactError, match="cannot read the recipe"):
        Recipe.load(tmp_path / "recipe.yaml")


# ------------------------------------------------------------------------------------------------- changes


def test_changed_leaves_alone_what_is_none() -> None:
    recipe = Recipe.from_dict({"model": "x", "seed": 3, "select": {"method": "random", "remove": 2}})
    changed = recipe.changed(seed=None, dtype="float32", select={"remove": 4, "method": None}, evaluate={"context": 64})
    assert (changed.model, changed.seed, changed.dtype) == ("x", 3, "float32")
    assert (changed.select.method, changed.select.remove, changed.evaluate.context) == ("random", 4, 64)
    assert (recipe.dtype, recipe.select.remove) == ("auto", 2), "the recipe itself is as it was"


def test_changed_values_are_validated() -> None:
    recipe = Recipe(model="x")
    with pytest.raises(UsageError, match=r"calibration\.contxt: unknown key\. Did you mean 'context'"):
        recipe.changed(calibration={"contxt": 3})
    with pytest.raises(UsageError, match=r"share\.group_size"):
        recipe.changed(share={"group_size": 1})


def test_equal_recipes_have_equal_hashes() -> None:
    """A run folder is known by the hash of its recipe: defaults that are spelled out change nothing."""
    short, long = Recipe(model="x"), Recipe.from_dict({"seed": 0, "share": {"method": "none"}, "model": "x"})
    assert hash_of(short.model_dump(mode="json")) == hash_of(long.model_dump(mode="json"))
    assert hash_of(short.model_dump(mode="json")) != hash_of(short.changed(seed=1).model_dump(mode="json"))


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a\nselect:\n  remove: 3\n  remove: 6\n")
    with pytest.raises(UsageError, match=r"the key 'remove' is given twice at line 4"):
        Recipe.load(path)


def test_a_key_that_is_no_word_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 1\nmodel: {{ MODEL }}\n")
    with pytest.raises(UsageError, match=r"cannot be a key; put text with braces in quotes at line 2"):
        Recipe.load(path)


def test_yaml_merge_keys_work(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: a\ncompare:\n  rows:\n"
        "    one: {select: &cut {method: bi, remove: 3}}\n    two: {select: &late {<<: *cut, method: last}}\n"
        "    three: {select: {<<: *late, remove: 4}}\n"
    )
    rows = Recipe.load(path).compare.rows
    assert rows is not None
    assert rows["two"] == {"select": {"method": "last", "remove": 3}}
    assert rows["three"] == {"select": {"method": "last", "remove": 4}}


def test_a_change_of_what_does_not_exist_is_refused() -> None:
    recipe = Recipe(model="m")
    with pytest.raises(UsageError, match="nonsense"):
        recipe.changed(nonsense={"a": 1})
    with pytest.raises(UsageError, match="model"):
        recipe.changed(model={"name": "m"})


def test_a_new_count_takes_the_place_of_a_ratio() -> None:
    by_ratio = Recipe.from_dict({"model": "m", "select": {"remove_ratio": 0.2}})
    assert by_ratio.changed(select={"remove": 3, "remove_ratio": None}).select.remove_ratio is None
    assert by_ratio.changed(select={"remove": None}).select.remove_ratio == 0.2


def test_another_selector_has_options_of_its_own() -> None:
    select = {"method": "gates", "remove": 2, "options": {"steps": 3}, "sublayers": True}
    recipe = Recipe.from_dict({"model": "m", "select": select})
    changed = recipe.changed(select={"method": "bi"}).select
    assert (changed.method, changed.remove, changed.options, changed.sublayers) == ("bi", 2, {}, False)
    assert recipe.changed(select={"method": "gates", "remove": 3}).select.options == {"steps": 3}
    given = recipe.changed(select={"method": "random", "options": {"seed": 1}}).select
    assert given.options == {"seed": 1}


def test_what_a_change_replaces_goes_with_it() -> None:
    shared = Recipe.from_dict(
        {"model": "m", "select": {"remove": 3}, "share": {"method": "adjacent", "rank": 4, "start": "zero"}}
    )
    assert shared.changed(share={"method": "none"}).share == Recipe(model="m").share
    by_size = shared.changed(share={"method": "auto", "size": "0.7"})
    assert by_size.select.remove is None and by_size.share.rank == 0
    with pytest.raises(UsageError, match=r"select\.remove"):
        shared.changed(share={"method": "auto", "size": "0.7"}, select={"remove": 2})
    by_count = by_size.changed(select={"remove": 2})
    assert by_count.select.remove == 2 and by_count.share == Recipe(model="m").share
    assert by_size.changed(select={"remove": None}).share.size == by_size.share.size


def test_another_model_has_neither_the_revision_nor_the_trust_of_the_first() -> None:
    recipe = Recipe.from_dict({"model": "one/a", "revision": "v1", "trust_remote_code": True, "select": {"remove": 1}})
    other = recipe.changed(model="two/b")
    assert (other.revision, other.trust_remote_code) == (None, False)
    same = recipe.changed(model="one/a", seed=1)
    assert (same.revision, same.trust_remote_code) == ("v1", True)
    given = recipe.changed(model="two/b", revision="v2", trust_remote_code=True)
    assert (given.revision, given.trust_remote_code) == ("v2", True)


def test_values_are_set_at_their_keys() -> None:
    recipe = Recipe.from_dict({"model": "m", "select": {"remove_ratio": 0.2}, "recover": {"settings": {"lm": 0.5}}})
    changed = recipe.changed(
        {
            "seed": 3,
            "evaluate.tasks": ["piqa"],
            "evaluate.data_dir": "tasks",
            "evaluate.max_windows": None,
            "recover.settings.rank": 64,
        }
    )
    assert (changed.seed, changed.evaluate.tasks, changed.evaluate.data_dir) == (3, ["piqa"], "tasks")
    assert changed.evaluate.max_windows is None and recipe.evaluate.max_windows == 40
    assert changed.recover.settings == {"lm": 0.5, "rank": 64}
    assert changed.select.remove_ratio == 0.2


def test_what_a_set_value_replaces_goes_with_it() -> None:
    options = {"method": "gates", "remove_ratio": 0.2, "options": {"effort": 0.5}}
    recipe = Recipe.from_dict({"model": "m", "revision": "r", "select": options})
    other = recipe.changed({"select.method": "random", "select.options.seed": 1, "select.remove": 2})
    assert (other.select.options, other.select.remove_ratio) == ({"seed": 1}, None)
    assert other.revision == "r"
    assert recipe.changed({"model": "n"}).revision is None
    assert recipe.changed({"model": "n", "revision": "s"}).revision == "s"
    assert recipe.changed({"select": {"remove": 3}}).select.options == {}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("evaluate.task", ["piqa"], "evaluate.task: unknown key. Did you mean 'tasks'?"),
        ("evalute.tasks", ["piqa"], "evalute: unknown key. Did you mean 'evaluate'?"),
        ("evaluate.tasks", "piqa", "evaluate.tasks: must be a list (got 'piqa')"),
        ("select.remove", 0.5, "select.remove: "),
        ("evaluate", None, "evaluate: must hold keys and values"),
    ],
)
def test_a_wrong_set_value_is_named_with_its_place(key: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"options: {message}")):
        Recipe.from_dict({"model": "m"}).changed({key: value}, place="options")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("evaluate.tasks.0", "evaluate.tasks is [], which holds no keys; set evaluate.tasks itself"),
        ("seed.first", "seed is 0, which holds no keys"),
        ("compare.rows.bi", "compare.rows is null, which holds no keys"),
    ],
)
def test_what_holds_no_keys_is_set_itself(key: str, message: str) -> None:
    """No rows are all known ones, and a row that is null is what its name stands for."""
    with pytest.raises(UsageError, match=re.escape(f"{key}: {message}")):
        Recipe.from_dict({"model": "m"}).changed({key: 1})


def test_rows_can_be_changed_where_there_are_some() -> None:
    rows = {"bi": None, "mine": {"select": {"method": "loo"}}}
    recipe = Recipe.from_dict({"model": "m", "compare": {"rows": rows}})
    changed = recipe.changed({"compare.rows.mine.compensate.method": "none", "compare.rows.last": None}).compare.rows
    assert changed == {
        "bi": None,
        "mine": {"select": {"method": "loo"}, "compensate": {"method": "none"}},
        "last": None,
    }
    with pytest.raises(
        UsageError, match=r"compare\.rows\.bi is null, which holds no keys; set compare\.rows\.bi itself"
    ):
        recipe.changed({"compare.rows.bi.compensate.method": "linear"})


@pytest.mark.parametrize("turned", [False, True])
def test_a_part_of_what_is_set_whole_is_refused(turned: bool) -> None:
    """Which of them holds would go by their order."""
    values = [("recover", {"num_tokens": 1000}), ("recover.settings.rank", 3)]
    with pytest.raises(UsageError, match=r"recover is set as a whole, and recover\.settings\.rank in it as well"):
        Recipe.from_dict({"model": "m"}).changed(dict(values[::-1] if turned else values))


def test_values_and_flags_are_looked_at_together() -> None:
    recipe = Recipe.from_dict({"model": "m", "select": {"remove": 2}})
    changed = recipe.changed({"share.fit": True}, share={"method": "adjacent", "donor": "least_squares"})
    assert changed.share.fit and changed.share.donor == "least_squares"


@pytest.mark.parametrize("deep", [False, True])
def test_other_blocks_may_be_more(deep: bool) -> None:
    """What stood beside them was the number of those before."""
    options = {"method": "blocks", "remove": 2, "options": {"blocks": [3, 4]}}
    recipe = Recipe.from_dict({"model": "m", "select": options})
    blocks = {"blocks": [3, 4, 5]}
    changed = (
        recipe.changed({"select.options.blocks": [3, 4, 5]}) if deep else recipe.changed(select={"options": blocks})
    )
    assert changed.select.options == blocks and changed.select.remove == 3


@pytest.mark.parametrize(
    ("tokens", "asked", "expected"), [(32_768, None, 4096), (1000, None, 1000), (32_768, 512, 512), (1000, 4096, 1000)]
)
def test_searches_measure_on_as_many_tokens_as_are_asked_for_and_there(
    tokens: int, asked: int | None, expected: int
) -> None:
    recipe = Recipe.from_dict({"model": "x", "select": {"num_tokens": asked}, "calibration": {"num_tokens": tokens}})
    assert recipe.search_tokens == expected

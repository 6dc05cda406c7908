"""The comparison table says what was measured and how; the strip shows each block's fate."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from rich.console import Console

from foldgpt.evaluation import Evaluation, Measured, ModelSize, PeakMemory, Perplexity, Rate, Speed
from foldgpt.plan import FoldPlan, Group, SourceModel
from foldgpt.tables import comparison_table, fates_of, group_letter, plan_strip, protocol_lines


def measured(name: str, num_blocks: int, **changes: Any) -> Measured:
    rate = Rate(2900.4, 2800, 3000, 1)
    protocol = {
        "prompt_tokens": 128,
        "decode_tokens": 32,
        "repeats": 5,
        "batch_size": 1,
        "seed": 0,
        "device": "cpu",
        "dtype": "bfloat16",
        "num_threads": 2,
    }
    text = {
        "texts": ["demo:wikipedia", "a.txt"],
        "join": ["\n\n", ""],
        "tokens": 20_480,
        "stride": 512,
        "bos": False,
    }
    whole = Measured(
        name=name,
        size=ModelSize(num_blocks, 134_515_008, 162_826_560, 106_200_000, 269_030_016, 23_040, 0, None),
        bytes_on_disk=269_060_552,
        perplexity=Perplexity(29.123, 3.37, 0.01, 20_440, 40, "bfloat16", "f" * 64, text),
        speed=Speed(rate, Rate(20, 19, 21, 1), protocol),
        peak_memory=PeakMemory(300_000_000, 700_000_000, None, "cpu", "bfloat16"),
    )
    return dataclasses.replace(whole, **changes)


def rendered(renderable: Any) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def line(text: str, label: str) -> list[str]:
    """The cells of the row that starts with `label`."""
    row = next(line for line in text.splitlines() if label in line)
    return [cell.strip() for cell in row.strip("│ ").split("│")]


def test_source_folded_and_ratio_side_by_side() -> None:
    ratios = {"num_blocks": 0.8, "perplexity": 2.925, "decode_tokens_per_s": 1.21}
    folded = measured("folded", 24)
    text = rendered(comparison_table(Evaluation(folded, measured("source", 30), ratios)))  # type: ignore[arg-type]
    assert line(text, "blocks") == ["blocks", "30", "24", "0.80×"]
    assert line(text, "unique parameters")[1:3] == ["134.5 M", "134.5 M"]
    assert line(text, "size on disk")[1] == "269.1 MB"
    assert line(text, "perplexity")[1:] == ["29.12", "29.12", "2.92×"]
    assert line(text, "prefill")[1] == "2,900"
    assert line(text, "decode")[1:] == ["20", "20", "1.21×"]
    assert line(text, "KV cache")[1:] == ["23.0 kB", "23.0 kB", "–"]


def test_protocols_are_told() -> None:
    text = " ".join(rendered(protocol_lines(Evaluation(measured("folded", 24), None, None))).split())
    for part in (
        "Perplexity in bfloat16: texts demo:wikipedia + a.txt, join '\\n\\n' + '', tokens 20,480, stride 512, bos no.",
        "folded: 29.12 ± 0.29",
        "128 prompt and 32 new tokens, batch 1, median of 5, cpu, bfloat16, 2 threads",
        "300.0 MB are Python and its libraries",
    ):
        assert part in text


def test_what_was_not_measured_has_no_row() -> None:
    bare = measured("folded", 24, perplexity=None, speed=None, peak_memory=None, bytes_on_disk=None)
    table = comparison_table(Evaluation(bare, None, None))
    text = rendered(table)
    assert protocol_lines(Evaluation(bare, None, None)).plain == ""
    assert [column.header for column in table.columns] == ["", "folded"]
    for absent in ("perplexity", "decode", "peak", "disk", "ratio"):
        assert absent not in text


def test_bytes_of_private_terms_have_a_row_where_there_are_some() -> None:
    folded = measured("folded", 24)
    assert "low-rank" not in rendered(comparison_table(Evaluation(folded, measured("source", 30), {})))
    folded = dataclasses.replace(folded, size=dataclasses.replace(folded.size, private_bytes=1_500_000))
    text = rendered(comparison_table(Evaluation(folded, measured("source", 30), {})))
    assert line(text, "scales and low-rank terms")[1:] == ["–", "1.5 MB", "–"]


def test_a_figure_of_one_model_only_is_a_dash() -> None:
    source = measured("source", 30, perplexity=None)
    text = rendered(comparison_table(Evaluation(measured("folded", 24), source, {"perplexity": None})))
    assert line(text, "perplexity")[1:] == ["–", "29.12", "–"]


def plan(num_blocks: int = 12, **parts: Any) -> FoldPlan:
    return FoldPlan.create(SourceModel(model="m", model_type="llama", num_blocks=num_blocks), **parts)


def test_strip_of_blocks() -> None:
    folded = plan(removed=[3, 4], groups=[Group(blocks=(1, 2)), Group(blocks=(5, 7, 8))])
    assert plan_strip(folded).plain.splitlines() == [
        "      0         10",
        "block █AA··B█BB███",
        "      12 → 10 blocks   █ kept   · removed   same letter: shared weights",
    ]


def test_strip_of_sublayers_where_they_differ() -> None:
    folded = plan(
        removed=[3], removed_attention=[5], removed_mlp=[6], groups=[Group(blocks=(0, 1), sublayers=("mlp",))]
    )
    strip = plan_strip(folded).plain.splitlines()
    assert strip[1:3] == ["attention ███·█·██████", "MLP       AA█·██·█████"]
    assert strip[-1].split("   ")[-3:] == ["█ kept", "· removed", "same letter: shared weights"]


def test_groups_with_private_terms_are_told_one_by_one() -> None:
    private = ("norms", "scales")
    groups = [
        Group(blocks=(1, 2)),
        Group(blocks=(4, 5, 6), donor="owner", owner=5, start="zero", private=private, ranks=16),
        Group(blocks=(8, 9), donor="mean", sublayers=("mlp",), ranks={"mlp.up_proj": 4, "mlp.down_proj": (8, 2)}),
    ]
    assert plan_strip(plan(groups=groups)).plain.splitlines()[-2:] == [
        "          B  attention and MLP of block 5, borrowed at 4, 6, starting at zero; private: norms, scales, "
        "rank 16",
        "          C  MLP of blocks 8, 9, donor mean; private: norms, rank 4 on mlp.up_proj, rank 8/2 on mlp.down_proj",
    ]


def test_strip_of_the_identity() -> None:
    assert plan_strip(plan(3)).plain.splitlines() == ["      0", "block ███", "      3 → 3 blocks   █ kept"]


def test_fates_name_the_group() -> None:
    assert fates_of(plan(4, removed=[0], groups=[Group(blocks=(1, 3))])) == {"block": ["removed", 0, "kept", 0]}


@pytest.mark.parametrize(("number", "letter"), [(0, "A"), (25, "Z"), (26, "a"), (51, "z"), (52, "A")])
def test_letters(number: int, letter: str) -> None:
    assert group_letter(number) == letter

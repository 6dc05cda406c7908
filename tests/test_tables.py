"""The comparison table says what was measured and how; the strip shows each block's fate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from foldgpt.cli.terminal import natural_width, split_to_width
from foldgpt.evaluation import (
    Evaluation,
    LastWord,
    Measured,
    ModelSize,
    PeakMemory,
    Perplexity,
    Rate,
    Speed,
    TaskScore,
    perplexity_difference,
)
from foldgpt.evaluation.generations import Generation
from foldgpt.evaluation.tasks import Accuracy
from foldgpt.plan import Compensation, Fitting, FoldPlan, Group, SourceModel
from foldgpt.plan_lines import plan_lines
from foldgpt.recovery_result import RecoveryResult
from foldgpt.report.training import training_curves
from foldgpt.strip import fates_of, group_letter, plan_strip
from foldgpt.tables import (
    comparison_table,
    compensation_line,
    generation_lines,
    protocol_lines,
    recovery_lines,
    storage_lines_of_rows,
    target_lines,
)
from report_inputs import compensated, recovery


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


def rendered(renderable: Any, width: int = 120) -> str:
    console = Console(width=width, color_system=None)
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
        "folded 29.12 ± 0.29",
        "128 prompt and 32 new tokens, batch 1, median of 5, cpu, bfloat16, 2 threads",
        "300.0 MB are Python and its libraries",
    ):
        assert part in text


def test_both_number_formats_are_told_where_they_differ() -> None:
    """Else a difference that is the format's reads as one of the models."""

    def of(name: str, dtype: str) -> Measured:
        model = measured(name, 24)
        scores, speed = model.perplexity, model.speed
        assert scores is not None and speed is not None
        of_task = {"harness": "lm_eval 1", "shots": 0, "items": "all", "data": "here", "truncated_requests": 0}
        task = TaskScore({"acc": Accuracy(0.5, 0.1, "01")}, "acc", 0.5, 2, "f", {**of_task, "dtype": dtype})
        scores = dataclasses.replace(scores, dtype=dtype)
        return dataclasses.replace(
            model,
            perplexity=scores,
            further_perplexities={"b.txt": dataclasses.replace(scores, protocol={"texts": ["b.txt"]})},
            speed=dataclasses.replace(speed, protocol={**speed.protocol, "dtype": dtype}),
            last_word=LastWord(0.5, 0.1, 20.0, 3.0, 0.1, 10, dtype, "f", {}),
            tasks={"piqa": task},
        )

    folded = of("folded", "bfloat16")
    lines = protocol_lines(Evaluation(folded, of("source", "float16"), {})).plain.splitlines()
    both = "float16 (source) and bfloat16 (folded)"
    for beginning in (
        f"Perplexity in {both}: texts demo:wikipedia",
        f"Perplexity in {both}: texts b.txt",
        f"Last word of 10 passages in {both}: folded finds",
        f"Tasks by lm_eval 1, 0-shot, {both}, ± standard error",
    ):
        assert sum(line.startswith(beginning) for line in lines) == 1, beginning
    assert any(f"cpu, {both}, 2 threads" in line for line in lines if line.startswith("Speed"))
    alike = protocol_lines(Evaluation(folded, of("source", "bfloat16"), {})).plain
    assert "(source)" not in alike and "(folded)" not in alike
    # A source that was measured for its size alone has no format that these figures were measured in.
    bare = measured("source", 30, perplexity=None, speed=None)
    assert "(source)" not in protocol_lines(Evaluation(folded, bare, {})).plain


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


def test_texts_of_one_name_are_told_apart() -> None:
    def of(name: str) -> Perplexity:
        return Perplexity(29.0, 3.37, None, 100, 4, "float32", "f", {"texts": [name]})

    further = {"en/test.txt": of("test.txt"), "de/test.txt": of("test.txt"), "a/other.txt": of("other.txt")}
    whole = Evaluation(measured("folded", 24, perplexity=of("first.txt"), further_perplexities=further), None, None)
    labels = [str(cell) for cell in comparison_table(whole).columns[0].cells]
    names = [label.removeprefix("perplexity, ") for label in labels if label.startswith("perplexity")]
    assert names == ["first.txt", "en/test.txt", "de/test.txt", "other.txt"]
    told = [line.split("texts ")[1] for line in protocol_lines(whole).plain.splitlines() if "texts " in line]
    assert [line.partition(". ")[0] for line in told] == names


def test_generations_stand_below_their_prompt() -> None:
    models = [
        measured(name, 24, generations=[Generation("Once", f"{name} wrote\n[this]"), Generation("Twice", "")])
        for name in ("source", "folded")
    ]
    assert generation_lines(Evaluation(models[1], models[0], {})).plain.splitlines() == [
        *("Once …", "  source:", "    source wrote", "    [this]", "  folded:", "    folded wrote", "    [this]"),
        *("Twice …", "  source:", "", "  folded:"),
    ]
    assert generation_lines(Evaluation(measured("folded", 24), None, None)).plain == ""


def wide_table() -> Table:
    """Nine columns, one of them with a heading that is wider than its numbers."""
    table = Table()
    table.add_column("method")
    for column in range(7):
        table.add_column(f"column {column}", justify="right", no_wrap=True)
    table.add_column("perplexity, a text with a long name", justify="right", no_wrap=True)
    for row in ("a name", "a name that is far longer than half of such a terminal"):
        table.add_row(row, *(f"13{column}.5 M" for column in range(7)), "20.25")
    return table


@pytest.mark.parametrize("width", [40, 80])
def test_a_table_that_is_too_wide_goes_on_below_and_loses_nothing(width: int) -> None:
    text = "".join(rendered(part, width) for part in split_to_width(wide_table(), width))
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for column in range(7):
        assert text.count(f"column {column}") == 1
        assert text.count(f" 13{column}.5 M ") == 2
    assert text.count(" 20.25 ") == 2
    # Each part says which rows it has.
    assert text.count("a name that") == text.count("method") > 1


def test_a_table_that_fits_stays_as_it_is() -> None:
    table = wide_table()
    assert split_to_width(table, natural_width(table)) == [table]
    assert max(map(len, rendered(table, 500).splitlines())) == natural_width(table)


def test_a_number_wider_than_the_terminal_is_whole_all_the_same() -> None:
    table = Table()
    table.add_column("")
    table.add_column("against bi", no_wrap=True)
    table.add_row("name", "+41,000 [+38,000, +44,000] worse")
    (part,) = split_to_width(table, 30)
    assert natural_width(part) > 30
    assert "+41,000 [+38,000, +44,000] worse" in rendered(part, natural_width(part))


def plan(num_blocks: int = 12, **parts: Any) -> FoldPlan:
    return FoldPlan.create(SourceModel(model="m", model_type="llama", num_blocks=num_blocks), **parts)


def test_strip_of_blocks() -> None:
    folded = plan(removed=[3, 4], groups=[Group(blocks=(1, 2)), Group(blocks=(5, 7, 8))])
    assert plan_strip(folded).plain.splitlines() == [
        "      0         10",
        "block █AA··B█BB███",
        "      12 → 10 blocks   █ kept   · removed   same letter: shared weights",
    ]


def test_a_long_strip_goes_on_below_with_its_ruler() -> None:
    assert plan_strip(plan(45, removed=[19, 20, 44]), 32).plain.splitlines() == [
        "      0         10",
        "block ███████████████████·",
        "      20        30",
        "block ·███████████████████",
        "      40",
        "block ████·",
        "      45 → 42 blocks   █ kept   · removed",
    ]
    assert plan_strip(plan(30), 36).plain == plan_strip(plan(30)).plain


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


@pytest.mark.parametrize(("best_step", "expected"), [(40, "1.2 M trained parameters merged"), (0, "not kept")])
def test_what_was_trained_is_merged_only_where_it_was_better(best_step: int, expected: str) -> None:
    result = RecoveryResult(**{**recovery(), "best_step": best_step})
    assert expected in recovery_lines(result).plain
    assert ("merged" in recovery_lines(result).plain) == bool(best_step)


def test_one_window_has_no_standard_error_and_no_word_of_it() -> None:
    several = measured("folded", 24)
    assert several.perplexity is not None
    alone = measured("folded", 24, perplexity=dataclasses.replace(several.perplexity, standard_error=None))
    assert (
        "folded 29.12 ± 0.29 (± standard error over windows)." in protocol_lines(Evaluation(several, None, None)).plain
    )
    assert "standard error" not in protocol_lines(Evaluation(alone, None, None)).plain


def test_sizes_of_two_formats_are_told_apart() -> None:
    """With float32 asked for, a folded model may take more bytes than its bf16 source, and fewer parameters."""
    source = measured("source", 30, stored_in="bfloat16")
    less = ModelSize(24, 113_300_000, 141_600_000, 85_000_000, 453_200_000, 18_432, 0, None)

    def lines(stored_in: str | None) -> str:
        folded = measured("folded", 24, size=less, bytes_on_disk=453_200_000, stored_in=stored_in)
        return protocol_lines(Evaluation(folded, source, {"bytes_on_disk": 1.68})).plain

    assert (
        "Size on disk: source is stored in bfloat16, folded in float32; in one format the ratio would be 0.84×."
    ) in lines("float32")
    assert "Size on disk" not in lines("bfloat16") + lines(None)


def test_a_comparison_names_its_rows_and_their_format_beside_the_source() -> None:
    source, row = measured("source", 30, stored_in="bfloat16"), measured("folded", 24, stored_in="float32")
    assert storage_lines_of_rows(source, [row]) == [
        "Size on disk: source is stored in bfloat16, the rows in float32; sizes in different formats do not compare."
    ]
    assert storage_lines_of_rows(source, [source]) == storage_lines_of_rows(measured("source", 30), [row]) == []


def test_the_memory_of_an_accelerator_has_a_row_and_a_ratio_of_its_own() -> None:
    def on(device: str, peak: int | None, name: str) -> Measured:
        return measured(name, 24, peak_memory=PeakMemory(300_000_000, 700_000_000, peak, device, "bfloat16"))

    source, folded = on("cuda", 14_000_000_000, "source"), on("cuda", 10_000_000_000, "folded")
    text = rendered(comparison_table(Evaluation(folded, source, {"peak_accelerator_bytes": 0.714})))
    assert line(text, "peak memory, accelerator")[1:] == ["14,000.0 MB", "10,000.0 MB", "0.71×"]
    assert line(text, "peak memory, host")[1] == "700.0 MB"
    assert "host" not in rendered(comparison_table(Evaluation(on("cpu", None, "folded"), None, None)))


def test_blocks_that_stop_filling_the_cache_are_told() -> None:
    def of(name: str, blocks: int, sliding: int) -> Measured:
        size = ModelSize(blocks, 9, 9, 9, 9, 100, sliding, 512 if sliding else None)
        return measured(name, blocks, size=size)

    told = protocol_lines(Evaluation(of("folded", 14, 11), of("source", 18, 15), {})).plain
    assert (
        "KV cache: of a text's first 512 tokens; behind them some blocks do not add to it (source 15 of 18, folded "
        "11 of 14)."
    ) in told
    assert "KV cache" not in protocol_lines(Evaluation(of("folded", 14, 0), None, None)).plain


def test_caches_in_different_formats_are_told() -> None:
    def of(name: str, parameters: int, width: int, cache: int) -> Measured:
        size = ModelSize(9, parameters, parameters, parameters, width * parameters, cache, 0, None)
        return measured(name, 9, size=size)

    source = of("source", 100, 4, 400)
    told = protocol_lines(Evaluation(of("folded", 80, 2, 160), source, {})).plain
    assert (
        "KV cache: a value of source takes 4 bytes, one of folded 2; in one format the ratio would be 0.80×."
    ) in told
    for one_format in (Evaluation(of("folded", 80, 4, 320), source, {}), Evaluation(source, None, None)):
        assert "KV cache" not in protocol_lines(one_format).plain


def test_a_text_that_the_model_was_made_by_is_no_test() -> None:
    reused = {"demo:wikipedia": ["calibration", "training"]}
    text = protocol_lines(Evaluation(measured("recovered", 24, reused=reused), measured("source", 30), {})).plain
    assert "demo:wikipedia was also used for calibration and training: its perplexity is no test of recovered." in text
    assert "source 29.12 ± 0.29, recovered 29.12 ± 0.29 (± standard error over windows)." in text


def test_what_recovery_changed_stands_between_source_and_recovered_with_its_interval() -> None:
    def of(value: float, *nlls: float) -> Perplexity:
        text = {"texts": ["a.txt"], "tokens": 40}
        return Perplexity(value, math.log(value), 0.01, 40, 4, "float32", "f", text, list(nlls), [10] * 4)

    def scored(*hits: bool) -> dict[str, TaskScore]:
        how = {"harness": "lm_eval 1.0", "data": "rows.jsonl", "items": "all", "shots": 0, "dtype": "float32"}
        accuracies = {"acc": Accuracy.of(list(hits))}
        return {"boolq": TaskScore(accuracies, "acc", 0.5, len(hits), "f", {**how, "truncated_requests": 0})}

    before, after = of(30.0, 32, 34, 36, 34.1), of(20.0, 28, 30, 32, 29.8)
    models = [
        measured("source", 30, perplexity=of(15.0, 27, 27, 27, 27)),
        measured("folded", 24, perplexity=before, speed=None, tasks=scored(*[True, False] * 8)),
        measured("recovered", 24, perplexity=after, tasks=scored(*[True, True, True, False] * 4)),
    ]
    evaluation = Evaluation(models[2], models[0], {"perplexity": 20 / 15}, before_recovery=models[1])
    table = rendered(comparison_table(evaluation))
    assert line(table, "perplexity") == ["perplexity", "15", "30", "20", "1.33×"]
    assert line(table, "decode, tokens/s")[1:4] == ["20", "–", "20"]
    found = perplexity_difference(after, before, samples=10_000, confidence=0.95)
    assert found.is_certain
    text = protocol_lines(evaluation).plain
    low, high = (f"{abs(value):.{digits}f}" for value, digits in ((found.low, 1), (found.high, 2)))
    assert f"Recovery changed perplexity by −10.0 [−{low}, −{high}], mean accuracy by +25.0 [" in text
    assert "] points (95 % intervals by paired bootstrap)." in text
    assert "Recovery" not in protocol_lines(dataclasses.replace(evaluation, before_recovery=None)).plain


@pytest.mark.parametrize(
    ("written", "what", "of_source", "limit", "expected"),
    [
        ("parameters=95M", "parameters", 162.8e6, 95e6, "at most 95.0 M parameters; it has 134.5 M parameters."),
        ("decode=75%", "seconds", 0.04, 0.03, "a token takes 80.0 % of the source's time, where 75.0 % was asked for"),
        ("prefill=80%", "seconds", 0.5, 0.4, "a prompt takes 50.0 % of the source's time, where 80.0 % was asked for"),
        ("flops=80%", "FLOPs", 5e9, 4e9, None),
    ],
)
def test_it_is_said_whether_a_target_was_met(
    written: str, what: str, of_source: float, limit: float, expected: str | None
) -> None:
    met = {"target": written, "what": what, "source": of_source, "limit": limit, "num_remove": 3}
    ratios: dict[str, float | None] = {"decode_tokens_per_s": 1.25, "prefill_tokens_per_s": 2.0}
    evaluation = Evaluation(measured("folded", 24), measured("source", 30), ratios)
    lines = target_lines(plan(removed=[4], origin={"report": {"target": met}}), evaluation)
    assert [expected in line for line in lines] == ([] if expected is None else [True])  # type: ignore[operator]
    assert target_lines(plan(removed=[4]), evaluation) == []


def test_a_large_error_has_no_exponent() -> None:
    scores = measured("folded", 24).perplexity
    assert scores is not None
    wild = measured("folded", 24, perplexity=dataclasses.replace(scores, value=5123.4, standard_error=0.08))
    assert "folded 5,123 ± 410 (" in protocol_lines(Evaluation(wild, None, None)).plain


def test_a_recovery_says_what_it_was_trained_and_judged_on() -> None:
    text = {"texts": ["a.txt", "demo:wikipedia"], "context": 512, "num_held_out": 16_384}
    settings = {"kl": 1.0, "lm": 0.5, "rank": 16}
    losses = {"before": {"loss": 2.0, "kl": 1.0}, "after": {"loss": 1.5, "kl": 0.7}}
    lines = recovery_lines(RecoveryResult(**{**recovery(), **losses, "text": text, "settings": settings})).plain
    assert (
        "recovery on 16,384 held-out tokens: loss (kl + 0.5 lm) 2.0000 → 1.5000; KL to the source 1.0000 → 0.7000"
        in lines
    )
    assert "tokens of a.txt + demo:wikipedia in windows of 512, " in lines


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "KL"),
        ({"divergence": "forward", "temperature": 1.0, "skew": 0.1}, "KL"),
        ({"divergence": "forward", "temperature": 3.0}, "KL (temperature 3)"),
        ({"divergence": "reverse", "temperature": 1.0, "skew": 0.1}, "reverse KL"),
        (
            {"divergence": "skewed", "temperature": 2.0, "skew": 0.5},
            "skewed KL (skew 0.5, temperature 2)",
        ),
    ],
)
def test_another_divergence_is_not_called_the_kl(settings: dict[str, Any], words: str) -> None:
    losses = {"before": {"loss": 2.0, "kl": 1.0}, "after": {"loss": 1.5, "kl": 0.7}}
    result = RecoveryResult(**{**recovery(), **losses, "settings": {"kl": 1.0, "lm": 0.5, **settings}})
    assert f"; {words} to the source 1.0000 → 0.7000" in recovery_lines(result).plain
    loss = f"loss ({'kl' if words == 'KL' else words} + 0.5 lm) 2.0000"
    assert loss in recovery_lines(result).plain
    curves = training_curves(result)
    assert curves is not None
    assert [line["name"] for line in curves["lines"]] == [
        "held-out loss",
        f"held-out {words}",
    ]


def test_a_plan_says_where_it_comes_from_and_what_its_search_measured() -> None:
    report: dict[str, Any] = {
        "objective": "kl",
        "compensated": True,
        "cost": 0.50614,
        "num_tokens": 8192,
        "forward_equivalents": 51.84,
        "seconds": 161.2,
        "finals": [
            {"removed": [4, 5], "cost": 0.4251, "num_tokens": 8192},
            {"removed": [3, 5], "cost": 0.48, "num_tokens": 8192},
        ],
    }
    source = SourceModel(model="m", revision="v2", model_type="llama", num_blocks=12)
    protocol = {"texts": ["a.txt", "demo:wikipedia"], "windows": 64, "context": 1024}
    origin = {"selector": "gates", "seed": 3, "calibration": {"protocol": protocol}}
    text = Compensation(texts=("/data/a.txt",), context=512, num_tokens=32_768, fingerprint="f")

    def lines(**changes: Any) -> list[str]:
        whole = {**origin, "report": {**report, **changes}}
        made = FoldPlan.create(source, removed=[4, 5], compensation=text, origin=whole)
        return plan_lines(made).plain.splitlines()

    assert lines() == [
        "m at v2 (llama): removed 4 and 5",
        "chosen by gates, seed 3; calibrated on a.txt + demo:wikipedia, 64 windows of 1,024 tokens",
        "KL to the source 0.5061 nats per token on 8,192 calibration tokens, compensated by the quick fit of "
        "searches; 51.8 forward passes over them, 161 s",
        "on 8,192 further tokens, compensated as folding does it: 0.4251, the next best of 2 sets 0.4800",
        "compensation: linear, fitted when folding on /data/a.txt, 32,768 tokens in windows of 512",
    ]
    with_copies = lines(num_copied=128, num_positions=2048)
    assert "8,192 calibration tokens (6% copies of earlier ones), compensated" in with_copies[2]
    begun = lines(num_prior_tokens=12_288)
    assert "by the quick fit of searches (begun on 12,288 others); 51.8 forward" in begun[2]
    assert "begun" not in lines(num_prior_tokens=0)[2]
    plain = lines(compensated=False, objective="lm", finals=[])
    assert len(plain) == 4 and plain[2].startswith("language-modelling loss 0.5061") and "fit" not in plain[2]
    # Nothing was measured, or the plan was written by hand.
    wrong = {"report": {**report, "cost": "low", "target": {"limit": "much"}}, "calibration": {"protocol": 3}}
    for little in ({}, {"report": {"draws": 3}}, {"report": None}, wrong):
        assert plan_lines(FoldPlan.create(source, removed=[4], origin=little)).plain == (
            "m at v2 (llama): removed 4\ncompensation: none"
        )


def test_a_plan_of_sublayers_and_groups_says_what_goes_and_what_is_fitted() -> None:
    source = SourceModel(model="m", model_type="llama", num_blocks=12)
    fitting = Fitting(texts=("a.txt",), context=512, num_tokens=1024, fingerprint="f")
    shared = FoldPlan.create(source, groups=[Group(blocks=(1, 2))], fitting=fitting)
    assert plan_lines(shared).plain == (
        "m (llama): no block removed\n"
        "shared weights and private terms: fitted when folding on a.txt, 1,024 tokens in windows of 512"
    )
    apart = FoldPlan.create(source, removed=[3], removed_attention=[5, 6, 7], removed_mlp=[9])
    first = plan_lines(apart).plain.splitlines()[0]
    assert first == "m (llama): removed 3; attention removed 5–7; MLP removed 9"


@pytest.mark.parametrize("kept", [False, True])
def test_it_is_said_what_compensation_did(kept: bool) -> None:
    text = compensation_line(compensated(kept)).plain
    assert text.startswith(f"compensation: KL to the source 0.6000 → {0.3 if kept else 0.6:.4f} nats per token on 8")
    assert text.endswith("left out") == (not kept)
    assert "→ not finite" in compensation_line({**compensated(False), "kl_after": None}).plain

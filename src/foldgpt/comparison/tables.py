"""A comparison as tables: terminal, page, Markdown and CSV say the same."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from rich.table import Table

from foldgpt.comparison.agreement import agreement_of
from foldgpt.comparison.result import Comparison, Method
from foldgpt.comparison.rows import is_draw
from foldgpt.comparison.training import in_words
from foldgpt.evaluation import Interval
from foldgpt.formats import change, change_within, duration, megabytes, millions, percent, significant

_MISSING = "–"
#: Put behind the name of a row that is not as large as the reference row.
OTHER_BUDGET = "†"


def title_of(method: Method) -> str:
    """How a table calls a row."""
    return method.title if method.is_fair else f"{method.title} {OTHER_BUDGET}"


def method_table(comparison: Comparison) -> Table:
    """Cost and quality, one row for each method."""
    columns = ["parameters", "in blocks", "on disk", *(f"perplexity, {text}" for text in comparison.texts)]
    if comparison.tasks:
        columns += ["tasks", "retained", "above chance"]
    columns += ["last word"] if _any(comparison, "last_word_accuracy") else []
    columns += ["time", *(["decode"] if _any(comparison, "decode_tokens_per_s") else [])]
    table = Table()
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for method in comparison.methods:
        cells = _cells(method)
        table.add_row(title_of(method), *(cells.get(column, _MISSING) for column in columns))
        drawn = _draws_up_to(comparison, method)
        if drawn:
            cells = _cells_of_all(drawn)
            table.add_row(f"  mean of {len(drawn)} ± spread", *(cells.get(column, "") for column in columns))
    return table


def _draws_up_to(comparison: Comparison, last: Method) -> list[Method]:
    """All random draws of a recovery setting, if this row is the last of several; otherwise none."""
    drawn = [each for each in comparison.methods if is_draw(each.name) and each.recovered == last.recovered]
    return drawn if len(drawn) > 1 and drawn[-1] is last else []


def _cells_of_all(drawn: Sequence[Method]) -> dict[str, str]:
    """Column → mean and standard deviation over rows, of what tells how good they are."""
    cells = {}
    for text in drawn[0].perplexities:
        values = [method.perplexities[text] for method in drawn]
        cells[f"perplexity, {text}"] = f"{significant(mean(values))} ± {significant(stdev(values), 2)}"
    accuracies = [value for method in drawn if (value := method.figures.get("task_average")) is not None]
    if len(accuracies) == len(drawn):
        cells["tasks"] = f"{100 * mean(accuracies):.1f} ± {100 * stdev(accuracies):.1f} %"
    return cells


def _cells(method: Method) -> dict[str, str]:
    """Column → what stands there; what was not measured is left out."""
    figures, retained = method.figures, method.retained
    cells = {f"perplexity, {text}": significant(value) for text, value in method.perplexities.items()}
    for column, name, write in (
        ("parameters", "unique_parameters", millions),
        ("in blocks", "block_parameters", millions),
        ("on disk", "bytes_on_disk", megabytes),
        ("tasks", "task_average", percent),
        ("last word", "last_word_accuracy", percent),
    ):
        value = figures.get(name)
        if value is not None:
            cells[column] = write(value)
    if retained is not None:
        for column, share in (("retained", retained.raw), ("above chance", retained.above_chance)):
            if share is not None:
                cells[column] = percent(share)
    if method.seconds is not None:
        cells["time"] = duration(method.seconds)
    if method.decode_ratio is not None:
        cells["decode"] = f"{method.decode_ratio:.2f}×"
    return cells


def task_accuracy_table(comparison: Comparison) -> Table:
    """Accuracy on each task, one row for each method; empty without tasks."""
    table = Table()
    if not comparison.tasks:
        return table
    table.add_column("method")
    for task in comparison.tasks:
        table.add_column(task, justify="right", no_wrap=True)
    table.add_row("chance", *(percent(chance) for chance in comparison.tasks.values()))
    for method in comparison.methods:
        values = [method.figures.get(f"task.{task}") for task in comparison.tasks]
        table.add_row(title_of(method), *(_MISSING if value is None else percent(value) for value in values))
    return table


def difference_table(comparison: Comparison) -> Table:
    """How each row differs from the reference row of its recovery setting, and whether that is certain."""
    table = Table()
    table.add_column(f"against {comparison.reference}")
    for text in comparison.texts:
        table.add_column(f"perplexity, {text}", justify="right", no_wrap=True)
    if comparison.tasks:
        table.add_column("tasks, points", justify="right", no_wrap=True)
    for method in comparison.methods:
        if not (method.perplexity_differences or method.accuracy_difference):
            continue
        cells = [
            difference_text(method, method.perplexity_differences.get(text), 1.0, less_is_better=True)
            for text in comparison.texts
        ]
        if comparison.tasks:
            cells.append(difference_text(method, method.accuracy_difference, 100.0, less_is_better=False))
        table.add_row(title_of(method), *cells)
    return table


def verdict(method: Method, interval: Interval, *, less_is_better: bool) -> str:
    """better, worse, unclear, or nothing to say because sizes or trainings differ."""
    if not method.is_fair:
        return "other budget"
    if not method.is_trained_alike:
        return "unequal training"
    if not interval.is_certain:
        return "unclear"
    return "better" if (interval.high < 0) == less_is_better else "worse"


def difference_text(method: Method, interval: Interval | None, scale: float, *, less_is_better: bool) -> str:
    """A difference with its interval and what may be said of it."""
    if interval is None:
        return _MISSING
    written = change_within(*(scale * value for value in (interval.difference, interval.low, interval.high)))
    return f"{written} {verdict(method, interval, less_is_better=less_is_better)}"


def notes_of(comparison: Comparison) -> list[str]:
    """What the tables mean, and how it was measured, one line for each."""
    notes = [
        f"Differences are to {comparison.reference} with the same recovery, with {percent(comparison.confidence)} "
        f"intervals by paired bootstrap over windows and items ({comparison.samples:,} resamples, seed "
        f"{comparison.seed}). 'better' and 'worse' are said only where the interval excludes zero; each interval is "
        "for itself, so among many rows one may do so by chance.",
        "Time is that of the method: analysis where it reads it, search, folding and recovery. Loading the model is in "
        "it for the rows that had to. Decode is the speed over the source's, measured in turns.",
    ]
    unfair = [method for method in comparison.methods if not method.is_fair]
    if unfair:
        gaps = "; ".join(f"{method.title}: {change(100 * (method.budget_gap or 0))} %" for method in unfair)
        notes.append(
            f"{OTHER_BUDGET} The blocks hold more or fewer parameters than {comparison.reference}'s, by more than "
            f"{percent(comparison.budget_tolerance)}: {gaps}."
        )
    if comparison.recovery_tokens:
        notes.append(
            f"{_training_in_words(comparison)} Training windows and the teacher's states are kept for later rows; "
            "their time counts for the row that made them."
        )
    if agreement_of(comparison) is not None:
        notes.append(
            "Removed in common: blocks that two methods both remove, of those that either removes; a column bears the "
            "number of its row."
        )
    return [*notes, *comparison.protocol]


def _training_in_words(comparison: Comparison) -> str:
    """Whether all recovered rows were trained alike, and by name where not."""
    trained = [method for method in comparison.methods if method.recovered]
    lengths = {method.trained_tokens for method in trained}
    if None in lengths or not trained:
        # Written by a version that kept no account of it.
        text = f"Recovery: up to {comparison.recovery_tokens:,} tokens for all rows that have it."
    elif len(lengths) == 1:
        text = f"Recovery: the same {trained[0].trained_tokens:,} tokens for all rows that have it."
    else:
        each = "; ".join(
            f"{method.title}: {in_words(method.trained_tokens or 0, method.training_ended or '')}" for method in trained
        )
        text = (
            f"Recovery: {comparison.recovery_tokens:,} tokens were asked for, and rows saw different numbers: {each}."
        )
        unequal = [method.title for method in trained if not method.is_trained_alike]
        if unequal:
            text += f" Neither better nor worse is said of {', '.join(unequal)}."
    own = [f"{method.title} ({', '.join(method.own_settings)})" for method in trained if method.own_settings]
    return f"{text} With settings other than {comparison.reference}'s: {'; '.join(own)}." if own else text


def _any(comparison: Comparison, figure: str) -> bool:
    return any(method.figures.get(figure) is not None for method in comparison.methods)


def rows_for_csv(comparison: Comparison) -> list[dict[str, object]]:
    """One flat record for each row, unrounded, for spreadsheets and programs."""
    records = []
    for method in comparison.methods:
        record: dict[str, object] = {
            "method": method.name,
            "recovered": method.recovered,
            "removed": " ".join(map(str, method.removed)),
            "num_sharing": method.num_sharing,
            **{name: value for name, value in method.figures.items() if not name.startswith("perplexity")},
            **{f"perplexity.{text}": value for text, value in method.perplexities.items()},
            "retained": None if method.retained is None else method.retained.raw,
            "retained_above_chance": None if method.retained is None else method.retained.above_chance,
            "seconds": method.seconds,
            "decode_ratio": method.decode_ratio,
            "budget_gap": method.budget_gap,
            "is_fair": method.is_fair,
            "trained_tokens": method.trained_tokens,
            "training_ended": method.training_ended,
            "is_trained_alike": method.is_trained_alike,
        }
        intervals = {f"perplexity.{text}": each for text, each in method.perplexity_differences.items()}
        if method.accuracy_difference is not None:
            intervals["task_average"] = method.accuracy_difference
        for text in (*(f"perplexity.{text}" for text in comparison.texts), "task_average"):
            interval = intervals.get(text)
            for part in ("difference", "low", "high"):
                record[f"{text}.{part}"] = None if interval is None else getattr(interval, part)
        # In each row: rows of several comparisons come to stand in one table.
        record["protocol"] = " ".join(comparison.protocol)
        records.append(record)
    return records

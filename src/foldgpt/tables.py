"""Results of the stages as tables and lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from foldgpt.formats import amount, change_within, megabytes, millions, percent, significant, text_name, whole
from foldgpt.plan_lines import calibration_words
from foldgpt.targets import target

if TYPE_CHECKING:
    from foldgpt.analysis import Analysis
    from foldgpt.evaluation import Evaluation, Measured, Perplexity
    from foldgpt.export import ExportedGGUF
    from foldgpt.folding import Verification
    from foldgpt.plan import FoldPlan
    from foldgpt.recovery import RecoveryResult


#: Figure → label and how its values are written, in the order of the table.
_ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "num_blocks": ("blocks", whole),
    "unique_parameters": ("unique parameters", millions),
    "block_parameters": ("  of which in blocks", millions),
    "bytes_on_disk": ("size on disk", megabytes),
    "private_bytes": ("  scales and low-rank terms", megabytes),
    "perplexity": ("perplexity", significant),
    "last_word_perplexity": ("last-word perplexity", significant),
    "last_word_accuracy": ("last-word accuracy", percent),
    "prefill_tokens_per_s": ("prefill, tokens/s", significant),
    "decode_tokens_per_s": ("decode, tokens/s", significant),
    "peak_accelerator_bytes": ("peak memory, accelerator", megabytes),
    "peak_memory_bytes": ("peak memory", megabytes),
    "kv_bytes_per_token": ("KV cache per token", megabytes),
}


def comparison_table(evaluation: Evaluation) -> Table:
    """The headline figures: source, folded, recovered, and the last one's ratio to the first. `protocol_lines` says how
    they were measured.

    Rows that no model has a value for are left out, and so are models that were not measured.
    """
    table = Table()
    table.add_column("")
    models = evaluation.models
    for model in models:
        table.add_column(model.name, justify="right", no_wrap=True)
    if evaluation.ratios is not None:
        table.add_column("ratio", justify="right", no_wrap=True)
    for name, label, write in _rows(models):
        values = [model.figures().get(name) for model in models]
        if all(value is None for value in values):
            continue
        cells = ["–" if value is None else write(value) for value in values]
        if evaluation.ratios is not None:
            ratio = evaluation.ratios.get(name)
            cells.append("–" if ratio is None else f"{ratio:.2f}×")
        table.add_row(label, *cells)
    return table


def _rows(models: Sequence[Measured]) -> Iterator[tuple[str, str, Callable[[float], str]]]:
    """Name, label and writing of each figure; every text has a perplexity of its own."""
    perplexities = models[-1].perplexities()
    for name, (label, write) in _ROWS.items():
        if name == "perplexity" and len(perplexities) > 1:
            for figure, (text, _) in perplexities.items():
                yield figure, f"{label}, {text}", write
        elif name == "peak_memory_bytes" and any("peak_accelerator_bytes" in model.figures() for model in models):
            yield name, f"{label}, host", write
        else:
            yield name, label, write


def task_table(evaluation: Evaluation) -> Table:
    """Headline accuracy per task with its standard error, and what is left of the source's: raw and above chance.

    Empty if no task was measured.
    """
    table = Table()
    models = [model for model in evaluation.models if model.tasks]
    if not models or not evaluation.folded.tasks:
        return table
    table.add_column("task")
    for heading in ("chance", *(model.name for model in models)):
        table.add_column(heading, justify="right", no_wrap=True)
    if evaluation.retained is not None:
        for heading in ("retained", "above chance"):
            table.add_column(heading, justify="right", no_wrap=True)
    for task, score in evaluation.folded.tasks.items():
        accuracies = [model.tasks[task].accuracy for model in models if model.tasks]
        shown = [_percent_with_error(accuracy.value, accuracy.standard_error) for accuracy in accuracies]
        table.add_row(f"{task} ({score.headline})", percent(score.chance), *shown, *_retained(evaluation, task))
    averages = [percent(model.figures()["task_average"] or 0) for model in models]
    chance = sum(score.chance for score in evaluation.folded.tasks.values()) / len(evaluation.folded.tasks)
    table.add_row("average", percent(chance), *averages, *_retained(evaluation, "average"))
    return table


def _retained(evaluation: Evaluation, name: str) -> list[str]:
    """The two last cells of a row of tasks."""
    if evaluation.retained is None:
        return []
    kept = evaluation.retained[name]
    return ["–" if value is None else percent(value) for value in (kept.raw, kept.above_chance)]


def _percent_with_error(value: float, error: float | None) -> str:
    return percent(value) if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"


def protocol_lines(evaluation: Evaluation, *, own: str | None = None) -> Text:
    """How the figures of a comparison were measured, one line for each kind.

    Args:
        evaluation: of one or two models.
        own: what the model is called whose accuracy is retained; the last one's name by default.
    """
    measured, models = evaluation.folded, evaluation.models
    perplexities = {model.name: model.perplexities() for model in models}
    parts = []
    for figure, (text, scores) in perplexities[measured.name].items():
        protocol = scores.protocol
        if len(protocol.get("texts", [])) == 1:
            protocol = {**protocol, "texts": [text]}  # in full where another text has its name
        formats = {name: known[figure][1].dtype for name, known in perplexities.items() if figure in known}
        values = ", ".join(
            f"{name} {_perplexity_with_error(known[figure][1])}"
            for name, known in perplexities.items()
            if figure in known
        )
        error = " (± standard error over windows)" if scores.standard_error is not None else ""
        parts.append(f"Perplexity in {_formats(formats)}: {_written(protocol)}. {values}{error}.")
    parts += _recovery_lines(evaluation)
    parts += reuse_lines(measured.reused or {}, measured.name)
    parts += _storage_lines(models)
    parts += _cache_lines(models)
    parts += _sliding_lines(models)
    if measured.speed is not None:
        protocol = measured.speed.protocol
        formats = {model.name: model.speed.protocol["dtype"] for model in models if model.speed is not None}
        threads = f", {protocol['num_threads']} threads" if protocol["device"] == "cpu" else ""
        parts.append(
            f"Speed: {protocol['prompt_tokens']} prompt and {protocol['decode_tokens']} new tokens, batch "
            f"{protocol['batch_size']}, median of {protocol['repeats']}, {protocol['device']}, "
            f"{_formats(formats)}{threads}; the ratio is the median of those within each turn."
        )
    if measured.peak_memory is not None:
        peak = measured.peak_memory
        accelerator = "" if peak.peak_accelerator is None else "; on the accelerator what PyTorch had allocated there"
        parts.append(
            f"Peak memory of a fresh process, of which {megabytes(peak.baseline_rss)} are Python and its "
            f"libraries{accelerator}."
        )
    if measured.last_word is not None:
        words = measured.last_word
        formats = {model.name: model.last_word.dtype for model in models if model.last_word is not None}
        parts.append(
            f"Last word of {words.num_passages:,} passages in {_formats(formats)}: {measured.name} finds "
            f"{_percent_with_error(words.accuracy, words.accuracy_error)}; perplexity per word."
        )
    parts += _task_protocol(models, own or measured.name)
    return Text("\n".join(parts), style="dim")


def _recovery_lines(evaluation: Evaluation) -> list[str]:
    """What recovery changed, on the same windows and items before and after, with intervals; none without it."""
    # Not at the top: whoever shows an analysis or a fit needs neither.
    from foldgpt.evaluation import accuracy_difference, perplexity_difference
    from foldgpt.recipe import Compare

    before, after = evaluation.before_recovery, evaluation.folded
    if before is None:
        return []
    usual, earlier = Compare(), before.perplexities()
    how: dict[str, Any] = {"samples": usual.bootstrap_samples, "confidence": usual.confidence}
    several = len(earlier) > 1
    changes = []
    for figure, (text, scores) in after.perplexities().items():
        if figure in earlier:
            found = perplexity_difference(scores, earlier[figure][1], **how)
            within = change_within(found.difference, found.low, found.high)
            changes.append(f"perplexity{f' on {text}' if several else ''} by {within}")
    if before.tasks and after.tasks:
        found = accuracy_difference(after.tasks, before.tasks, **how)
        points = change_within(*(100 * value for value in (found.difference, found.low, found.high)))
        changes.append(f"mean accuracy by {points} points")
    paired = f"{100 * usual.confidence:.0f} % intervals by paired bootstrap"
    return [f"Recovery changed {', '.join(changes)} ({paired})."] if changes else []


def target_lines(plan: FoldPlan, evaluation: Evaluation) -> list[str]:
    """Whether what was measured is what the plan was to meet, where it was made for a target; one line at most."""
    report = plan.origin.get("report")
    met = report.get("target") if isinstance(report, Mapping) else None
    if not isinstance(met, Mapping) or not {"target", "what", "source", "limit"} <= met.keys():
        return []
    written, what = str(met["target"]), str(met["what"])
    if not all(isinstance(met[name], (int, float)) and met[name] > 0 for name in ("source", "limit")):
        return []
    try:
        wanted = target(written).what
    except ValueError:  # a plan's origin is free-form, and may have been edited
        return []
    if wanted == "parameters":
        has = amount(evaluation.folded.size.unique_parameters, what)
        return [f"Target {written}: at most {amount(met['limit'], what)}; it has {has}."]
    speedup = (evaluation.ratios or {}).get(f"{wanted}_tokens_per_s")
    if speedup is None:
        return []
    taken = "a token takes" if wanted == "decode" else "a prompt takes"
    allowed = percent(met["limit"] / met["source"])
    return [
        f"Target {written}: measured here, {taken} {percent(1 / speedup)} of the source's time, where {allowed} was "
        "asked for; times vary from one measurement to the next."
    ]


def reuse_lines(reused: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """Which texts are no test, one line each.

    Args:
        reused: see `Measured.reused`.
        name: of the model.
    """
    return [
        f"{text_name(text)} was also used for {' and '.join(uses)}: its perplexity is no test of {name}."
        for text, uses in reused.items()
    ]


def _perplexity_with_error(scores: Perplexity) -> str:
    value = significant(scores.value)
    if scores.standard_error is None:
        return value
    return f"{value} ± {significant(scores.value * scores.standard_error, 2)}"


def storage_lines_of_rows(source: Measured, rows: Sequence[Measured]) -> list[str]:
    """That a comparison's sizes on disk are of different formats, where they are; one line at most."""
    formats = sorted({row.stored_in for row in rows if row.bytes_on_disk and row.stored_in})
    if not source.bytes_on_disk or not source.stored_in or not formats or formats == [source.stored_in]:
        return []
    return [
        f"Size on disk: {source.name} is stored in {source.stored_in}, the rows in {' and '.join(formats)}; sizes in "
        "different formats do not compare."
    ]


def _storage_lines(models: Sequence[Measured]) -> list[str]:
    """That the sizes on disk are of different formats, where they are: their ratio is not that of the models."""
    stored = [model for model in models if model.bytes_on_disk and model.stored_in]
    if len(stored) < 2 or stored[0].stored_in == stored[-1].stored_in:
        return []
    source, folded = stored[0], stored[-1]
    ratio = folded.size.unique_parameters / source.size.unique_parameters
    return [
        f"Size on disk: {source.name} is stored in {source.stored_in}, {folded.name} in {folded.stored_in}; in one "
        f"format the ratio would be {ratio:.2f}×."
    ]


def _cache_lines(models: Sequence[Measured]) -> list[str]:
    """That the caches are of different formats, where they are: their ratio is not that of the models.

    A cache is in the format that the model computes in, as its weights are.
    """
    source, folded = models[0], models[-1]
    widths = [round(model.size.unique_bytes / model.size.unique_parameters) for model in (source, folded)]
    if not all(widths) or widths[0] == widths[1] or not source.size.kv_bytes_per_token:
        return []
    ratio = folded.size.kv_bytes_per_token / source.size.kv_bytes_per_token * widths[0] / widths[1]
    return [
        f"KV cache: a value of {source.name} takes {widths[0]} bytes, one of {folded.name} {widths[1]}; in one format "
        f"the ratio would be {ratio:.2f}×."
    ]


def _sliding_lines(models: Sequence[Measured]) -> list[str]:
    """That not all blocks go on filling the cache, where that is so: the ratio of a token's bytes is of short texts."""
    sizes = {model.name: model.size for model in models}
    if not any(size.num_sliding_blocks for size in sizes.values()):
        return []
    counts = ", ".join(f"{name} {size.num_sliding_blocks} of {size.num_blocks}" for name, size in sizes.items())
    windows = sorted({size.sliding_window for size in sizes.values() if size.sliding_window})
    return [
        f"KV cache: of a text's first {' or '.join(map(whole, windows))} tokens; behind them some blocks do not add to "
        f"it ({counts})."
    ]


def _formats(of_model: Mapping[str, str]) -> str:
    """The number format that was computed in; where the models' differ, that of each: figures differ by it as well.

    Args:
        of_model: name of each model that was measured → its format.
    """
    if len(set(of_model.values())) == 1:
        return next(iter(of_model.values()))
    return " and ".join(f"{written} ({name})" for name, written in of_model.items())


def _task_protocol(models: Sequence[Measured], own: str) -> list[str]:
    """Of the last of some models, with the formats of all.

    Args:
        models: all that were measured.
        own: what the model is called whose accuracy is retained.
    """
    tasks = models[-1].tasks
    if not tasks:
        return []
    first = next(iter(tasks.values())).protocol
    formats = {model.name: next(iter(model.tasks.values())).protocol["dtype"] for model in models if model.tasks}
    items = "; ".join(f"{task} {score.protocol['items']} of {score.protocol['data']}" for task, score in tasks.items())
    truncated = sum(score.protocol["truncated_requests"] for score in tasks.values())
    cut = (
        f" {whole(truncated)} requests were longer than the model's positions and cut on the left." if truncated else ""
    )
    return [
        f"Tasks by {first['harness']}, {first['shots']}-shot, {_formats(formats)}, ± standard error "
        f"over items: {items}. Retained: {own} / source; above chance: ({own} − chance) / (source − chance).{cut}"
    ]


def _written(protocol: dict[str, Any]) -> str:
    """A protocol as `key value` pairs."""
    items = []
    for key, value in protocol.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, int):
            value = whole(value)
        elif isinstance(value, list):
            value = " + ".join(map(repr, value)) if key == "join" else " + ".join(map(str, value))
        items.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(items)


def generation_lines(evaluation: Evaluation) -> Text:
    """What each model wrote after each prompt, always taking the likeliest token; empty if nothing was written."""
    models = [model for model in evaluation.models if model.generations]
    lines = Text()
    for number, generation in enumerate(evaluation.folded.generations or []):
        lines.append("\n" if number else "").append(f"{generation.prompt} …", style="dim")
        for model in models:
            written = model.generations[number].text if model.generations else ""
            lines.append(f"\n  {model.name}:\n").append(textwrap.indent(written.strip("\n"), "    "))
    return lines


def analysis_table(analysis: Analysis) -> Table:
    """One row per block: block influence, its rank, similarity, and the sublayers' influence where known."""
    table = Table()
    for heading in ("block", "BI", "rank", "similarity", "relative update"):
        table.add_column(heading, justify="right", no_wrap=True)
    sublayers = [("attention BI", analysis.attention), ("MLP BI", analysis.mlp)]
    known = [(heading, measures) for heading, measures in sublayers if measures is not None]
    for heading, _ in known:
        table.add_column(heading, justify="right", no_wrap=True)
    ranks = {
        block: rank for rank, block in enumerate(sorted(range(analysis.num_blocks), key=analysis.bi.__getitem__), 1)
    }
    for block in range(analysis.num_blocks):
        table.add_row(
            str(block),
            f"{analysis.bi[block]:.4f}",
            str(ranks[block]),
            f"{analysis.similarity[block]:.4f}",
            f"{analysis.relative_update[block]:.3f}",
            *(f"{measures.bi[block]:.4f}" for _, measures in known),
        )
    return table


def analysis_lines(analysis: Analysis) -> Text:
    """What an analysis was measured on, and what its columns mean."""
    model = analysis.model_type
    if analysis.source is not None:
        revision = f" at {analysis.source.revision}" if analysis.source.revision else ""
        model = f"{analysis.source.spec}{revision} ({analysis.model_type})"
    dtype = "" if analysis.dtype is None else f" in {analysis.dtype}"
    known = analysis.calibration is not None
    on = f"{calibration_words(analysis.calibration.protocol)}; " if analysis.calibration is not None else ""
    windows = "" if known else f" in {analysis.num_windows} windows"
    return Text(
        f"{model}{dtype}, on {on}{analysis.num_tokens:,} tokens{windows}, {analysis.seconds:.0f} s\n"
        "BI (block influence): 1 − mean cosine of a block's input and output; rank 1 changes the stream least.",
        style="dim",
    )


def recovery_lines(result: RecoveryResult) -> Text:
    """What a recovery did, and on what, in two lines."""
    outcome = "merged" if result.best_step else "not kept: training made nothing better"
    text = result.text
    known = {"texts", "context", "num_held_out"} <= text.keys()
    of = f" of {' + '.join(map(text_name, text['texts']))} in windows of {text['context']:,}" if known else ""
    taught = f", taught by {result.teacher['model']}" if "model" in result.teacher else ""
    held_out = f" on {text['num_held_out']:,} held-out tokens" if known else " on held-out windows"
    losses = {"loss": _loss_in_words(result)}
    if result.before.get("kl") not in (None, result.before["loss"]):
        losses["kl"] = f"{result.divergence} to the {'teacher' if 'model' in result.teacher else 'source'}"
    before, after = result.before, result.after
    changes = "; ".join(f"{words} {before[name]:.4f} → {after[name]:.4f}" for name, words in losses.items())
    return Text(
        f"recovery{held_out}: {changes} (step {result.best_step} of {result.num_steps})\n"
        f"{result.num_tokens:,} tokens{of}{taught}, {millions(result.num_trained)} trained parameters {outcome}, "
        f"{result.seconds:,.0f} s; ended by {result.ended}"
    )


def _loss_in_words(result: RecoveryResult) -> str:
    """What was minimised, as the sum that it is."""
    terms = {name: result.settings.get(name) or 0 for name in ("kl", "lm", "last_error", "last_cosine", "states")}
    words = {} if result.divergence == "KL" else {"kl": result.divergence}
    named = [(words.get(name, name), weight) for name, weight in terms.items() if weight]
    parts = [name if weight == 1 else f"{weight:g} {name}" for name, weight in named]
    return f"loss ({' + '.join(parts)})" if parts else "loss"


def compensation_line(record: Mapping[str, Any]) -> Text:
    """What compensation did, as the file beside a folded model says it."""
    before, after = (
        "not finite" if record[name] is None else f"{record[name]:.4f}" for name in ("kl_before", "kl_after")
    )
    outcome = "" if record["kept"] else "; left out"
    return Text(
        f"compensation: KL to the source {before} → {after} nats per token on {record['num_held_out']:,} held-out "
        f"tokens{outcome}"
    )


def sharing_line(record: Mapping[str, Any]) -> Text:
    """What fitting shared weights and private terms came to, as the file beside a folded model says it."""
    members = record["members"]
    kept = sum(bool(member["kept"]) for member in members)
    kl = "not finite" if record["kl"] is None else f"{record['kl']:.4f}"
    return Text(
        f"sharing: fits of {kept} of {len(members)} positions kept; KL to the source {kl} nats per token on "
        f"{record['num_held_out']:,} held-out tokens"
    )


def verification_lines(verification: Verification) -> Text:
    """What was checked of a saved checkpoint, in three lines."""
    reload = "identical" if verification.logits_identical else f"relative error {verification.reload_error:.1e}"
    return Text(
        f"loads as {verification.model_class}; {millions(verification.num_parameters)} parameters, "
        f"{megabytes(verification.weight_bytes)}\n"
        f"logits after reloading: {reload}\n"
        f"decoding with a KV cache against without: relative error {verification.cache_error:.1e}"
    )


def exported_lines(exported: ExportedGGUF) -> Text:
    """What was written for llama.cpp, and how near its predictions are to the model's."""
    lines = [megabytes(exported.num_bytes)]
    if exported.pattern is not None:
        sliding = "".join("s" if each else "F" for each in exported.pattern)
        lines.append(f"attention of each block, full (F) or sliding (s), added to the file: {sliding}")
    if exported.divergence is None:
        lines.append("not verified")
    else:
        lines.append(f"KL divergence of llama.cpp's predictions: {exported.divergence:.1e} nats per token")
        if not exported.same_tokens:
            lines.append("llama.cpp splits text into other tokens than the model's own tokenizer")
    return Text("\n".join(lines))

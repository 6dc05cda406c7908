"""A plan in words: what is cut, who chose it and on which text, what that costs, and what is fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from foldgpt.formats import amount, block_ranges, millions, what_goes
from foldgpt.plan import WITHOUT_TEXT, CalibrationText, FoldPlan


def plan_lines(plan: FoldPlan) -> Text:
    """What the strip of a plan does not show, a line for each: model, cuts, selector, text, search, what is fitted.

    What a plan does not say, such as one that was written by hand, is left out. Costs are as their search measures
    them: see docs/selection.md.
    """
    lines = [_cut_line(plan), *_target_lines(plan), *_chosen_lines(plan), *_cost_lines(plan)]
    if plan.compensation is not None:
        lines.append(
            f"compensation: {plan.compensation.method}, fitted when folding on {_fitted_on(plan.compensation)}"
        )
    elif plan.removed or plan.removed_attention or plan.removed_mlp:
        lines.append("compensation: none")
    if plan.fitting is not None:
        lines.append(f"shared weights and private terms: fitted when folding on {_fitted_on(plan.fitting)}")
    return Text("\n".join(lines), style="dim")


def _cut_line(plan: FoldPlan) -> str:
    """The model, and the source indices of what goes."""
    source = plan.source
    revision = f" at {source.revision}" if source.revision else ""
    gone = {"removed": plan.removed, "attention removed": plan.removed_attention, "MLP removed": plan.removed_mlp}
    parts = [f"{what} {block_ranges(blocks)}" for what, blocks in gone.items() if blocks]
    return f"{source.model}{revision} ({source.model_type}): {'; '.join(parts) or 'no block removed'}"


def _chosen_lines(plan: FoldPlan) -> list[str]:
    origin = plan.origin
    if "selector" not in origin or _removes_nothing(plan):
        return []
    if plan.was_edited:
        return [chosen_words(plan)]
    options = origin.get("options")
    given = dict(options) if isinstance(options, Mapping) else {}
    # The option `seed` of a selector takes the place of the seed of all.
    seed = f", seed {given.pop('seed', origin['seed'])}" if "seed" in origin else ""
    others = "".join(f", {name}={value}" for name, value in given.items())
    protocol = _protocol_of(plan, "calibration")
    what = "calibrated on"
    if origin["selector"] in WITHOUT_TEXT:
        what = "measured on"
        protocol = protocol if _cost_lines(plan) else None
    on = f"; {what} {calibration_words(protocol)}" if protocol is not None else ""
    return [f"{chosen_words(plan)}{seed}{others}{on}"]


def chosen_words(plan: FoldPlan) -> str:
    """Who chose what is removed; a plan whose cut was edited is nobody's choice, and what was measured is not of it.

    Args:
        plan: one that names its selector.
    """
    edited = "edited since it was " if plan.was_edited else ""
    made_for = plan.origin.get("made_for")
    other = f" for {made_for.get('model')}" if isinstance(made_for, Mapping) else ""
    return f"{edited}chosen by {plan.origin['selector']}{other}"


def _cost_lines(plan: FoldPlan) -> list[str]:
    """How far from its source the model is without what a selector chose, and what it took to know."""
    report = plan.origin.get("report")
    if (
        report is None
        or plan.was_edited
        or "made_for" in plan.origin
        or _removes_nothing(plan)
        or not _has_numbers(report, "cost", "num_tokens", "forward_equivalents", "seconds")
    ):
        return []
    what = "KL to the source" if report.get("objective") == "kl" else "language-modelling loss"
    if plan.groups or candidates_of(plan):
        what = f"removal by itself: {what}"
    compensated = bool(report.get("compensated"))
    fit = ", compensated by the quick fit of searches" if compensated else ""
    if fit and _has_numbers(report, "num_prior_tokens") and report["num_prior_tokens"]:
        fit += f" (begun on {report['num_prior_tokens']:,} others)"
    copies = ""
    if _has_numbers(report, "num_copied", "num_positions") and report["num_copied"] and report["num_positions"]:
        copies = f" ({report['num_copied'] / report['num_positions']:.0%} copies of earlier ones)"
    protocol = _protocol_of(plan, "fitted_on")
    of = f" of {' + '.join(map(str, protocol.get('texts') or []))}" if protocol is not None else ""
    lines = [
        f"{what} {report['cost']:.4f} nats per token on {report['num_tokens']:,} calibration tokens{of}{copies}{fit}; "
        f"{report['forward_equivalents']:.1f} forward passes over them, {report['seconds']:,.0f} s"
    ]
    given = report.get("finals")
    finals = [each for each in given if _has_numbers(each, "cost", "num_tokens")] if isinstance(given, list) else []
    if len(finals) > 1:
        fit = ", compensated as folding does it" if compensated else ""
        lines.append(
            f"on {finals[0]['num_tokens']:,} further tokens{fit}: {finals[0]['cost']:.4f}, the next best of "
            f"{len(finals)} sets {finals[1]['cost']:.4f}"
        )
    return lines


def _protocol_of(plan: FoldPlan, name: str) -> Mapping[str, Any] | None:
    """How a text that the origin tells of under a name was read, as far as it says."""
    text = plan.origin.get(name)
    protocol = text.get("protocol") if isinstance(text, Mapping) else None
    return protocol if isinstance(protocol, Mapping) else None


def _removes_nothing(plan: FoldPlan) -> bool:
    """Whether there was nothing to choose for removal; what starts at zero was chosen so."""
    start = plan.at_start
    return not (start.removed or start.removed_attention or start.removed_mlp)


def _target_lines(plan: FoldPlan) -> list[str]:
    """What decided how many blocks go, where that was a target."""
    if plan.was_edited:
        return []
    report = plan.origin.get("report")
    met = report.get("target") if isinstance(report, Mapping) else None
    if not isinstance(met, Mapping) or not _has_numbers(met, "source", "limit", "num_remove"):
        return []
    limit, of_source = (amount(met[name], str(met.get("what"))) for name in ("limit", "source"))
    goes = what_goes(met["num_remove"], sublayers=bool(plan.removed_attention or plan.removed_mlp))
    return [f"target {met.get('target')}: at most {limit} of {of_source}, so {goes}"]


def _fitted_on(text: CalibrationText) -> str:
    return f"{' + '.join(text.texts)}, {text.num_tokens:,} tokens in windows of {text.context:,}"


def calibration_words(protocol: Mapping[str, Any]) -> str:
    """The text of a calibration, and how much of it, by its protocol; as far as that says."""
    texts: Sequence[Any] = protocol.get("texts") or ["a text"]
    words = " + ".join(map(str, texts))
    if _has_numbers(protocol, "windows", "context"):
        windows = "window" if protocol["windows"] == 1 else "windows"
        words += f", {protocol['windows']:,} {windows} of {protocol['context']:,} tokens"
    return words


def _has_numbers(values: Any, *names: str) -> bool:
    """Whether all of these are there, as numbers: what a plan says of its origin is nobody's to check."""
    return isinstance(values, Mapping) and all(isinstance(values.get(name), (int, float)) for name in names)


def candidates_of(plan: FoldPlan) -> list[Mapping[str, Any]]:
    """The ways to spend a budget that a plan's origin tells of, best first, as far as they are whole.

    None where something else is removed than was chosen: the best one is no longer the plan.
    """
    if plan.was_edited:
        return []
    found: Any = plan.origin.get("candidates")
    numbers = ("num_removed", "num_at_zero", "num_shared", "parameters", "kl")
    entries = found if isinstance(found, list) else []
    whole = [entry for entry in entries if _has_numbers(entry, *numbers) and "name" in entry]
    return sorted(whole, key=lambda entry: entry["kl"])


def candidates_table(plan: FoldPlan) -> Table:
    """The ways to spend a budget that were measured for a plan, best first; the first one is the plan.

    Args:
        plan: one that has some.
    """
    table = Table()
    table.add_column("candidate")
    for heading in ("removed", "at zero", "shared", "parameters", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for candidate in candidates_of(plan):
        table.add_row(
            str(candidate["name"]),
            *(str(candidate[name]) for name in ("num_removed", "num_at_zero", "num_shared")),
            millions(candidate["parameters"]),
            f"{candidate['kl']:.4f}",
        )
    return table

"""The three things a person wants to know first: how much smaller, what was lost, what was cut."""

from __future__ import annotations

from dataclasses import dataclass

from foldgpt.evaluation import Evaluation
from foldgpt.formats import block_ranges, megabytes, millions, percent, significant
from foldgpt.plan import FoldPlan
from foldgpt.plan_lines import chosen_words

#: What the members of a group share, in a word.
_SHARED = {
    frozenset({"attention", "mlp"}): "blocks",
    frozenset({"attention"}): "attentions",
    frozenset({"mlp"}): "MLPs",
}


@dataclass(frozen=True)
class Headline:
    """One of them: the question, the answer in a few characters, and what stands behind it."""

    question: str
    answer: str
    unit: str
    details: list[str]


def headlines(plan: FoldPlan, evaluation: Evaluation | None, *, compensated: bool = False) -> list[Headline]:
    """The three answers; what is not known without an evaluation beside a baseline is left out.

    Args:
        plan: what was cut.
        evaluation: what was measured.
        compensated: whether the compensation that the plan asks for was merged: it is left out where it did not help.
    """
    lost = None if evaluation is None else _lost(evaluation)
    answers = [_smaller(plan, evaluation), lost, _cut(plan, compensated)]
    return [answer for answer in answers if answer is not None]


def short_name(model: str) -> str:
    """The last part of a model's name, without the folders or the account before it."""
    return model.rstrip("/").rpartition("/")[2] or model


def _smaller(plan: FoldPlan, evaluation: Evaluation | None) -> Headline | None:
    question = "How much smaller?"
    num_blocks = plan.source.num_blocks
    blocks = f"{num_blocks} → {len(plan.kept)} blocks"
    if evaluation is None or evaluation.baseline is None:
        # What sharing and removed sublayers save is not a number of blocks.
        removed = 1 - len(plan.kept) / num_blocks
        return Headline(question, _less(removed), "blocks", [blocks]) if plan.removed else None
    own, other = evaluation.folded.size, evaluation.baseline.size
    details = [
        f"{millions(other.unique_parameters)} → {millions(own.unique_parameters)}",
        f"{blocks}; {_less(1 - own.block_parameters / other.block_parameters)} of their parameters",
    ]
    if evaluation.folded.bytes_on_disk and evaluation.baseline.bytes_on_disk:
        disk = f"{megabytes(evaluation.baseline.bytes_on_disk)} → {megabytes(evaluation.folded.bytes_on_disk)} on disk"
        details.append(disk)
    return Headline(question, _less(1 - own.unique_parameters / other.unique_parameters), "parameters", details)


def _less(ratio: float) -> str:
    """A saving, written as a change."""
    sign = "−" if ratio > 0 else "+" if ratio < 0 else "±"
    return f"{sign}{percent(abs(ratio))}"


def _lost(evaluation: Evaluation) -> Headline | None:
    folded, source = evaluation.folded, evaluation.baseline
    if source is None:
        return None
    details = []
    if folded.perplexity is not None and source.perplexity is not None:
        texts = " + ".join(folded.perplexity.protocol.get("texts", []))
        known = [model for model in evaluation.models if model.perplexity is not None]
        values = " → ".join(significant(model.perplexity.value) for model in known if model.perplexity is not None)
        named = f" ({', '.join(model.name for model in known)})" if len(known) > 2 else ""
        details.append(f"perplexity {values}{named}{f' on {texts}' if texts else ''}")
    if evaluation.retained is not None:
        kept = evaluation.retained["average"]
        parts = [] if kept.raw is None else [f"{percent(kept.raw)} of the accuracy kept"]
        parts += [] if kept.above_chance is None else [f"{percent(kept.above_chance)} of what is above chance"]
        details.append(f"on {len(folded.tasks or {})} tasks: {', '.join(parts)}")
    if folded.last_word is not None and source.last_word is not None:
        details.append(f"last words found: {percent(source.last_word.accuracy)} → {percent(folded.last_word.accuracy)}")
    ratio = (evaluation.ratios or {}).get("perplexity")
    if ratio is not None:
        return Headline("What was lost?", f"{ratio:.2f}×", "perplexity", details)
    if evaluation.retained is not None:
        points = evaluation.retained["average"].difference
        return Headline("What was lost?", f"{100 * points:+.1f}".replace("-", "−"), "points of accuracy", details)
    return None


def _cut(plan: FoldPlan, compensated: bool) -> Headline:
    details = []
    if plan.removed:
        details.append(f"removed: {block_ranges(plan.removed)}")
    if plan.removed_attention:
        details.append(f"attention removed: {block_ranges(plan.removed_attention)}")
    if plan.removed_mlp:
        details.append(f"MLP removed: {block_ranges(plan.removed_mlp)}")
    at_zero = [group for group in plan.groups if group.start == "zero"]
    hard = [group for group in plan.groups if group.start != "zero"]
    sharing = {block for group in hard for block in group.blocks}
    started = [block for group in at_zero for block in group.started_at_zero]
    for sublayers, noun in _SHARED.items():
        alike = [group for group in hard if set(group.sublayers) == sublayers]
        if alike:
            number = len({block for group in alike for block in group.blocks})
            sets = "set" if len(alike) == 1 else "sets"
            details.append(f"{number} {noun} share {len(alike)} {sets} of weights")
    if at_zero:
        owners = block_ranges([group.holder for group in at_zero])
        details.append(f"only positions left, with the weights of {owners}: {block_ranges(started)}")
    if "selector" in plan.origin:
        details.append(chosen_words(plan))
    if compensated:
        details.append("kept blocks were fitted to make up for it")
    question = "What was cut?"
    touched = len({*plan.removed, *plan.removed_attention, *plan.removed_mlp, *started})
    if touched:
        return Headline(question, str(touched), f"of {plan.source.num_blocks} blocks", details)
    if sharing:
        return Headline(question, str(len(sharing)), f"of {plan.source.num_blocks} blocks share", details)
    return Headline(question, "nothing", "", details)

"""The model card: README.md of a folded checkpoint, as the Hub reads it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

import foldgpt
from foldgpt.artifacts import write_text
from foldgpt.errors import ArtifactError
from foldgpt.evaluation import Evaluation, Measured
from foldgpt.formats import block_ranges, text_name
from foldgpt.history import earlier_history
from foldgpt.plan import FoldPlan
from foldgpt.recovery_result import read_recovery
from foldgpt.report.fits import was_compensated
from foldgpt.report.headline import headlines, short_name
from foldgpt.report.rows import rows_of
from foldgpt.report.templating import templates
from foldgpt.report.training import training_in_words
from foldgpt.strip import plan_strip, what_is_shared
from foldgpt.tables import comparison_table, protocol_lines, task_table

CARD = "README.md"

#: What a folded model has from its source: it is a derivative of it.
_INHERITED = ("license", "license_name", "license_link", "language")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)


def write_model_card(
    folder: str | Path,
    *,
    evaluation: Evaluation | None = None,
    source: str | Path | None = None,
) -> Path:
    """Write README.md into a folded checkpoint: what was done, what it cost, how to load it.

    Args:
        folder: the checkpoint; it holds plan.json.
        evaluation: what was measured of it; without one the card has no numbers, and says so.
        source: the source's folder, or its one file. Licence and languages are taken over from its card, if the folder
            has one.

    Returns:
        The path of the card.

    Raises:
        ArtifactError: the checkpoint holds no plan, a record in it cannot be read, or the card cannot be written.
        PlanError: the plan is not valid.
    """
    folder = Path(folder)
    if not (folder / "plan.json").is_file():
        raise ArtifactError(f"{folder} holds no plan.json: it is not a folded checkpoint.")
    plan = FoldPlan.load(folder)
    evaluation = None if evaluation is None else _without_folders(evaluation)
    compensated, recovery = was_compensated(folder, plan), read_recovery(folder)
    metadata = _metadata(plan, _source_metadata(None if source is None else Path(source)))
    text = (
        templates(html=False)
        .get_template("model_card.md")
        .render(
            metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(),
            name=f"{short_name(plan.source.model)}-folded",
            source_name=short_name(plan.source.model),
            plan=plan,
            base_model=metadata.get("base_model"),
            headlines=headlines(plan, evaluation, compensated=compensated),
            compensated=compensated,
            earlier=[
                f"{training.num_tokens:,} tokens of {' + '.join(map(text_name, training.texts)) or 'a text'}"
                for training in earlier_history(folder).training
            ],
            training=None if recovery is None else training_in_words(recovery, plan.source),
            is_removal_only=plan.is_removal_only,
            strip=plan_strip(plan).plain,
            comparison=None if evaluation is None else rows_of(comparison_table(evaluation)),
            tasks=None if evaluation is None else rows_of(task_table(evaluation)),
            protocol=[] if evaluation is None else protocol_lines(evaluation).plain.splitlines(),
            groups=[f"{what_is_shared(group)} of {block_ranges(group.blocks)}" for group in plan.groups],
            version=foldgpt.__version__,
        )
    )
    path = folder / CARD
    write_text(path, text)
    return path


def _without_folders(evaluation: Evaluation) -> Evaluation:
    """An evaluation for others to read: texts of one name, elsewhere told apart by their folders, are numbered."""
    texts = {
        text: None
        for model in evaluation.models
        for text in (model.text, *(model.further_perplexities or {}))
        if text is not None
    }
    alike, seen = Counter(map(text_name, texts)), Counter[str]()
    named: dict[str, str] = {}
    for text in texts:
        name = text_name(text)
        seen[name] += 1
        named[text] = f"{name} ({seen[name]})" if alike[name] > 1 else name

    def told(model: Measured) -> Measured:
        further, reused = model.further_perplexities, model.reused
        return replace(
            model,
            text=None if model.text is None else named[model.text],
            further_perplexities=further and {named[text]: scores for text, scores in further.items()},
            reused=reused and {named.get(text, text): uses for text, uses in reused.items()},
        )

    figures = {f"perplexity.{text}": f"perplexity.{name}" for text, name in named.items()}
    ratios, baseline, before = evaluation.ratios, evaluation.baseline, evaluation.before_recovery
    return replace(
        evaluation,
        folded=told(evaluation.folded),
        baseline=None if baseline is None else told(baseline),
        before_recovery=None if before is None else told(before),
        ratios=ratios and {figures.get(figure, figure): ratio for figure, ratio in ratios.items()},
    )


def _metadata(plan: FoldPlan, source: dict[str, Any]) -> dict[str, Any]:
    """The card's front matter."""
    name = plan.source.model
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    # A local folder may look like a name on the hub, and the card would name a stranger's model.
    if _HUB_ID.fullmatch(name) and not Path(name).exists():
        metadata["base_model"] = name
    metadata |= {key: source[key] for key in _INHERITED if key in source}
    metadata["tags"] = [
        "foldgpt",
        *(["depth-pruning"] if plan.removed or plan.removed_attention or plan.removed_mlp else []),
        *(["weight-sharing"] if plan.groups else []),
    ]
    return metadata


def _source_metadata(source: Path | None) -> dict[str, Any]:
    """What the source's own card says in its front matter; nothing if it has none that can be read."""
    if source is None:
        return {}
    try:
        found = _FRONT_MATTER.match((source / CARD).read_text(encoding="utf-8"))
        values = yaml.safe_load(found[1]) if found else {}
    # A card is written by people: what is wrong with the source's must not stop ours. A day that there is not, such as
    # the 30th of February, is a ValueError, as text is that is not UTF-8.
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}

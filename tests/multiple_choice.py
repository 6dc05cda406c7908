"""Multiple choice without the harness: prompts written out, one choice scored at a time, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Item:
    """One question: a context and a continuation for each choice; lengths of the choices for `acc_norm`."""

    pairs: list[tuple[str, str]]
    lengths: list[int]
    answer: int


def _same_context(context: str, choices: list[str], answer: int) -> Item:
    return Item([(context, f" {choice}") for choice in choices], [len(choice) for choice in choices], answer)


def _winogrande(row: dict[str, Any]) -> Item:
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return Item([(context, f" {after.strip()}") for context in contexts], [1, 1], int(row["answer"]) - 1)


def _arc(row: dict[str, Any]) -> Item:
    return _same_context(f"Question: {row['question']}\nAnswer:", row["choices"], row["label"])


#: Task → one row, laid out as in the local files, to an item.
ITEMS: dict[str, Callable[[dict[str, Any]], Item]] = {
    "boolq": lambda row: _same_context(
        f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], row["label"]
    ),
    "piqa": lambda row: _same_context(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]),
    "hellaswag": lambda row: _same_context(row["ctx"], row["endings"], row["label"]),
    "winogrande": _winogrande,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": lambda row: _same_context(row["question_stem"], row["choices"], row["label"]),
}


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Log-likelihood of a continuation in nats, white space at the end of the context counted to it."""
    stripped = context.rstrip()
    whole = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(stripped)["input_ids"])
    logits_TV = model(torch.tensor([whole], device=model.device)).logits[0].float().cpu()
    log_probabilities = torch.log_softmax(logits_TV[start - 1 : -1], dim=-1)
    return float(log_probabilities.gather(1, torch.tensor(whole[start:])[:, None]).sum())


def hits(model: Any, tokenizer: Any, items: list[Item]) -> tuple[str, str]:
    """For each item 1 where the answer is right, else 0: by log-likelihood, and by log-likelihood per character."""
    plain, normed = "", ""
    for item in items:
        scores = [log_likelihood(model, tokenizer, *pair) for pair in item.pairs]
        per_character = [score / length for score, length in zip(scores, item.lengths, strict=True)]
        plain += str(int(scores.index(max(scores)) == item.answer))
        normed += str(int(per_character.index(max(per_character)) == item.answer))
    return plain, normed

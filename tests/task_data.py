"""Rows for the seven tasks, laid out as local files are, and as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Task → name of its local file.
FILES = {
    "boolq": "boolq_val.jsonl",
    "piqa": "piqa_valid.jsonl",
    "hellaswag": "hellaswag_val_some.jsonl",
    "winogrande": "winogrande_dev.jsonl",
    "arc_easy": "arc_easy_test.jsonl",
    "arc_challenge": "arc_challenge_test.jsonl",
    "openbookqa": "openbookqa_test.jsonl",
}

_ARC = [
    {"id": "a", "question": "What melts ice?", "choices": ["heat", "a 'cold' wind", '"salt"', "sand"], "label": 0},
    {"id": "b", "question": "Which is a metal?", "choices": ["wood", "iron", "glass"], "label": 1},
    {"id": "c", "question": "What do plants need?", "choices": ["light", "oil", "tin", "gas", "noise"], "label": 0},
    {
        "id": "d",
        "question": "Where do fish live?",
        "choices": ["in trees", "in stone", "in air", "in water"],
        "label": 3,
    },
]

LOCAL: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"id": 0, "question": "is ice cold", "passage": "Ice is frozen water.", "answer": True, "label": 1},
        {"id": 1, "question": "is iron a gas", "passage": "Iron is a metal. ", "answer": False, "label": 0},
        {"id": 2, "question": "do fish swim", "passage": "Fish live in water and swim.", "answer": True, "label": 1},
    ],
    "piqa": [
        {"id": 0, "goal": "Boil an egg", "sol1": "Put it in hot water. ", "sol2": "Put it in sand.", "label": 0},
        {"id": 1, "goal": "dresser", "sol1": "eat it", "sol2": "open the drawer ", "label": 1},
    ],
    "hellaswag": [
        {
            "ind": 7,
            "ctx": "Baking a cake: A woman breaks eggs. She",
            "endings": ["stirs them.", "flies away.", "sings to the eggs for a long time.", "sleeps."],
            "label": 0,
        },
        {
            "ind": 9,
            "ctx": "Home and Garden: How to paint a wall. Clean it first. Dust does not hold.",
            # The harness's clean-up leaves the space that stood after the bracket.
            "endings": [" Eat the dust.", "Use a wet cloth.", "Buy a car.", "Then wait a year."],
            "label": 1,
        },
    ],
    "winogrande": [
        {"id": 0, "sentence": "Ann met Sue because _ was late.", "option1": "Ann", "option2": "Sue", "answer": "2"},
        {
            "id": 1,
            "sentence": "The cup broke the dish as _ was hard.",
            "option1": "cup",
            "option2": "dish",
            "answer": "1",
        },
    ],
    "arc_easy": _ARC,
    "arc_challenge": _ARC[::-1],
    "openbookqa": [
        {"id": "x", "question_stem": "The sun is", "choices": ["a star", "a planet", "a moon", "a lamp"], "label": 0},
        {"id": "y", "question_stem": "Bees make", "choices": ["milk", "honey", "wool", "silk"], "label": 1},
    ],
}


def write_task_data(folder: Path) -> Path:
    """Write the local files of all tasks into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in LOCAL.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / FILES[task]).write_text(text, encoding="utf-8")
    return folder


def _with_letters(row: dict[str, Any]) -> dict[str, Any]:
    letters = "ABCDE"[: len(row["choices"])]
    return {
        **{key: value for key, value in row.items() if key != "label"},
        "choices": {"text": row["choices"], "label": list(letters)},
        "answerKey": letters[row["label"]],
    }


#: The same rows as the data sets on the hub lay them out.
HUB: dict[str, list[dict[str, Any]]] = {
    **LOCAL,
    "boolq": [{**row, "idx": row["id"]} for row in LOCAL["boolq"]],
    "hellaswag": [
        {
            "activity_label": "Baking a cake",
            "ctx_a": "A woman breaks eggs.",
            "ctx_b": "she",
            "endings": LOCAL["hellaswag"][0]["endings"],
            "label": "0",
        },
        {
            "activity_label": "Home and Garden",
            "ctx_a": "[header] How to paint a wall [title] Clean it first. [step] Dust does not hold.",
            "ctx_b": "",
            "endings": ["[step] Eat the dust.", "Use a wet  cloth.", "Buy a car.", "Then wait a year."],
            "label": "1",
        },
    ],
    **{task: [_with_letters(row) for row in LOCAL[task]] for task in ("arc_easy", "arc_challenge", "openbookqa")},
}

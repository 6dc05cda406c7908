"""Whether two models mean the same by a number."""

from __future__ import annotations

from typing import Any

#: Text of several kinds, by which tokenizers are told apart.
_PROBE = "The 2nd fold (of 30) costs $1.50; naïve café, 東京, Привет!\n\n    x = a[0] ** 2  # it's — “so”"


def same_ids(tokenizer: Any, other: Any) -> bool:
    """Whether two tokenizers number words alike; if not, one model's windows mean nothing to the other."""
    ids, others = (each(_PROBE, add_special_tokens=False)["input_ids"] for each in (tokenizer, other))
    return bool(ids == others)

"""What the rows of a comparison were trained on, and whether it was as much as the reference row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldgpt.recovery_result import RecoveryResult

#: Share of the tokens by which two trainings may differ and count as equal: a last step that is not full is left out.
_TOLERANCE = 0.01
#: How `RecoveryResult` calls the end of a training → in words.
_ENDS = {
    "tokens": "all that fill whole steps",
    "time": "until the time was up",
    "patience": "until nothing got better",
}


@dataclass(frozen=True)
class Training:
    """The recovery of one row, from the record that it left.

    Attributes:
        num_tokens: tokens that were trained on.
        ended: what ended it: "tokens", "time" or "patience".
        settings: how it was done, all of them.
    """

    num_tokens: int
    ended: str
    settings: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Training:
        """Read the record in a recovered model.

        Raises:
            ArtifactError: it is missing, or is not what a recovery writes.
        """
        done = RecoveryResult.load(folder)
        return cls(done.num_tokens, done.ended, done.settings)

    def is_as_long_as(self, other: Training) -> bool:
        """Whether both saw as many tokens, but for what does not fill a step."""
        return abs(self.num_tokens - other.num_tokens) <= _TOLERANCE * other.num_tokens

    def differing_from(self, other: Training) -> list[str]:
        """Names of the settings that are not as in the other one."""
        return [name for name, value in self.settings.items() if other.settings.get(name) != value]


def in_words(num_tokens: int, ended: str) -> str:
    """How long a training was, and why not longer."""
    return f"{num_tokens:,} ({_ENDS.get(ended, ended)})"

"""Training windows as a data set: token ids, which of them are scored, and where documents begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from foldgpt.errors import UsageError
from foldgpt.fingerprints import ids_fingerprint
from foldgpt.recovery.distillation import IGNORED


class TrainingWindows(Dataset[dict[str, Tensor]]):
    """Windows in the order in which they are trained on.

    Args:
        ids_WT: token ids, [W, T], of any integer type; may be memory-mapped.
        scored_WT: [W, T], bool or 0 and 1, true where a token is to be predicted; by default everywhere.
        begins_WT: [W, T], likewise, true where a document begins: the documents of a window are kept apart. None lets
            each token see all before it in its window, as in most pre-training.

    Raises:
        UsageError: the shapes do not fit, or nothing is scored.
    """

    def __init__(self, ids_WT: Tensor, scored_WT: Tensor | None = None, begins_WT: Tensor | None = None) -> None:
        if ids_WT.ndim != 2 or ids_WT.shape[0] < 1 or ids_WT.shape[1] < 2:
            raise UsageError(f"windows must be token ids of shape [windows, tokens], got {list(ids_WT.shape)}")
        for name, marks_WT in (("scored tokens", scored_WT), ("beginnings of documents", begins_WT)):
            if marks_WT is not None and marks_WT.shape != ids_WT.shape:
                raise UsageError(f"the mask of {name} is {list(marks_WT.shape)}, the ids are {list(ids_WT.shape)}")
        if scored_WT is not None and not bool(scored_WT[:, 1:].any()):
            raise UsageError("the mask of scored tokens leaves nothing to predict")
        self.ids_WT = ids_WT
        self.scored_WT = scored_WT
        self.begins_WT = begins_WT

    def __len__(self) -> int:
        return len(self.ids_WT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_T = self.ids_WT[index].long()
        labels_T = ids_T if self.scored_WT is None else ids_T.masked_fill(~self.scored_WT[index].bool(), IGNORED)
        item = {"input_ids": ids_T, "labels": labels_T, "window": torch.tensor(index)}
        if self.begins_WT is not None:
            places_T = places_in_documents(self.begins_WT[index : index + 1])[0]
            # The first token of a document does not follow from the one before.
            item |= {"positions": places_T, "labels": labels_T.masked_fill(places_T == 0, IGNORED)}
        return item

    def first(self, num_windows: int) -> TrainingWindows:
        """The first windows alone."""
        scored = None if self.scored_WT is None else self.scored_WT[:num_windows]
        begins = None if self.begins_WT is None else self.begins_WT[:num_windows]
        return TrainingWindows(self.ids_WT[:num_windows], scored, begins)

    def identity(self) -> dict[str, Any]:
        """What tells these windows from others, as plain values."""
        marks = {"scored": self.scored_WT, "begins": self.begins_WT}
        return {
            "ids": ids_fingerprint(self.ids_WT),
            **{name: None if mark is None else ids_fingerprint(mark) for name, mark in marks.items()},
        }


def places_in_documents(begins_BT: Tensor) -> Tensor:
    """Positions that begin again at 0 where a document does, int64 [B, T].

    transformers keeps runs of positions apart in its attention masks.

    Args:
        begins_BT: bool or 0 and 1, true where a document begins.
    """
    places = torch.arange(begins_BT.shape[1], device=begins_BT.device).expand_as(begins_BT)
    return places - torch.where(begins_BT.bool(), places, 0).cummax(dim=1).values

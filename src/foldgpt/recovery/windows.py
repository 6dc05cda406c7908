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
        scored_WT: bool [W, T], True where a token is to be predicted; by default everywhere.
        document_end: keep the documents of a window apart: a token with this id ends one. None lets each token see
            all before it in its window, as in most pre-training.

    Raises:
        UsageError: the shapes do not fit, or nothing is scored.
    """

    def __init__(self, ids_WT: Tensor, scored_WT: Tensor | None = None, document_end: int | None = None) -> None:
        if ids_WT.ndim != 2 or ids_WT.shape[0] < 1 or ids_WT.shape[1] < 2:
            raise UsageError(f"windows must be token ids of shape [windows, tokens], got {list(ids_WT.shape)}")
        if scored_WT is not None and scored_WT.shape != ids_WT.shape:
            raise UsageError(f"the mask of scored tokens is {list(scored_WT.shape)}, the ids are {list(ids_WT.shape)}")
        if scored_WT is not None and not bool(scored_WT[:, 1:].any()):
            raise UsageError("the mask of scored tokens leaves nothing to predict")
        self.ids_WT = ids_WT
        self.scored_WT = scored_WT
        self.document_end = document_end

    def __len__(self) -> int:
        return len(self.ids_WT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_T = self.ids_WT[index].long()
        labels_T = ids_T if self.scored_WT is None else ids_T.masked_fill(~self.scored_WT[index], IGNORED)
        item = {"input_ids": ids_T, "labels": labels_T, "window": torch.tensor(index)}
        if self.document_end is not None:
            places_T = places_in_documents(ids_T[None], self.document_end)[0]
            # The first token of a document does not follow from the one before.
            item |= {"positions": places_T, "labels": labels_T.masked_fill(places_T == 0, IGNORED)}
        return item

    def first(self, num_windows: int) -> TrainingWindows:
        """The first windows alone."""
        scored = None if self.scored_WT is None else self.scored_WT[:num_windows]
        return TrainingWindows(self.ids_WT[:num_windows], scored, self.document_end)

    def identity(self) -> dict[str, Any]:
        """What tells these windows from others, as plain values."""
        scored = None if self.scored_WT is None else ids_fingerprint(self.scored_WT)
        return {"ids": ids_fingerprint(self.ids_WT), "scored": scored, "document_end": self.document_end}


def places_in_documents(ids_BT: Tensor, document_end: int) -> Tensor:
    """Positions that begin again at 0 behind each end of a document, [B, T].

    transformers keeps runs of positions apart in its attention masks.
    """
    places = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    begins = torch.zeros_like(ids_BT)
    begins[:, 1:] = torch.where(ids_BT[:, :-1] == document_end, places[:, 1:], 0)
    return places - begins.cummax(dim=1).values

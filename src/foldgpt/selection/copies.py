"""Windows that end in a copy: whether a removal costs a model the ability to copy from its context.

What a model predicts there it can read off what came before, which is how induction heads are told (Olsson et al. 2022,
arXiv 2209.11895). Ordinary text asks for it now and then, the more the longer it is, so short windows of it hardly tell
which blocks do it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldgpt.errors import UsageError

#: The share of a window, unless another is asked for. With so much, sets are in the order of their perplexity on other
#: text (docs/lab-notebook.md).
COPIES = 0.0625


def with_copies(ids_WT: Tensor, share: float = COPIES) -> tuple[Tensor, Tensor]:
    """The same windows, but that the last part of each is its first part again.

    Args:
        ids_WT: token ids [W, T]. A token that all windows begin with is BOS and is not copied.
        share: of the text in a window, 0 to 0.5.

    Returns:
        The ids [W, T], and bool [W, T]: where they are copies.

    Raises:
        UsageError: the share is not between these.
    """
    if not 0 <= share <= 0.5:
        raise UsageError(f"copies is the share of a window that repeats its beginning, 0 to 0.5, not {share}")
    num_windows, context = ids_WT.shape
    start = int(num_windows > 1 and bool((ids_WT[:, 0] == ids_WT[0, 0]).all()))
    length = int(share * (context - start))
    repeated_WT, copied_WT = ids_WT.clone(), torch.zeros_like(ids_WT, dtype=torch.bool)
    repeated_WT[:, context - length :] = ids_WT[:, start : start + length]
    copied_WT[:, context - length :] = True
    return repeated_WT, copied_WT

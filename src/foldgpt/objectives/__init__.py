"""How far a folded model's predictions are from its source's, computed without a full table of logits."""

from foldgpt.objectives.divergence import cross_entropy, forward_kl, forward_kl_loss
from foldgpt.objectives.head import Head

__all__ = ["Head", "cross_entropy", "forward_kl", "forward_kl_loss"]

"""How far a folded model's predictions are from its source's, computed without a full table of logits."""

from foldgpt.objectives.divergence import cross_entropy, cross_entropy_loss, forward_kl, forward_kl_loss
from foldgpt.objectives.head import Head
from foldgpt.objectives.source_predictions import SourcePredictions

__all__ = ["Head", "SourcePredictions", "cross_entropy", "cross_entropy_loss", "forward_kl", "forward_kl_loss"]

"""How far a folded model's predictions are from its source's, computed without a full table of logits."""

from foldgpt.objectives.divergence import cross_entropy, cross_entropy_loss, forward_kl, forward_kl_loss
from foldgpt.objectives.fused_logits import fused_logit_losses
from foldgpt.objectives.head import Head
from foldgpt.objectives.hidden_losses import cosine_distance, relative_error
from foldgpt.objectives.logit_losses import Divergence, DivergenceLoss
from foldgpt.objectives.source_predictions import SourcePredictions

__all__ = [
    "Divergence",
    "DivergenceLoss",
    "Head",
    "SourcePredictions",
    "cosine_distance",
    "cross_entropy",
    "cross_entropy_loss",
    "forward_kl",
    "forward_kl_loss",
    "fused_logit_losses",
    "relative_error",
]

"""How far a folded model's predictions are from its source's, computed without a full table of logits."""

from foldgpt.objectives.divergence import cross_entropy, forward_kl, product_rows
from foldgpt.objectives.fused_logits import Teaching, compare_products, fused_logit_losses
from foldgpt.objectives.head import Head
from foldgpt.objectives.hidden_losses import cosine_distance, relative_error
from foldgpt.objectives.logit_losses import Divergence, DivergenceLoss
from foldgpt.objectives.reduced_predictions import ReducedPredictions
from foldgpt.objectives.source_predictions import SourcePredictions

__all__ = [
    "Divergence",
    "DivergenceLoss",
    "Head",
    "ReducedPredictions",
    "SourcePredictions",
    "Teaching",
    "compare_products",
    "cosine_distance",
    "cross_entropy",
    "forward_kl",
    "fused_logit_losses",
    "product_rows",
    "relative_error",
]

"""Doing what a plan says to a model, undoing it, and saving the result so that it is known to be right."""

from foldgpt.folding.checkpoint import check_folded_by, check_place, save_folded
from foldgpt.folding.donors import DONORS
from foldgpt.folding.fitted import GroupFit, LowRank, MemberFit
from foldgpt.folding.fold import (
    check_foldable,
    check_same_architecture,
    fold_,
    predicted_parameters,
    source_model_of,
    unfold_,
)
from foldgpt.folding.kinds import is_linear_layer, kind_of, low_rank_leaves, same_kind
from foldgpt.folding.number_format import cast_, round_
from foldgpt.folding.private import private_modules
from foldgpt.folding.verify import Verification, verify_checkpoint

__all__ = [
    "DONORS",
    "GroupFit",
    "LowRank",
    "MemberFit",
    "Verification",
    "cast_",
    "check_foldable",
    "check_folded_by",
    "check_place",
    "check_same_architecture",
    "fold_",
    "is_linear_layer",
    "kind_of",
    "low_rank_leaves",
    "predicted_parameters",
    "private_modules",
    "round_",
    "same_kind",
    "save_folded",
    "source_model_of",
    "unfold_",
    "verify_checkpoint",
]

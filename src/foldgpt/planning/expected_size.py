"""How large a folded model will be, before anything is searched."""

from __future__ import annotations

from transformers import PreTrainedModel

from foldgpt.families import decoder_of
from foldgpt.folding import predicted_parameters, same_kind, source_model_of
from foldgpt.plan import SUBLAYERS, FoldPlan
from foldgpt.planning.groups import cut_of, groups_for
from foldgpt.planning.selecting import num_removed
from foldgpt.recipe import Recipe
from foldgpt.selection import Request, select
from foldgpt.targets import target


def expected_parameters(recipe: Recipe, model: PreTrainedModel) -> int | None:
    """Parameters of the folded model, before anything is searched; None where they depend on what a search finds.

    They do not where a number of blocks goes, all of one size, and those that share are all of one kind as well.

    Args:
        recipe: what is cut.
        model: the source; it may be on the meta device.
    """
    decoder = decoder_of(model)
    num_blocks = len(decoder.blocks)
    section = recipe.share
    wanted = None if recipe.select.target is None else target(recipe.select.target)
    if wanted is not None and wanted.what != "parameters":
        return None
    sizes = {sum(parameter.numel() for parameter in block.parameters()) for block in decoder.blocks}
    if section.method == "auto" or recipe.select.sublayers or len(sizes) != 1:
        return None
    num_remove = num_removed(recipe, model)
    if section.method == "none":
        return sum(parameter.numel() for parameter in model.parameters()) - num_remove * sizes.pop()
    # The attention of the first kept block has to stay, so not every removed one may come back without its own.
    is_partial = set(section.sublayers) != set(SUBLAYERS)
    if is_partial or not all(same_kind(decoder, 0, index, SUBLAYERS) for index in range(num_blocks)):
        return None
    any_blocks = select("last", Request(num_blocks, num_remove))
    cut = cut_of(recipe, any_blocks, groups_for(recipe, decoder, any_blocks))
    return predicted_parameters(model, FoldPlan.create(source_model_of(model, name=recipe.model), **cut))

"""A loaded model seen as what matters here: its list of blocks and what is inside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foldgpt.errors import UnsupportedModelError
from foldgpt.families.table import Sublayers, family_of, sublayers_of
from foldgpt.plan import Sublayer


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model and the places inside it.

    Attributes:
        model: the causal language model.
        config: the config that describes the blocks (the text config of a multimodal model).
        model_type: the source architecture, also when the model is a folded one.
        blocks_path: dotted path of the list of blocks, e.g. "model.layers".
        blocks: the list itself, in order of depth.
        sublayers: names of the sublayers inside a block, or None when the family has no entry.
    """

    model: nn.Module
    config: Any
    model_type: str
    blocks_path: str
    blocks: nn.ModuleList
    sublayers: Sublayers | None

    def modules(self, index: int, sublayer: Sublayer) -> tuple[str, ...]:
        """The modules of one sublayer of block `index`; the last one returns its output.

        In a block that does not attend, what stands in the attention's place. The family's sublayers must be known.
        """
        assert self.sublayers is not None
        names = self.sublayers.modules(sublayer)
        if sublayer == "attention" and not self.attends(index):
            block = self.blocks[index]
            return next(((name,) for name in self.sublayers.mixers if hasattr(block, name)), names)
        return names

    def attends(self, index: int) -> bool:
        """Whether block `index` has an attention, and nothing else in its place. The sublayers must be known."""
        assert self.sublayers is not None
        return not self.sublayers.mixers or hasattr(self.blocks[index], self.sublayers.attention[-1])

    @property
    def body(self) -> nn.Module:
        """What holds the blocks: the model without its head, from token ids to the last hidden states."""
        return self.model.get_submodule(self.blocks_path.rpartition(".")[0])

    def set_blocks(self, blocks: nn.ModuleList) -> None:
        """Put another list of blocks in place of the present one."""
        setattr(self.body, self.blocks_path.rpartition(".")[2], blocks)


def decoder_of(model: nn.Module) -> Decoder:
    """Find the blocks of a causal language model.

    Raises:
        UnsupportedModelError: this is no model of transformers, the blocks are not where the family (or the usual
            shape) has them, or their number is not the config's.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no model of transformers. Where it is a wrapper around one (torch.compile, "
            "DataParallel, peft), give the model inside it"
        )
    whole_config: Any = model.config
    config = whole_config.get_text_config(decoder=True)
    model_type = getattr(whole_config, "source_model_type", whole_config.model_type)
    path = family_of(model_type).blocks
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        raise UnsupportedModelError(
            f"no list of blocks at {path!r} in {type(model).__name__} (model type {model_type!r}). "
            "Only decoder-only models whose blocks are one list can be folded; "
            "a family that keeps them elsewhere needs a row in foldgpt/families/table.py."
        )
    if len(blocks) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(blocks)} blocks, but its config says "
            f"num_hidden_layers={config.num_hidden_layers}."
        )
    return Decoder(model, config, model_type, path, blocks, sublayers_of(model_type, config))

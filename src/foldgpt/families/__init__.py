"""Model families as data: where blocks and sublayers live, and which config fields depend on the block index."""

from foldgpt.families.attention_kinds import attending_blocks, attention_kinds, first_of_each_kind
from foldgpt.families.code import brings_own_code
from foldgpt.families.config_fields import check_config, check_kept, read_blocks, remap_config_
from foldgpt.families.decoder import Decoder, decoder_of
from foldgpt.families.decoding import decode, input_device
from foldgpt.families.positions import num_positions
from foldgpt.families.table import FAMILIES, OUTPUT_MATRICES, SPECIAL_FIRST_BLOCK, Family, Sublayers, family_of

__all__ = [
    "FAMILIES",
    "OUTPUT_MATRICES",
    "SPECIAL_FIRST_BLOCK",
    "Decoder",
    "Family",
    "Sublayers",
    "attending_blocks",
    "attention_kinds",
    "brings_own_code",
    "check_config",
    "check_kept",
    "decode",
    "decoder_of",
    "family_of",
    "first_of_each_kind",
    "input_device",
    "num_positions",
    "read_blocks",
    "remap_config_",
]

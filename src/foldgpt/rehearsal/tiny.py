"""A tiny random stand-in for a model: the same architecture and number of blocks, everything else small."""

from __future__ import annotations

import copy
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from foldgpt.architectures import known_architectures
from foldgpt.artifacts import from_home
from foldgpt.errors import SourceError, UnsupportedModelError, first_line
from foldgpt.sources import load_config, resolve, stored_dtype
from foldgpt.sources.configs import read_config
from foldgpt.sources.locate import check_is_no_path

#: One head's channels, most heads, tokens of the vocabulary.
_HEAD_DIM, _MOST_HEADS, _VOCABULARY = 8, 4, 320
#: Most experts, of which a token goes through at most so many.
_MOST_EXPERTS, _MOST_CHOSEN = 4, 2
#: Widths are multiples of this: grouped products of experts want rows of 16 bytes.
_STEP = 8
#: What families call the channels of a head, of all kinds.
_HEAD_CHANNELS = (
    "head_dim",
    "rotary_dim",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
#: Numbers of experts, of those that a token goes through, and of the groups that they are chosen from.
_MOST_OF_MIXTURES = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), _MOST_EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), _MOST_CHOSEN),
    **dict.fromkeys(("n_group", "topk_group"), 1),
}
#: What families call the width of the MLP.
_MLP_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_SPECIAL = ("<bos>", "<eos>", "<unk>")
_WORDS = ("the", "stream", "passes", "each", "block", "and", "few", "of", "them", "change", "it", "much", "so", "go")


def config_of(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a model: from its files, or, for hub models that are known by shape, without a network.

    Args:
        model: as in `resolve`.
        revision: branch, tag or commit of a hub model; its shape is that of its files.
        trust_remote_code: whether the real model runs code that comes with it.

    Raises:
        SourceError: there is no such model, or its config cannot be had.
        UsageError: a revision of a model that has none.
        UnsupportedModelError: the model is not a decoder-only language model, is quantised, or runs code of its own.
    """
    known = known_architectures()
    is_here = from_home(model).exists() or model.startswith("demo:")
    if model in known and revision is None and not is_here:
        values = dict(known[model].config)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    if not is_here:
        check_is_no_path(model)
    place = resolve(model, revision=revision) if is_here else _fetched(model, revision)
    if trust_remote_code and place.is_dir() and "auto_map" in read_config(place):
        raise UnsupportedModelError(
            f"a dry run cannot use a model's own code, which {model} brings and trust_remote_code asks for. If "
            "transformers knows the model without it, leave trust_remote_code out."
        )
    config = load_config(place)
    if is_here and getattr(config, "dtype", None) is None:
        # What is loaded as it is stored takes its format from the weights then; there may be none yet.
        with suppress(SourceError):
            config.dtype = stored_dtype(place)
    return config


def _fetched(model: str, revision: str | None) -> Path:
    """A folder with the config of a hub model."""
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision)).parent
    except Exception as error:  # the hub client raises errors of several libraries
        at = "" if revision is None else f" at revision {revision!r}"
        raise SourceError(
            f"cannot read the config of {model}{at}: {first_line(error)}. Known by shape, without a network and a "
            f"revision: {', '.join(known_architectures())}."
        ) from error


def shrunk(config: Any) -> Any:
    """A config of the same architecture and number of blocks, narrow enough to run in no time.

    Raises:
        UnsupportedModelError: the model is not a decoder whose config is flat.
    """
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModelError(f"a dry run needs a plain text model, and {config.model_type} is more than that")
    for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"):
        if not isinstance(getattr(config, name, None), int):
            raise UnsupportedModelError(
                f"a dry run needs a decoder of attention blocks, and the config of {config.model_type} has no {name}"
            )
    heads = min(_MOST_HEADS, config.num_attention_heads)
    changes: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": heads * _HEAD_DIM,
        "num_attention_heads": heads,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    shared = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    changes["num_key_value_heads"] = max(1, heads // shared)
    for name in _MLP_WIDTHS:
        # As much wider than the stream as in the real model, so that attention is as much of a block.
        if getattr(config, name, None):
            width = heads * _HEAD_DIM * getattr(config, name) / config.hidden_size
            changes[name] = max(1, round(width / _STEP)) * _STEP
    for name, value in (
        *((name, _HEAD_DIM) for name in _HEAD_CHANNELS),
        ("num_kv_heads", changes["num_key_value_heads"]),
        ("word_embed_proj_dim", heads * _HEAD_DIM),
        ("sliding_window", 16),
        ("moe_intermediate_size", 16),
        ("shared_expert_intermediate_size", 16),
    ):
        # Some configs reckon the channels of a head from the others.
        if getattr(config, name, None) and not isinstance(getattr(type(config), name, None), property):
            changes[name] = value
    for name, most in _MOST_OF_MIXTURES.items():
        if isinstance(value := getattr(config, name, None), int) and value:
            changes[name] = min(most, value)
    small = copy.deepcopy(config)
    for name, value in changes.items():
        if hasattr(small, name) or name.endswith("_id"):
            setattr(small, name, value)
    return small


def save_tiny(config: Any, folder: Path, *, seed: int = 0) -> Path:
    """Save a random model of a small config with a tokenizer, as a source would be found on disk.

    Raises:
        UnsupportedModelError: the small config makes no model that runs.
    """
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            model(input_ids=torch.arange(4)[None], use_cache=False)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"a dry run needs a tiny {config.model_type}, and with the sizes that foldgpt gives it (in "
            f"foldgpt/rehearsal/tiny.py) it does not run: {first_line(error)}"
        ) from error
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    vocabulary = {token: index for index, token in enumerate(_SPECIAL)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def write_text_file(path: Path, *, num_words: int = 4000, seed: int = 0) -> Path:
    """A text of some words in disorder, a document a line."""
    order = random.Random(seed)
    lines = [" ".join(order.choices(_WORDS, k=40)) for _ in range(num_words // 40)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path

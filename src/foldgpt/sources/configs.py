"""Configs of models, and which models are refused by their config alone."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from foldgpt.errors import SourceError, UnsupportedModelError, first_line
from foldgpt.progress import quiet_libraries
from foldgpt.sources.reading import as_source_errors

#: By this file transformers knows that an adapter lies in a folder.
ADAPTER = "adapter_config.json"


class UntrustedCodeError(UnsupportedModelError):
    """The model needs code that comes with its checkpoint, and that is not trusted."""


def load_config(place: Path, *, trust_remote_code: bool = False) -> Any:
    """The config of a model in a Hugging Face folder, or in a GGUF file.

    Raises:
        SourceError: it cannot be read, or an adapter lies beside it.
        UnsupportedModelError: the model is not a decoder-only language model, is quantised, or needs code that is
            not trusted.
    """
    if place.is_file():
        return gguf_config(place)
    if (place / ADAPTER).is_file():
        # transformers would put it on the model without a word, and no identity of the model covers it.
        raise SourceError(
            f"{place} holds an adapter ({ADAPTER}) beside the model. Merge it into the weights (peft's "
            "merge_and_unload), or take it out of the folder."
        )
    values = read_config(place)
    if (quantisation := values.get("quantization_config")) is not None:
        named = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        method = named or "unknown method"
        raise UnsupportedModelError(f"{place} is quantised ({method}). Fold full-precision weights, quantise last.")
    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        if "auto_map" in values and not trust_remote_code:
            raise UntrustedCodeError(
                f"{place} needs code that comes with the checkpoint. Read it, then pass --trust-remote-code."
            ) from error
        raise SourceError(f"cannot read {place / 'config.json'}: {first_line(error)}") from error
    _check_decoder_only(config, place)
    return config


def check_config_file(place: Path) -> None:
    """Refuse the model in a folder by its config.json alone; the weights need not be there.

    Whether code that comes with it is trusted is not known here: what only that code could tell is left to
    `load_config`.

    Raises:
        SourceError: the config cannot be read.
        UnsupportedModelError: the model is not a decoder-only language model, or is quantised.
    """
    with suppress(UntrustedCodeError):
        load_config(place)


def read_config(place: Path) -> dict[str, Any]:
    """The raw values of config.json; a `SourceError` where it is no JSON object."""
    path = place / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise SourceError(f"{path} does not hold a JSON object")
    return values


def gguf_config(path: Path) -> Any:
    """The config that a GGUF file amounts to; refuses what is no decoder-only language model."""
    with quiet_libraries(), as_source_errors(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    _check_decoder_only(config, path)
    return config


def _check_decoder_only(config: Any, place: Path) -> None:
    """Refuse what does not predict the next token of a text: encoders, and models of two halves."""
    architectures = getattr(config, "architectures", None) or []
    # gpt_neox says is_decoder=False too, so that alone decides nothing.
    encoder = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", True)
    other_head = bool(architectures) and all(
        name.endswith(("ForMaskedLM", "ForPreTraining", "Classification", "QuestionAnswering", "MultipleChoice"))
        for name in architectures
    )
    own_class = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    known = own_class or type(config) in AutoModelForCausalLM._model_mapping
    if getattr(config, "is_encoder_decoder", False) or encoder or other_head or not known:
        what = ", ".join(architectures) or config.model_type
        raise UnsupportedModelError(f"{place} ({what}) is not a decoder-only language model")

"""The config of a folded checkpoint: the source's own config, plus what is shared and what is absent.

This file travels inside each folded checkpoint, so it imports transformers and the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPE = "foldgpt"

#: Called with the source architecture when its folded config class is made (registers the model classes).
on_first_use: list[Callable[[str], None]] = []


class FoldedConfig:
    """Front of the folded config classes: makes the one that fits the source architecture.

    A folded Llama has a `FoldedLlamaConfig`, which is a `LlamaConfig` with three more fields:

    - `source_model_type` (`str`): the source architecture, e.g. "llama".
    - `fold_plan` (`dict`): the plan the model was folded by.
    - `fold_layout` (`dict`): which modules each position borrows from another, and which are absent; see
      `modeling_foldgpt.apply_layout_`.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        """Load the config of a folded checkpoint; arguments as for any transformers config."""
        from transformers import PreTrainedConfig

        config_dict, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return folded_config_class(_source_type(config_dict)).from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make the config from its dictionary form."""
        return folded_config_class(_source_type(config_dict)).from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: every folded config names its own code in `auto_map`."""


def _source_type(config_dict: dict[str, Any]) -> str:
    source_type: Any = config_dict.get("source_model_type")
    if source_type not in CONFIG_MAPPING:
        raise ValueError(
            f"config.json of a folded model must name its architecture in 'source_model_type'; found {source_type!r}, "
            "which this version of transformers does not know."
        )
    return source_type


def folded_config_class(source_model_type: str) -> Any:
    """The config class of folded models of one architecture: a subclass of the source's own."""
    if source_model_type not in _classes:
        _classes[source_model_type] = _make_config_class(source_model_type)
        for callback in on_first_use:
            callback(source_model_type)
    return _classes[source_model_type]


_classes: dict[str, Any] = {}


def _make_config_class(source_model_type: str) -> type:
    source_class = CONFIG_MAPPING[source_model_type]
    name = f"Folded{source_class.__name__}"
    folded = type(
        name,
        (source_class,),
        {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{source_class.__name__} of a folded model; see `FoldedConfig`.",
            "model_type": MODEL_TYPE,
        },
    )
    globals()[name] = folded  # so that instances can be pickled by name
    return folded


def __getattr__(name: str) -> Any:
    """Make the class `Folded<X>` of a class X of transformers: a pickle names it where nothing has asked for it yet."""
    source_class: Any = getattr(transformers, name.removeprefix("Folded"), None) if name.startswith("Folded") else None
    is_of_transformers = isinstance(source_class, type) and issubclass(source_class, transformers.PreTrainedConfig)
    if is_of_transformers and source_class.model_type in CONFIG_MAPPING:
        return folded_config_class(source_class.model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

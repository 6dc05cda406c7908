"""Registers the folded classes with transformers; imported once, by `foldgpt.autoload`."""

from __future__ import annotations

from transformers.models.auto.configuration_auto import AutoConfig

from foldgpt.modeling import configuration_foldgpt


def _register_models(source_model_type: str) -> None:
    from foldgpt.modeling import modeling_foldgpt

    modeling_foldgpt.register(source_model_type)


AutoConfig.register(configuration_foldgpt.MODEL_TYPE, configuration_foldgpt.FoldedConfig, exist_ok=True)
configuration_foldgpt.on_first_use.append(_register_models)

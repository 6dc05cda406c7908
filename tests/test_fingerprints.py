"""What tells models apart that are alike in shape."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from foldgpt.fingerprints import weights_fingerprint
from models import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_changed_value_anywhere_is_another_model(dtype: torch.dtype) -> None:
    """Whoever trains a few rows of an embedding has another model, whose states are others."""
    model = tiny_model("llama").to(dtype)
    known = weights_fingerprint(model)
    assert weights_fingerprint(copy.deepcopy(model)) == known
    for name in ("model.embed_tokens", "model.layers.3.mlp.down_proj"):
        weight = model.get_submodule(name).weight
        for row, column in ((0, 1), (17, 30), (-1, -1)):
            given = weight.detach()[row, column].clone()
            with torch.no_grad():
                weight[row, column] = given * 2 + 1
            assert weights_fingerprint(model) != known, (name, row, column)
            with torch.no_grad():
                weight[row, column] = given
    assert weights_fingerprint(model) == known


def test_buffers_that_are_saved_belong_to_a_model_and_others_do_not() -> None:
    """A router's correction of its scores is one; rotary frequencies are made with the model."""
    module = nn.Linear(3, 2)
    module.register_buffer("correction", torch.zeros(2))
    module.register_buffer("made", torch.zeros(2), persistent=False)
    known = weights_fingerprint(module)
    module.made.fill_(1)
    assert weights_fingerprint(module) == known
    module.correction.fill_(1)
    assert weights_fingerprint(module) != known


def test_names_shapes_and_formats_count() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    known = weights_fingerprint(model)
    with torch.no_grad():
        model[0].weight = nn.Parameter(model[0].weight.reshape(4, 2))
    assert weights_fingerprint(model) != known
    assert weights_fingerprint(nn.ModuleDict({"x": model[0]})) != weights_fingerprint(model)
    assert weights_fingerprint(copy.deepcopy(model).double()) != weights_fingerprint(model)

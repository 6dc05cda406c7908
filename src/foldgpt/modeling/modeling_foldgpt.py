"""Folded models: the source's own classes, in which some positions borrow modules and some lack them.

One mechanism serves every architecture. The class of a folded Llama is a subclass of `LlamaForCausalLM` that
builds the stock model and then applies the `fold_layout` of its config: a borrowed leaf module (a linear
layer, the experts of a mixture) is not registered a second time but reached through its owner, so it has one
parameter, one entry in the state dict, one place for a quantiser, an adapter or an offload hook. What is
private to a position (its `layer_idx`, its norms) stays in the position's own modules; a scale or a low-rank
term that a position has beside shared weights is a `PrivateTerms` in the leaf's place.

This file travels inside each folded checkpoint, so it imports torch, transformers and its neighbour only.
"""

from __future__ import annotations

import copy
import functools
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.pytorch_utils import Conv1D

from .configuration_foldgpt import FoldedConfig, folded_config_class

LAYOUT_VERSION = 2
#: Version 1 had no private terms.
_READ_VERSIONS = (1, 2)

#: What `auto_map` says, so that the checkpoint also loads where foldgpt is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_foldgpt.FoldedConfig",
    "AutoModel": "modeling_foldgpt.FoldedModel",
    "AutoModelForCausalLM": "modeling_foldgpt.FoldedForCausalLM",
}


#: The files that load a folded checkpoint, and lie beside it.
_CODE = ("configuration_foldgpt.py", "modeling_foldgpt.py")


class Borrowed:
    """Stands where a leaf module was, and calls the one that another position owns.

    It is not an `nn.Module`: nothing that walks the model meets the shared weights twice. The owner's module
    is looked up at each call, so whatever replaces it there (a quantised layer, an adapter) is used here too.

    Args:
        holder: the module that has the owned leaf as a child.
        name: the child's name.
    """

    def __init__(self, holder: nn.Module, name: str) -> None:
        self._holder = holder
        self._name = name

    @property
    def owned(self) -> nn.Module:
        """The module that is borrowed."""
        return getattr(self._holder, self._name)

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        owned, home = self.owned, hidden.device
        # A linear layer has its weight itself. Looking further takes longer than all else here.
        weight: torch.Tensor | None = owned._parameters.get("weight")
        if weight is None:
            weight = next(owned.parameters(), None)
        # Blocks may sit on different devices. Offloaded weights are on "meta": their hook moves the input.
        if weight is not None and weight.device != home and weight.device.type != "meta":
            away = weight.device
            hidden, args, kwargs = _to(away, hidden), _to(away, args), _to(away, kwargs)
        return _to(home, owned(hidden, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.owned, name)

    def __repr__(self) -> str:
        return f"Borrowed({self._name} of {type(self._holder).__name__})"


class PrivateTerms(nn.Module):
    """In place of a leaf: shared weights, and beside them what one position has for itself.

    A shared leaf W x + b becomes s ∘ (W x + b) + U D x. The low-rank term is outside the scale, so that it learns
    from the first step where scales begin at 0.

    Args:
        shared: the leaf itself at the position that owns it, `Borrowed` at the others.
        inputs: I, size of the leaf's inputs; read only with a rank.
        outputs: O, size of its outputs.
        rank: R of the low-rank term; 0 for none.
        scale: whether there is a scale.

    Attributes:
        scale: s [O], or None.
        up: U [O, R], or None.
        down: D [R, I], or None.
    """

    def __init__(self, shared: Any, *, inputs: int, outputs: int, rank: int, scale: bool) -> None:
        super().__init__()
        if isinstance(shared, nn.Module):
            self.shared = shared
        else:
            self.__dict__["shared"] = shared
        self.scale = nn.Parameter(torch.ones(outputs)) if scale else None
        self.up = nn.Parameter(torch.zeros(outputs, rank)) if rank else None
        self.down = nn.Parameter(torch.randn(rank, inputs) / max(inputs, 1) ** 0.5) if rank else None

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the leaf has together with its terms; some models look at it (its dtype) beside the call."""
        weight: Any = self.shared.weight
        transposed = isinstance(getattr(self.shared, "owned", self.shared), Conv1D)
        if self.scale is not None:
            weight = weight * (self.scale if transposed else self.scale[:, None])
        if self.up is None or self.down is None:
            return weight
        term = self.up @ self.down
        return weight + (term.T if transposed else term)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.shared(hidden, *args, **kwargs)
        if self.up is None or self.down is None:
            return output if self.scale is None else output * self.scale
        term = nn.functional.linear(nn.functional.linear(hidden, self.down), self.up)
        return output + term if self.scale is None else torch.addcmul(term, output, self.scale)


def _to(device: torch.device, value: Any) -> Any:
    """Move the tensors in a value to a device; no copy where they are there already."""
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(device, item) for item in value)
    if isinstance(value, dict):
        return {key: _to(device, item) for key, item in value.items()}
    return value


class Absent(nn.Module):
    """In place of a removed sublayer: contributes zero to the residual stream.

    Args:
        returns_pair: whether the sublayer returned a pair (attention: output and weights).
        layer_idx: slot of an attention in the KV cache; None where there is never a cache.
    """

    def __init__(self, returns_pair: bool, layer_idx: int | None = None) -> None:
        super().__init__()
        self.returns_pair = returns_pair
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        if not self.returns_pair:
            return zeros
        if self.layer_idx is not None:
            # Blocks hand the cache on under several names: cache, past_key_values, layer_past.
            for value in (*args, *kwargs.values()):
                if isinstance(value, Cache):
                    _pass_slot(value, self.layer_idx, hidden_states)
        return zeros, None


def _pass_slot(cache: Cache, layer_idx: int, hidden_states: torch.Tensor) -> None:
    """Do for a slot of the KV cache that stays empty what must be done for each: keys and values of width 0 go in.

    A sliding window that was never filled cannot be cropped, which assisted decoding does; and an offloaded cache
    fetches the next slot whenever one is filled.
    """
    slot = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if cache.offloading or isinstance(slot, DynamicSlidingWindowLayer):
        nothing = hidden_states.new_empty(hidden_states.shape[0], 1, hidden_states.shape[1], 0)
        cache.update(nothing, nothing, layer_idx)


def apply_layout_(model: nn.Module, layout: dict[str, Any]) -> None:
    """Give a stock model with the right number of blocks the structure of a folded one, in place.

    Args:
        model: causal language model or base model of the source architecture.
        layout: `{"version": 2, "blocks": path, "borrowed": [...], "private": [...], "absent": [...]}`. Each entry
            of "borrowed" is `{"position": p, "owner": q, "modules": [names inside the block]}`; each of "private"
            is `{"position": p, "module": name, "inputs": I, "outputs": O, "rank": R, "scale": bool}`, the arguments
            of `PrivateTerms`, also at an owner; each of "absent" is
            `{"position": p, "returns_pair": [names], "returns_tensor": [names], "passed_through": [names]}`:
            sublayers replaced by zero, and modules that serve them replaced by the identity.

    Raises:
        ValueError: the layout is of a later version of foldgpt.
    """
    if layout["version"] not in _READ_VERSIONS:
        raise ValueError(
            f"this folded checkpoint has layout version {layout['version']}; this code reads versions up to "
            f"{LAYOUT_VERSION}. Update foldgpt."
        )
    blocks = _blocks_of(model, layout["blocks"])
    for entry in layout.get("private", []):
        add_private_terms_(
            blocks[entry["position"]],
            entry["module"],
            inputs=entry["inputs"],
            outputs=entry["outputs"],
            rank=entry["rank"],
            scale=entry["scale"],
        )
    for entry in layout["borrowed"]:
        for name in entry["modules"]:
            borrow_(blocks[entry["position"]], blocks[entry["owner"]], name)
    for entry in layout["absent"]:
        block = blocks[entry["position"]]
        for name in entry["returns_pair"]:
            block.set_submodule(name, Absent(returns_pair=True, layer_idx=entry["position"]))
        for name in entry["returns_tensor"]:
            block.set_submodule(name, Absent(returns_pair=False))
        for name in entry["passed_through"]:
            block.set_submodule(name, nn.Identity())


def add_private_terms_(block: nn.Module, name: str, *, inputs: int, outputs: int, rank: int, scale: bool) -> None:
    """Put `PrivateTerms` around the leaf module `name` of `block`, with the leaf's own dtype and device."""
    leaf = block.get_submodule(name)
    terms = PrivateTerms(leaf, inputs=inputs, outputs=outputs, rank=rank, scale=scale)
    reference = next(leaf.parameters())
    # Under a device context (transformers builds models on "meta") all of this is there already.
    terms.to(device=reference.device, dtype=reference.dtype)
    block.set_submodule(name, terms)


def borrow_(block: nn.Module, owner: nn.Module, name: str) -> None:
    """Let `block` use the leaf module `name` of `owner` in place of its own, which is dropped."""
    holder, leaf = shared_place(block, name)
    delattr(holder, leaf)
    holder.__dict__[leaf] = Borrowed(*shared_place(owner, name))


def give_back_(block: nn.Module, name: str) -> None:
    """Undo `borrow_`: the block gets a module of its own again, a copy of the one it borrowed."""
    holder, leaf = shared_place(block, name)
    borrowed = holder.__dict__.pop(leaf)
    holder.add_module(leaf, copy.deepcopy(borrowed.owned))


def shared_place(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Where the leaf `name` itself is, below private terms if it has them: the module that holds it, and its name."""
    parent, _, leaf = name.rpartition(".")
    holder = block.get_submodule(parent)
    terms = getattr(holder, leaf)
    # By its name: a model that was loaded by the copy of this file in its checkpoint has the copy's class.
    return (terms, "shared") if type(terms).__name__ == PrivateTerms.__name__ else (holder, leaf)


def _blocks_of(model: nn.Module, path: str) -> Any:
    """The list of blocks; `path` is that of the causal language model, of which `model` may be the base."""
    prefix = f"{model.base_model_prefix}."
    try:
        return model.get_submodule(path)
    except AttributeError:
        return model.get_submodule(path.removeprefix(prefix))


class FoldedMixin:
    """Makes a stock transformers class build and save the folded structure."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        apply_layout_(self, config.fold_layout)  # type: ignore[arg-type]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """As of the source's class: transformers looks for it in the file of the class, which is this one."""
        source_class: Any = next(base for base in cls.__mro__[1:] if not issubclass(base, FoldedMixin))
        return bool(source_class._can_set_attn_implementation())

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the code that loads the checkpoint is saved with it."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copy_code_to(save_directory)
        # Sources name weights in files otherwise than in memory (each expert by itself, say), which transformers
        # translates by their model type. A folded model has another one, and is loaded by the names in memory.
        self._weight_conversions: list[Any] = []
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: Any) -> dict[str, float]:
        """As in transformers, without the code: what is not named here counts as new, so an upload has it too."""
        timestamps = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: time for name, time in timestamps.items() if name not in _CODE}


def copy_code_to(folder: Any) -> None:
    """Put the files that load a folded checkpoint beside it."""
    here = Path(__file__).parent
    for name in _CODE:
        if (here / name).resolve() != (Path(folder) / name).resolve():
            shutil.copyfile(here / name, Path(folder) / name)


@functools.cache
def folded_model_class(source_class: Any, model_type: str) -> Any:
    """The class of folded models whose source has the given class (a causal or a base model) and architecture.

    One class may serve several architectures: an Exaone is a `LlamaForCausalLM` with a config of its own.
    """
    own = source_class.config_class
    config_class = folded_config_class(model_type)
    name = f"Folded{source_class.__name__}"
    if own.model_type != model_type:
        kind = source_class.__name__.removeprefix(own.__name__.removesuffix("Config"))
        name = f"{config_class.__name__.removesuffix('Config')}{kind}"
    folded = type(
        name,
        (FoldedMixin, source_class),
        {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{source_class.__name__} with removed or shared parts.",
            "config_class": config_class,
        },
    )
    setattr(sys.modules[__name__], name, folded)  # so that instances can be pickled by name
    return folded


def __getattr__(name: str) -> Any:
    """Make the class `Folded<X>` of a class X of transformers: a pickle names it where nothing has asked for it yet."""
    source_class: Any = getattr(transformers, name.removeprefix("Folded"), None) if name.startswith("Folded") else None
    is_of_transformers = isinstance(source_class, type) and issubclass(source_class, PreTrainedModel)
    if is_of_transformers and getattr(source_class.config_class, "model_type", None) in CONFIG_MAPPING:
        return folded_model_class(source_class, source_class.config_class.model_type)
    # Of an architecture that uses another one's class, the name is made of its config's.
    for model_type, config_name in CONFIG_MAPPING_NAMES.items():
        if name.startswith(f"Folded{config_name.removesuffix('Config')}"):
            for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
                config_class = CONFIG_MAPPING[model_type]
                if config_class in mapping:
                    folded = folded_model_class(mapping[config_class], model_type)
                    if folded.__name__ == name:
                        return folded
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


#: Arguments of `from_pretrained` that say where files come from.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class _Front:
    """Loads a folded checkpoint into the class that fits its architecture."""

    _mapping: Any

    @classmethod
    def class_for(cls, config: Any) -> Any:
        """The model class for a folded config."""
        source_config_class: Any = type(config).__mro__[1]
        return folded_model_class(cls._mapping[source_config_class], source_config_class.model_type)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Load a folded checkpoint; arguments as in transformers."""
        config = kwargs.pop("config", None)
        if config is None:
            where = {name: kwargs[name] for name in _WHERE if name in kwargs}
            config = FoldedConfig.from_pretrained(pretrained_model_name_or_path, **where)
        return cls.class_for(config).from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Build a folded model with random weights."""
        return cls.class_for(config)._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do: every folded config names its own code in `auto_map`."""


class FoldedForCausalLM(_Front):
    """Front of the folded causal language models."""

    _mapping = MODEL_FOR_CAUSAL_LM_MAPPING


class FoldedModel(_Front):
    """Front of the folded base models (no language-modelling head)."""

    _mapping = MODEL_MAPPING


def register(source_model_type: str) -> None:
    """Make the Auto classes load folded models of one architecture without remote code."""
    config_class = folded_config_class(source_model_type)
    source_config_class = config_class.__mro__[1]
    for auto, mapping in ((AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING), (AutoModel, MODEL_MAPPING)):
        if source_config_class in mapping:
            model_class = folded_model_class(mapping[source_config_class], source_model_type)
            auto.register(config_class, model_class, exist_ok=True)

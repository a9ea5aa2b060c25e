"""All that the adapter knows of transformers' internals: names, attention and caches.

Releases rename what they do not document: 5.24 calls ``cache`` what was ``past_key_values``. So
signatures are inspected, not assumed, and no other module of the package touches internals.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Arguments = dict[str, Any]
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

WITH_NOTHING = ("mlp", "moe")
WITH_STATES = ("conv", "linear_attention", "hybrid")
CACHE_NAMES = ("cache", "past_key_values", "layer_past")


def tested_versions() -> SpecifierSet:
    """The releases of transformers that this package declares; any, if it is not installed."""
    try:
        declared = map(Requirement, metadata.requires("claa-ops") or ())
    except metadata.PackageNotFoundError:
        return SpecifierSet()
    return next(
        (each.specifier for each in declared if each.name == "transformers"), SpecifierSet()
    )


def untested() -> str | None:
    """A sentence if the installed transformers is not one that the tests ran with."""
    found, tested = transformers.__version__, tested_versions()
    if tested.contains(found, prereleases=True):
        return None
    return (
        f"claa_ops is tested with transformers{tested}, found {found}: "
        f"pip install 'transformers{tested}'"
    )


try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import (
        Cache,
        DynamicLayer,
        LinearAttentionLayer,
        StaticLayer,
        get_layer_types_and_kwargs,
    )
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError as _error:
    raise ImportError(f"{untested() or 'transformers is incomplete'} ({_error})") from _error

__all__ = [
    "AttentionFunction",
    "Cache",
    "DynamicLayer",
    "GenerationMixin",
    "LinearAttentionLayer",
    "PreTrainedConfig",
    "PreTrainedModel",
    "StaticLayer",
    "sdpa_mask",
]


# What a module's forward takes.


def parameters(module: nn.Module) -> list[str]:
    """The names of what a module's forward takes, compiled or not."""
    return list(inspect.signature(getattr(module, "_orig_mod", module).forward).parameters)


def bind(names: list[str], args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """All arguments by name: models differ in what they pass by position."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def cache_name(names: Iterable[str]) -> str | None:
    """What these parameters call the cache; None if there is none among them."""
    names = set(names)
    return next((name for name in CACHE_NAMES if name in names), None)


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, by whichever name; None if there is none."""
    found = (arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None)
    return next(found, None)


def cache_argument(module: nn.Module, cache: Any) -> Arguments:
    """The keyword argument, by its name, that hands a cache to a module."""
    return {cache_name(parameters(module)) or CACHE_NAMES[0]: cache}


# What a model is made of.


def decoder_of(model: PreTrainedModel) -> Any:
    """The module that runs the layers, or what comes nearest to it.

    Raises:
        TypeError: this is not a model of transformers.
    """
    if not hasattr(model, "get_decoder"):
        raise TypeError(
            f"attach: model must be a decoder of transformers, got {type(model).__name__}"
        )
    found = model.get_decoder()
    candidates = (found, getattr(found, "model", None), model.base_model)
    return next((each for each in candidates if hasattr(each, "layers")), found)


def is_encoder_decoder(config: PreTrainedConfig) -> bool:
    """Whether the model has an encoder of its own for the prompt."""
    return bool(config.is_encoder_decoder)


def has_alibi(config: PreTrainedConfig, taken: Iterable[str]) -> bool:
    """Whether layers that take these arguments add a bias by distance to their logits."""
    return bool({"alibi", "position_bias"} & set(taken)) and getattr(config, "alibi", True)


def placement(model: PreTrainedModel) -> str | None:
    """What is wrong with where the weights are; None if they are on devices that a forward uses."""
    processes, heads = _processes(model), _shared_heads(model)
    if processes == 1 and any(map(_is_split, model.parameters())):
        return "be the whole model that was loaded tensor parallel, got a part of it"
    uneven = [number for number in heads if number % processes]
    if uneven:
        return f"have key/value heads that {processes} processes share evenly, got {uneven[0]}"
    devices = {parameter.device.type for parameter in model.parameters()}
    if "meta" in devices:
        moved = any(hasattr(module, "_hf_hook") for module in model.modules())
        where = "the CPU or the disk (device_map)" if moved else "the meta device: load them first"
        return f"have its weights in memory, got some that are on {where}"
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 and not hasattr(model, "hf_device_map"):
        return f"be on one device or spread by a device_map, got {', '.join(sorted(devices))}"
    return None


def tensor_parallel_group(model: PreTrainedModel) -> ProcessGroup | None:
    """The processes that have the model's heads among them; None if there is only this one.

    With the plan of some families each has all heads; merging their rankings is then not needed,
    but changes no order.
    """
    if _processes(model) == 1:
        return None
    mesh: Any = model._device_mesh
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()


def _processes(model: PreTrainedModel) -> int:
    return getattr(model, "tp_size", None) or 1


def _is_split(weight: Tensor) -> bool:
    """Whether other processes have other parts of a weight that this one never gathers."""
    # The mesh has no names in 5.17; those of other kinds of parallelism always have.
    return isinstance(weight, DTensor) and "tp" in (weight.device_mesh.mesh_dim_names or ["tp"])


def _shared_heads(model: PreTrainedModel) -> list[int]:
    """For each layer the number of key/value heads that the processes have among them."""
    keys = ("k_proj", "qkv_proj", "query_key_value")
    plan = getattr(model, "tp_plan", None) or {}
    if not any(name.endswith(keys) and style == "colwise" for name, style in plan.items()):
        return []  # each has all
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "per_layer_config", None) or [config]
    return [
        getattr(each, "num_key_value_heads", None) or each.num_attention_heads for each in layers
    ]


class LayerKind(NamedTuple):
    """What a layer of the text model keeps of the tokens before.

    Attributes:
        name: as in ``config.layer_types``.
        window: the sliding window of its attention; None without one.
        states: how many convolutions it has, each with its state; 0 for attention alone.
    """

    name: str
    window: int | None = None
    states: int = 0

    @property
    def attends(self) -> bool:
        """Whether it has attention, perhaps beside a recurrence."""
        return self.name in ("full_attention", "sliding_attention", "hybrid")


def cache_layers(config: PreTrainedConfig) -> list[LayerKind]:
    """The kind of each layer of the text model."""
    config = config.get_text_config(decoder=True)
    kinds, settings = get_layer_types_and_kwargs(config)
    named = getattr(config, "layer_types", None) or kinds
    kinds = [name if name in WITH_NOTHING else kind for name, kind in zip(named, kinds)]  # noqa: B905
    # 5.17 has one setting for all layers, a window also for those without.
    each = [settings] * len(kinds) if isinstance(settings, dict) else settings
    return [
        LayerKind(kind, _window(kind, setting), _states(kind, setting))
        for kind, setting in zip(kinds, each, strict=True)
    ]


def _window(kind: str, setting: Arguments) -> int | None:
    return setting.get("sliding_window") if kind == "sliding_attention" else None


def _states(kind: str, setting: Arguments) -> int:
    return setting.get("number_of_states", 1) if kind in WITH_STATES else 0


def vocabulary_size(config: PreTrainedConfig) -> int:
    """The size of the text model's vocabulary."""
    return config.get_text_config(decoder=True).vocab_size


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a text model, as its configuration has them.

    Attributes:
        hidden_size, vocab_size, heads, head_dim: as in the configuration; the last of the first
            layer, where layers differ.
        kinds: of each layer.
        experts, experts_used: how many experts a layer has, and how many a token goes to; None
            for dense layers.
    """

    hidden_size: int
    vocab_size: int
    heads: int
    head_dim: int
    kinds: list[LayerKind]
    experts: int | None
    experts_used: int | None


def dimensions(config: PreTrainedConfig) -> Dimensions:
    """Read the sizes of a text model from its configuration."""
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    # Where layers differ, the configuration has one for each, from 5.24 on.
    first = next(iter(getattr(config, "per_layer_config", None) or [config]))
    experts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts"))
    return Dimensions(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        heads=heads,
        head_dim=getattr(first, "head_dim", None) or config.hidden_size // heads,
        kinds=cache_layers(config),
        experts=next(filter(None, experts), None),
        experts_used=getattr(config, "num_experts_per_tok", None),
    )


# Attention is a function that the configuration names.


def attention_name(module: Any) -> str:
    """The name of the attention that a model or decoder is configured to compute."""
    return module.config._attn_implementation


def attention_can_be_set(module: Any) -> bool:
    """Whether a decoder calls the attention function that its configuration names."""
    return module._can_set_attn_implementation()


def set_attention(module: Any, name: str) -> None:
    """Have a model or decoder compute the attention of this name."""
    if attention_name(module) != name:
        module.set_attn_implementation(name)


def attention_function(name: str) -> AttentionFunction:
    """The attention function of this name."""
    return ALL_ATTENTION_FUNCTIONS[name]


def is_registered(name: str) -> bool:
    """Whether this process has an attention function and a mask of this name."""
    return name in ALL_ATTENTION_FUNCTIONS and name in ALL_MASK_ATTENTION_FUNCTIONS


def mask_function(name: str) -> Callable[..., Any]:
    """What makes the mask for the attention function of this name."""
    return ALL_MASK_ATTENTION_FUNCTIONS[name]


def register_attention_function(
    name: str, attention: AttentionFunction, mask: Callable[..., Any]
) -> None:
    """Give a name to an attention function and to what makes its mask, for this process."""
    AttentionInterface.register(name, attention)
    # Without this twin the model would find no mask for the name, and ignore padding.
    AttentionMaskInterface.register(name, mask)

"""What `generate` and the caches of attached models tell each other."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from claa_ops.huggingface.prompt import check_prompt, check_room
from claa_ops.huggingface.transformers_api import (
    Cache,
    GenerationMixin,
    LayerKind,
    cache_argument,
    cache_of,
)
from claa_ops.selection.parallel import Reduce


class AttachedCache(Cache):
    """A cache that only an attached model may fill."""

    in_forward = False
    reduce: Reduce | None = None  # of the model whose forward it is, if that has not all heads
    kinds: tuple[LayerKind, ...]  # of each layer
    prefilling = False  # whether this forward is that of the prompt

    def begin_forward(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> None:
        """Called by an attached model before its layers.

        Args:
            tokens: ``[B, n]``, ids, or ``[B, n, width]``, embeddings.
            attention_mask: ``[B, seen + n]``, 0 where there is padding.
            position_ids: ``[B, n]``, if given.
        """
        self.in_forward = True

    def end_forward(self) -> None:
        """Called by an attached model after its layers."""
        self.in_forward = False

    @property
    def has_selected(self) -> bool:
        """Whether the layers so far have dropped tokens of the prompt."""
        return False

    def begin_generate(self, request: Request) -> None:
        """Called by ``generate`` before anything else: refuse what no forward can notice."""

    def end_generate(self, request: Request, output: Any) -> None:
        """Called by ``generate`` with what it returns."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of a layer; return all that its attention should see."""
        if not self.in_forward:
            raise RuntimeError(
                f"{type(self).__name__}: the model must be attached, call "
                "claa_ops.prefill.attach(model) first; got a forward of a model that is not"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Request:
    """The arguments of one ``generate``."""

    def __init__(self, model: Any, arguments: dict[str, Any]) -> None:
        self.model = model
        self._arguments = {**arguments, **arguments.get("kwargs", {})}
        ids = self._arguments.get("inputs")
        ids = self._arguments.get("input_ids") if ids is None else ids
        embedded = self._arguments.get("inputs_embeds") is not None
        self.input_ids: Tensor | None = None if embedded else ids
        self.attention_mask: Tensor | None = self._arguments.get("attention_mask")

    def setting(self, name: str) -> Any:
        """A setting of generation, looked up where ``generate`` does; None if it is not set."""
        configs = self._arguments.get("generation_config"), self.model.generation_config
        values = self._arguments.get(name), *(getattr(config, name, None) for config in configs)
        return next((value for value in values if value is not None), None)


def new_cache(model: Any, arguments: dict[str, Any]) -> AttachedCache | None:
    """A cache for a call that brings none, inside ``attached(model, method)``; else None."""
    make = getattr(model, "claa_new_cache", None)
    used = arguments.get("use_cache") is not False and cache_of(arguments) is None
    return make() if make is not None and used else None


def _watch(generate: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Found by its type: the name of the argument differs between releases of transformers.
        cache = next((x for x in kwargs.values() if isinstance(x, AttachedCache)), None)
        if cache is None and (cache := new_cache(self, kwargs)) is not None:
            kwargs |= cache_argument(self, cache)
        if cache is None:
            return generate(self, *args, **kwargs)
        request = Request(self, dict(signature.bind(self, *args, **kwargs).arguments))
        if request.input_ids is not None:
            check_prompt("generate", self, request.input_ids)
            new = request.setting("max_new_tokens")
            if new is not None:
                check_room("generate", self, request.input_ids.shape[1], new)
        cache.begin_generate(request)
        output = generate(self, *args, **kwargs)
        cache.end_generate(request, output)
        return output

    return watched


# No forward sees whether its tokens are the whole prompt or a part that `generate` cut off, nor
# what came before them; `generate` does. Without an AttachedCache it works as before. The class is
# patched and not each attached model: an attribute that refers to its model would keep it alive.
GenerationMixin.generate = _watch(GenerationMixin.generate)  # type: ignore[method-assign]

"""What ``additional_config["claa"]`` says: a method, its settings, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from claa_ops.chat import NAMES, part_names
from claa_ops.methods import FastKV, Pruning, find_method, make_method
from claa_ops.selection import Budget, begin
from claa_ops.selection.budget import is_count


@dataclass(frozen=True)
class Settings:
    """A method for a model of a known depth, and where it cuts the model in two.

    Attributes:
        method: the method.
        num_layers: how many layers the model has.
        layer: the selection layer, the last that sees whole prompts.
        budget: how many tokens of a prompt go deeper.
        observed: the layers whose queries and keys the method ranks by, ascending; ``layer`` is the
            last of them.
        min_prompt: shorter prompts are served whole.
        protect: the parts of chats that are never dropped, unless a request says otherwise.
        compressed: the layers up to ``layer`` whose caches are compressed once a prompt is over;
            the last of them is ``layer``, if there is any.
    """

    method: Pruning
    num_layers: int
    layer: int
    budget: Budget
    observed: tuple[int, ...]
    min_prompt: int = 0
    compressed: range = range(0)
    protect: tuple[str, ...] = ()

    def kept(self, prompt: int) -> int:
        """How many tokens of a prompt of this length go deeper, if its request asks for nothing."""
        return kept_tokens(prompt, self.budget, self.method.window, self.min_prompt)

    def cached(self, prompt: int, kept: int) -> int:
        """How many tokens of a prompt, of which so many go deeper, compressed caches keep."""
        if not self.compressed:
            return prompt
        return cached_tokens(prompt, kept, self.method.cache_budget, self.method.window)


def kept_tokens(prompt: int, budget: Budget, window: int, min_prompt: int) -> int:
    """How many tokens of a prompt go deeper: of one shorter than ``min_prompt`` all."""
    return prompt if prompt < min_prompt else min(prompt, budget.tokens(prompt, window))


def cached_tokens(prompt: int, kept: int, budget: Budget, window: int) -> int:
    """How many tokens of a prompt a compressed cache keeps: no fewer than go deeper."""
    return min(prompt, max(kept, budget.tokens(prompt, window)))


def parse(given: Any, num_layers: int) -> Settings:
    """The settings, checked for a model of ``num_layers`` layers.

    Args:
        given: a mapping of ``method``, its name, ``min_prompt``, the length below which prompts are
            served whole, ``protect``, parts of chats by name, and of any of that method's settings.
        num_layers: how many layers the model has.

    Raises:
        ValueError: a setting is unknown or out of its range, or vLLM cannot serve the method.

    Example:
        >>> parse({"method": "peak", "keep": 0.1}, num_layers=32).layer
        8
    """
    if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
        raise ValueError(
            'claa: additional_config["claa"] must name a method, such as {"method": "peak"}, '
            f"got {given!r}"
        )
    if not issubclass(find_method(given["method"]), Pruning):
        raise ValueError(
            "claa: method must drop tokens after a layer by what its last queries attend to, such "
            f"as claa, peak, fastkv or hops, got {given['method']!r}"
        )
    values = {key: _plain(value) for key, value in given.items() if key != "method"}
    min_prompt = values.pop("min_prompt", 0)
    if not is_count(min_prompt, 0):
        raise ValueError(
            f"claa: min_prompt must be a number of tokens, at least 0, got {min_prompt!r}"
        )
    protect = _part_names(values.pop("protect", ()))
    # By default the layers up to the selection keep whole caches; the others all that they see.
    values.setdefault("keep_kv", 1.0)
    method = make_method(given["method"], num_layers=num_layers, **values)
    assert isinstance(method, Pruning)
    _check(method)
    method.check(num_layers)
    ((layer, budget),) = method.stages(num_layers).items()
    compressed = range(0)
    cached = method.cache_budget
    if cached.count != cached.per:
        _check_caches(method, budget)
        compressed = range(min(method.first_full, layer + 1), layer + 1)
        if not cached.per:  # the method leaves prompts alone that are shorter
            min_prompt = max(min_prompt, cached.count)
    state = begin(method, num_layers=num_layers, prompt_length=2**20)
    observed = tuple(index for index in range(layer + 1) if method.informs(state, index))
    if not observed or observed[-1] != layer:
        raise ValueError(
            f"claa: method must rank by its selection layer {layer}, got one that ranks by layers "
            f"{list(observed)}"
        )
    return Settings(method, num_layers, layer, budget, observed, min_prompt, compressed, protect)


def _part_names(given: Any) -> tuple[str, ...]:
    if given == () or given is None:
        return ()
    names = part_names(given)
    if names is None:
        raise ValueError(f"claa: protect must name any of {', '.join(NAMES)}, got {given!r}")
    return tuple(names)


def _plain(value: Any) -> Any:
    """JSON has lists where the settings of a method are tuples."""
    return tuple(value) if isinstance(value, list) else value


def _check(method: Pruning) -> None:
    """Refuse what the plan of a step, made before it runs, cannot know or serve."""
    layers = method.layer if isinstance(method.layer, tuple) else (method.layer,)
    method.require(len(layers) == 1, "layer", "a single layer in vLLM")
    method.require(method.mass is None, "mass", "None in vLLM")
    method.require(not method.second_look, "second_look", "False in vLLM")
    method.require(not method.in_layer, "in_layer", "False in vLLM")
    method.require(method.attention_share == 1, "attention_share", "1 in vLLM")
    prompt = getattr(method, "rates_of", "prompt") == "prompt"
    method.require(prompt, "rates_of", "'prompt' in vLLM, where a request may keep a number")
    kind, name = type(method), type(method).__name__
    own = kind.select is not Pruning.select or kind.stages is not Pruning.stages
    if own or kind.take_up is not Pruning.take_up or method.may_park:
        raise ValueError(
            f"claa: method must select once, after a layer that is known at the start, got {name}"
        )
    if method.two_pass or method.needs_ranking or method.reads_hidden:
        raise ValueError(
            f"claa: method must rank in one pass by queries, keys and values, got {name}"
        )


def _check_caches(method: Pruning, keep: Budget) -> None:
    """Refuse compressed caches of which it is not known beforehand how much they keep."""
    kind, cached = type(method), method.cache_budget
    enough = bool(cached.per) == bool(keep.per) and not keep.exceeds(cached)
    method.require(
        enough,
        "keep_kv",
        "1.0, or at least keep and like it a rate or a number, in vLLM, where the layers behind "
        "the selection keep all that they see",
    )
    method.require(not method.equal_cache, "equal_cache", "False in vLLM")
    own = kind.compress is not Pruning.compress or kind.compressible is not Pruning.compressible
    if own or kind.capacity not in (Pruning.capacity, FastKV.capacity):
        raise ValueError(
            "claa: with keep_kv below 1 the caches of a method must all keep as many tokens, "
            f"which are known beforehand, got {kind.__name__}"
        )

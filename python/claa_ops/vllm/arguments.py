"""The arguments that make vLLM serve a model with a selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from claa_ops.vllm.architectures import ARCHITECTURES
from claa_ops.vllm.groups import Groups, layers_near
from claa_ops.vllm.settings import Settings, parse


def engine_args(
    model: str,
    *,
    method: str = "peak",
    layer: int | None = None,
    keep: float | int = 0.1,
    min_prompt: int = 0,
    protect: str | Sequence[str] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for a model with a selection.

    Args:
        model: a Hugging Face directory or a hub id.
        method: the name of a method that ranks by the prompt's last queries.
        layer: the selection layer, from 0; None for the method's own at this depth, or the one
            next to it whose caches vLLM pads less.
        keep: the share, or number, of a prompt's tokens that the layers after it see.
        min_prompt: prompts of fewer tokens are served whole.
        protect: parts of chats that are never dropped unless a request says otherwise, such as
            ``"system,tools"``: see :class:`claa_ops.prefill.ChatParts`.
        settings: any other setting of the method, such as ``keep_kv``: what the caches of the
            layers up to the selection keep of a prompt that is over; all by default.

    Returns:
        ``model``, ``hf_overrides`` and ``additional_config``.

    Raises:
        ValueError: the model is of another family, or a setting is unknown or out of its range.

    Example::

        llm = vllm.LLM(**claa_ops.vllm.engine_args(model, method="peak", keep=0.1))
    """
    architecture, num_layers = _read(model)
    given = {"method": method, "keep": keep, "min_prompt": min_prompt, **settings}
    if protect:
        given["protect"] = protect if isinstance(protect, str) else list(protect)
    if layer is None:
        layer = _roomy(parse(given, num_layers))
    given["layer"] = layer
    parse(given, num_layers)
    return {
        "model": model,
        "hf_overrides": {"architectures": [architecture]},
        "additional_config": {"claa": given},
    }


def plan(model: str, given: dict[str, Any]) -> list[str]:
    """What will be done, in a few lines for whoever starts a server."""
    _, num_layers = _read(model)
    settings = parse(given, num_layers)
    groups = _groups(settings, settings.layer)
    share = _share(settings)
    lines = [
        f"claa: {given['method']} after layer {settings.layer}: {groups.front} layers see whole "
        f"prompts, {groups.back} see {_amount(given['keep'])} of them"
        + (f", of prompts of {settings.min_prompt} tokens or more" if settings.min_prompt else ""),
        f"claa: {groups.gain(*share):.2f} times as many prompts of {_PROMPT:,} tokens fit the "
        f"cache, of which padding takes {groups.waste(*share):.0%}",
    ]
    if settings.compressed:
        lines[1:1] = [
            f"claa: when a prompt is over, the caches of layers {settings.compressed[0]} to "
            f"{settings.layer} keep {share[1]:.0%} of it"
        ]
    if settings.protect:
        lines.append(f"claa: never dropped beside them: {', '.join(settings.protect)}")
    best = _roomy(settings)
    if best != settings.layer:
        waste = _groups(settings, best).waste(*share)
        lines.append(f"claa: after layer {best} padding would take {waste:.0%}")
    return lines


_PROMPT = 32_768  # for what depends on the length of a prompt


def _read(model: str) -> tuple[str, int]:
    """Our architecture for the model, and its depth."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    named = (config.architectures or [None])[0]
    if f"Claa{named}" not in ARCHITECTURES:
        served = ", ".join(name.removeprefix("Claa") for name in ARCHITECTURES)
        raise ValueError(f"claa: the model must be one of {served}, got {named}")
    return f"Claa{named}", config.get_text_config().num_hidden_layers


def _groups(settings: Settings, layer: int) -> Groups:
    near = layers_near(layer, reach=0, **_sizes(settings))
    return near[0][1]


def _share(settings: Settings) -> tuple[float, float]:
    """Of a long prompt, what goes deeper and what compressed caches keep."""
    kept = settings.kept(_PROMPT)
    return kept / _PROMPT, settings.cached(_PROMPT, kept) / _PROMPT


def _sizes(settings: Settings) -> dict[str, Any]:
    keep, keep_kv = _share(settings)
    first_full = settings.method.first_full
    return dict(num_layers=settings.num_layers, keep=keep, keep_kv=keep_kv, first_full=first_full)


def _roomy(settings: Settings) -> int:
    """The layer next to the chosen one, or itself, that leaves most room in the caches."""
    return layers_near(settings.layer, reach=1, **_sizes(settings))[0][0]


def _amount(keep: float | int) -> str:
    return f"{keep:.0%}" if isinstance(keep, float) else f"{keep} tokens"

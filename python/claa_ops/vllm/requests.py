"""What a request may ask of the selection, and what follows from it.

A request asks by ``SamplingParams(extra_args=...)``, or in an OpenAI server by ``vllm_xargs``::

    {"claa_keep": 0.3}                      # of this prompt, keep 30 %
    {"claa_keep": 512}                      # or so many tokens
    {"claa_keep": "all"}                    # or all: as without selection
    {"claa_protect": [0, 120, 300, 340]}    # never drop tokens 0 to 119 and 300 to 339
    {"claa_protect": "0,120,300,340"}       # the same, where a server takes no lists
    {"claa_protect": "system,tools"}        # nor what the chat template puts there
    {"claa_protect": "none"}                # nothing, where the server protects by itself

The front end checks it (:func:`resolve`) and writes down how many tokens are kept. Scheduler and
workers read that number, so they agree, and nothing that a request says can stop them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from claa_ops.chat import NAMES, NoChatTemplate, part_names
from claa_ops.selection import Budget
from claa_ops.vllm.settings import Settings

KEEP, PROTECT = "claa_keep", "claa_protect"
# Written by the front end alone.
KEPT = "claa_kept"

Spans = tuple[tuple[int, int], ...]
Named = Callable[[Sequence[str]], list[int]]  # where the parts with these names begin and end


def resolve(
    asked: Mapping[str, Any] | None,
    settings: Settings,
    prompt: int,
    named: Named | None = None,
) -> dict[str, Any]:
    """What a request asks for, checked, with the number of tokens that it keeps.

    Args:
        asked: the request's ``extra_args``.
        settings: those of the model.
        prompt: how many tokens the prompt has.
        named: where it has the parts that are protected by name, as begin, end, begin, ...; None
            if its tokens are not known.

    Returns:
        The new ``extra_args``; names have become positions.

    Raises:
        ValueError: it asks for what there is not.

    Example:
        >>> from claa_ops.vllm.settings import parse
        >>> settings = parse({"method": "claa", "keep": 0.1}, num_layers=32)
        >>> resolve({"claa_keep": 0.5}, settings, prompt=1000)["claa_kept"]
        500
    """
    given = dict(asked or {})
    for name in given:
        if name.startswith("claa") and name not in (KEEP, PROTECT):
            raise ValueError(f"claa: a request may set {KEEP} and {PROTECT}, got {name}")
    default = None if prompt < settings.min_prompt else settings.budget
    budget = _budget(given[KEEP]) if KEEP in given else default
    if PROTECT in given:
        spans = _spans_of(given[PROTECT], prompt, named)
    elif settings.protect and named is not None:
        spans = _spans(_parts_of_chat(settings.protect, named), prompt)
    else:
        spans = ()
    if spans or PROTECT in given:
        given[PROTECT] = list(chain(*spans))
    asks = KEEP in given or bool(spans)
    given[KEPT] = _kept(budget, spans, settings, prompt) if asks else settings.kept(prompt)
    return given


def kept_of(params: Any) -> int | None:
    """How many tokens go deeper, as the front end has written it down in a request's parameters."""
    kept: int | None = _extra(params).get(KEPT)
    return kept


def protected_of(params: Any) -> Spans:
    """Of which tokens none may be dropped: ascending, disjoint spans ``[begin, end)``."""
    flat = _extra(params).get(PROTECT, ())
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _extra(params: Any) -> Mapping[str, Any]:
    return getattr(params, "extra_args", None) or {}


def _budget(keep: Any) -> Budget | None:
    """None for all tokens."""
    if keep == "all":
        return None
    budget = None if isinstance(keep, bool) else Budget.of(keep)
    if budget is None:
        raise ValueError(
            f'claa: {KEEP} must be a rate in (0, 1], a number of tokens or "all", got {keep!r}'
        )
    return budget


def _parts_of_chat(names: Sequence[str], named: Named) -> list[int]:
    """Where a prompt has them; nowhere as long as no chat template is known: it is no chat."""
    try:
        return named(names)
    except NoChatTemplate:
        return []


def _spans_of(protect: Any, prompt: int, named: Named | None) -> Spans:
    """What a request protects, by position or by name."""
    parts = _parts(protect)
    names = _names(parts, protect)
    if names and named is None:
        raise ValueError(
            f"claa: {PROTECT} must be positions where a prompt comes as embeddings, got {protect!r}"
        )
    return _spans(named(names) if names and named else parts, prompt)


def _parts(protect: Any) -> Any:
    """What a request lists; with commas between in a string, which any server takes."""
    if protect == "none":
        return []
    if not isinstance(protect, str):
        return protect

    def is_position(part: str) -> bool:
        return part.strip().isdecimal() and len(part) < 20  # Python reads no number of 4,301 digits

    return [int(part) if is_position(part) else part for part in protect.split(",")]


def _names(parts: Any, protect: Any) -> list[str]:
    """The names among the parts; none if these are positions."""
    if not isinstance(parts, Sequence) or not any(isinstance(part, str) for part in parts):
        return []
    names = part_names(parts)
    if names is None:
        raise ValueError(
            f"claa: {PROTECT} must name any of {', '.join(NAMES)}, or be none, or pairs begin, end "
            f"of tokens, got {protect!r}"
        )
    return names


def _spans(flat: Any, prompt: int) -> Spans:
    expected = f"claa: {PROTECT} must be pairs begin, end of tokens in [0, {prompt}], as one list"
    if not isinstance(flat, Sequence) or len(flat) % 2:
        raise ValueError(f"{expected}, got {flat!r}")
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    for begin, end in pairs:
        if not (type(begin) is type(end) is int and 0 <= begin <= end <= prompt):
            raise ValueError(f"{expected}, got {begin!r}, {end!r}")
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(pairs):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif begin < end:
            merged.append((begin, end))
    return tuple(merged)


def _kept(budget: Budget | None, spans: Spans, settings: Settings, prompt: int) -> int:
    """Protected tokens, and of the others as many as the budget says."""
    if budget is None:
        return prompt
    window, sinks = settings.method.window, settings.method.num_sinks
    if not spans:
        return min(prompt, budget.tokens(prompt, window + sinks))
    # The first tokens, which the method always keeps, count as protected; the window does not.
    merged = _spans([0, min(sinks, prompt), *chain(*spans)], prompt)
    free = sum(max(0, min(end, prompt - window) - begin) for begin, end in merged)
    return min(prompt, free + budget.tokens(prompt - free, window))

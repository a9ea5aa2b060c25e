"""Which tokens of a chat are its system prompt, its tool definitions, and the chat template's own.

Where a prompt is served its messages are gone: it is a list of tokens. So a chat template is first
rendered with contents of our own. What stays the same in front of a content and behind it, whatever
it is and whatever stands next to it, are the template's marks, and these are looked for in prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = ("system", "tools", "template")

Ids = Sequence[int]
# Messages and tools of a chat as tokens; None if the template does not take them.
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], list[int] | None]
# A chat around a content that varies, and with it another one, which stands next to it.
Context = Callable[[Any, str], tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]


class NoChatTemplate(ValueError):
    """There is no chat template, or no tokenizer that could have one."""


@dataclass(frozen=True)
class Section:
    """Tokens around a content: those in front of it and behind it.

    Attributes:
        opening: in front.
        closing: behind.
        joiner: behind a content that another one of its kind follows.
    """

    opening: Ids
    closing: Ids
    joiner: Ids = ()

    def spans(self, ids: NDArray[np.int64]) -> list[tuple[int, int]]:
        """From each opening to the end of the closing behind it."""
        ends = np.setdiff1d(_find(self.closing, ids), _find(self.joiner, ids))
        found = []
        for begin in _find(self.opening, ids).tolist():
            place = np.searchsorted(ends, begin + len(self.opening))
            if place < len(ends):
                found.append((begin, int(ends[place]) + len(self.closing)))
        return found


@dataclass(frozen=True)
class Chat:
    """The marks of a chat template, as :func:`learn` finds them.

    Attributes:
        user: in front of the first message of a user, behind any system prompt; None if the
            template takes no system prompt, or none that ends there.
        tools: around tool definitions; None if the template takes none, or without marks.
        marks: around the messages, whoever they are from.
        special: the special tokens.
    """

    user: Ids | None
    tools: Section | None
    marks: tuple[Ids, ...]
    special: Ids

    def spans(self, names: Iterable[str], prompt: Ids) -> list[int]:
        """Where a prompt has what is named.

        Args:
            names: of :data:`NAMES`.
            prompt: its tokens.

        Returns:
            Begin and end of each span, one after the other; nothing for what the prompt has not.

        Raises:
            ValueError: the template cannot have it.

        Example::

            learn(tokenizer).spans(["system"], prompt)  # [0, 27]
        """
        ids = np.asarray(prompt, dtype=np.int64)
        kinds = {"system": self._system, "tools": self._tools, "template": self._template}
        return [end for name in names for span in kinds[name](ids) for end in span]

    def _system(self, ids: NDArray[np.int64]) -> list[tuple[int, int]]:
        """All up to the first message of the user; none if only special tokens precede it."""
        if self.user is None:
            raise ValueError(
                '"system" needs a chat template that puts the system prompt before the first '
                "message of the user, with a mark between, got one that does not"
            )
        for at in _find(self.user, ids)[:1].tolist():
            if not np.isin(ids[:at], self.special).all():
                return [(0, at + len(self.user))]
        return []

    def _tools(self, ids: NDArray[np.int64]) -> list[tuple[int, int]]:
        if self.tools is None:
            raise ValueError(
                '"tools" needs a chat template that puts tool definitions between marks, '
                "got one that does not"
            )
        return self.tools.spans(ids)

    def _template(self, ids: NDArray[np.int64]) -> list[tuple[int, int]]:
        own = np.isin(ids, self.special)
        for mark in self.marks:
            places = _find(mark, ids)
            for offset in range(len(mark)):
                own[places + offset] = True
        edges = np.flatnonzero(np.diff(own, prepend=False, append=False)).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))


def part_names(given: Any) -> list[str] | None:
    """Names of parts, of a list or with commas between; None if there is none, or another one."""
    parts: list[Any] = given.split(",") if isinstance(given, str) else []
    parts = list(given) if isinstance(given, list | tuple) else parts
    names = [part.strip() if isinstance(part, str) else part for part in parts]
    return names if names and all(name in NAMES for name in names) else None


def learn(tokenizer: Any, template: str | None = None) -> Chat:
    """The marks of a chat template.

    Args:
        tokenizer: of transformers, or with its ``apply_chat_template``.
        template: in place of the tokenizer's own.

    Raises:
        NoChatTemplate: there is no tokenizer, or it has no chat template.
    """
    render = _renderer(tokenizer, template)
    if render([_say("user", "Hello")], None) is None:
        raise NoChatTemplate(
            "what is protected must be positions where there is no chat template and tokenizer, "
            "got a name"
        )

    def core(mark: Ids) -> Ids:
        """A mark without spaces at its end, which may merge with a word; none if it is blank."""
        texts = [tokenizer.decode([token]) for token in mark]
        while texts and not texts[-1].strip(" "):
            texts.pop()
        return mark[: len(texts)] if "".join(texts).strip() else ()

    marks: set[Ids] = set()
    for contexts in (_USER, _ASSISTANT, _SYSTEM):
        for contents in (_PLAIN, _ALL):  # with the latter a mark is what never merges
            if around := _around(render, contexts, contents, contents):
                whole = {mark for mark in (around.opening, around.closing) if core(mark)}
                marks |= whole if contents is _PLAIN else set(map(core, whole))
    return Chat(
        user=_before_user(render, core),
        tools=_around_tools(render, core),
        marks=tuple(marks),
        special=tuple(tokenizer.all_special_ids),
    )


def _say(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


_PLAIN = ("Alpha", "7 of 9")
_ALL = (*_PLAIN, "\n(x)\n", " Yes. ", "No.", '"')

_USER: tuple[Context, ...] = (
    lambda content, near: ([_say("user", content)], None),
    lambda content, near: (
        [_say("user", near), _say("assistant", near), _say("user", content)],
        None,
    ),
    lambda content, near: (
        [_say("user", content), _say("assistant", near), _say("user", near)],
        None,
    ),
)
_ASSISTANT: tuple[Context, ...] = (
    lambda content, near: (
        [_say("user", near), _say("assistant", content), _say("user", near)],
        None,
    ),
)
_SYSTEM: tuple[Context, ...] = (
    lambda content, near: ([_say("system", content), _say("user", near)], None),
)
_AFTER_SYSTEM: tuple[Context, ...] = (
    lambda content, near: ([_say("system", near), _say("user", content)], None),
)


def _tool(name: str, **parameters: Any) -> dict[str, Any]:
    function = {"name": name, "description": f"Gives {name}."} | parameters
    return {"type": "function", "function": function}


_WHERE = {"type": "object", "properties": {"where": {"type": "string"}}}
# They differ from their first to their last character, as far as a tool may.
_TOOLS = (
    _tool("alpha"),
    _tool("7b", parameters={}),
    _tool("zeta", parameters=_WHERE | {"required": ["where"]}),
    _tool("omega", parameters=_WHERE),
    {"function": {"description": "Gives it.", "name": "it"}, "type": "function"},
)
_WITH_TOOLS: tuple[Context, ...] = (
    lambda tool, near: ([_say("user", near)], [tool]),
    lambda tool, near: ([_say("system", near), _say("user", near)], [tool]),
    lambda tool, near: ([_say("user", near), _say("assistant", near), _say("user", near)], [tool]),
)
_BEFORE_TOOL: tuple[Context, ...] = (
    lambda tool, near: ([_say("user", near)], [tool, _TOOLS[0]]),
    lambda tool, near: ([_say("user", near)], [tool, _TOOLS[-1]]),
)
_AFTER_TOOL: tuple[Context, ...] = (
    lambda tool, near: ([_say("system", near), _say("user", near)], [_TOOLS[2], _TOOLS[3], tool]),
)


def _renderer(tokenizer: Any, template: str | None) -> Render:
    own = {} if template is None else {"chat_template": template}

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Any:
        try:
            return tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, return_dict=False, **own
            )
        except Exception:  # a template is a program, and refuses by whatever it raises
            return None

    return render


def _slot(
    render: Render, context: Context, contents: Sequence[Any], near: str
) -> tuple[list[int], int, int] | None:
    """A chat with the first content, and between which of its tokens all contents are.

    None if the template does not take them, or leaves them out.
    """
    chats = []
    for content in contents:
        if (chat := render(*context(content, near))) is None:
            return None
        chats.append(chat)
    begin, behind = len(_prefix(chats)), len(_suffix(chats))
    return None if begin == len(chats[0]) else (chats[0], begin, len(chats[0]) - behind)


def _around(
    render: Render, contexts: Iterable[Context], contents: Sequence[Any], nears: Sequence[str]
) -> Section | None:
    """What precedes and follows a content in all contexts; None if the template takes none."""
    slots = [_slot(render, context, contents, near) for context in contexts for near in nears]
    found = [slot for slot in slots if slot is not None]
    if not found:
        return None
    opening = _suffix([chat[:begin] for chat, begin, _ in found])
    return Section(opening, _prefix([chat[end:] for chat, _, end in found]))


def _before_user(render: Render, core: Callable[[Ids], Ids]) -> Ids | None:
    """What precedes the user's messages, with a system prompt before the first and without one."""
    first = _around(render, _AFTER_SYSTEM, _ALL, _ALL)
    any_other = _around(render, _USER, _ALL, _ALL)
    if first is None or any_other is None:
        return None
    mark = core(_suffix([first.opening, any_other.opening]))
    if not mark:
        return None
    for near in _ALL:
        slot = _slot(render, _SYSTEM[0], _ALL, near)
        if slot is None or not (_find(mark, np.asarray(slot[0]))[:1] >= slot[2]).any():
            return None
    return mark


def _around_tools(render: Render, core: Callable[[Ids], Ids]) -> Section | None:
    around = _around(render, _WITH_TOOLS, _TOOLS, _ALL)
    joined = _around(render, _BEFORE_TOOL, _TOOLS, _ALL)
    if around is None or joined is None:
        return None
    section = Section(core(around.opening), core(around.closing), core(joined.closing))
    if not section.opening or not section.closing:
        return None
    for near in _ALL:
        slot = _slot(render, _AFTER_TOOL[0], _TOOLS, near)
        if slot is None:
            continue
        chat, begin, end = slot
        if not any(first < begin and end <= last for first, last in section.spans(np.array(chat))):
            return None
    return section


def _prefix(lists: Sequence[Ids]) -> tuple[int, ...]:
    """The tokens by which all of them begin."""
    same = []
    for tokens in zip(*lists, strict=False):
        if len({*tokens}) > 1:
            break
        same.append(tokens[0])
    return tuple(same)


def _suffix(lists: Sequence[Ids]) -> tuple[int, ...]:
    """The tokens by which all of them end."""
    return _prefix([each[::-1] for each in lists])[::-1]


def _find(mark: Ids, ids: NDArray[np.int64]) -> NDArray[np.intp]:
    """Where a mark begins, ascending."""
    if not 0 < len(mark) <= len(ids):
        return np.zeros(0, np.intp)
    at = np.flatnonzero(ids[: len(ids) - len(mark) + 1] == mark[0])
    for offset, token in enumerate(mark[1:], 1):
        at = at[ids[at + offset] == token]
    return at

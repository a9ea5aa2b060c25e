"""Look-ups in code and in tables, and the prompts of agents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from claa_ops.evaluate.tasks.layout import Draft, Source, prose, scatter
from claa_ops.evaluate.tasks.words import different, key, number, person

_LIKE = 20  # functions of a module, rows of a table
_TOOLS = 10


def code(source: Source) -> Draft:
    """A module of twenty like functions between comments; what does one return?"""
    draw = source.draw
    names = different(lambda draw: f"get_{key(draw).replace(' ', '_')}", draw, _LIKE)
    values = different(number(5), draw, _LIKE)
    functions = [
        f"\ndef {name}():\n    return {value}\n" for name, value in zip(names, values, strict=True)
    ]
    module = prose(source, scatter(draw, functions))
    return Draft(
        head="Here is a Python module.\n\n",
        body=replace(module, unit="# {}".format, joint="\n"),
        tail=f"\n\nWhat does {names[0]}() return?\n",
        prefix="",
        answers=(values[0],),
        needed=(functions[0].strip(),),
    )


def table(source: Source) -> Draft:
    """A table of twenty rows and four columns within a text; what stands in one cell?"""
    draw = source.draw
    columns = ("Name", "Room", "Extension", "Badge")
    names = different(person, draw, _LIKE)
    cells = different(number(5), draw, 3 * _LIKE)
    rows = [
        f"| {' | '.join([name, *cells[3 * row : 3 * row + 3]])} |" for row, name in enumerate(names)
    ]
    header = f"| {' | '.join(columns)} |"
    asked, column = draw.randrange(_LIKE), draw.randrange(3)
    whole = "\n".join(["\n", header, "|---|---|---|---|", *rows, "\n"])
    return Draft(
        head="Read this text, which has a table in it.\n\n",
        body=prose(source, scatter(draw, [whole])),
        tail=f"\n\nWhich {columns[column + 1].lower()} number does the table give for "
        f"{names[asked]}?\n",
        prefix="",
        answers=(cells[3 * asked + column],),
        needed=(header, rows[asked]),
    )


@dataclass(frozen=True)
class _Tool:
    """A tool of an agent, and what is said when it should be used.

    Attributes:
        name, description: of the tool.
        fields: of its arguments, in the order of ``said``.
        said: a turn of the user for each, with the subject and the value.
        request: what the user asks at last, of the subject, in words without the tool's name.
    """

    name: str
    description: str
    fields: tuple[str, str]
    said: tuple[str, str]
    request: str


_ASKABLE = (
    _Tool(
        "reserve_room", "Reserve a meeting room.", ("room_id", "seat_count"),
        ("The meeting about {} will be in the room with the id {}.",
         "For the meeting about {}, {} people have said that they come."),
        "Please see to it that we have a place for the meeting about {}, for all who come.",
    ),
    _Tool(
        "send_payment", "Transfer money to an account.", ("account", "amount"),
        ("The supplier of {} has the account {}.", "The bill for {} says {} crowns."),
        "Please settle the bill for {} with the supplier.",
    ),
    _Tool(
        "order_parts", "Order parts for the workshop.", ("part_number", "quantity"),
        ("The part for {} has the number {}.", "To repair {}, we need {} pieces."),
        "Please get what the workshop needs for {}.",
    ),
    _Tool(
        "open_ticket", "Report a fault to the technicians.", ("device_id", "error_number"),
        ("The device that steers {} has the id {}.", "The display of {} shows error {}."),
        "Please tell the technicians what is wrong with {}.",
    ),
    _Tool(
        "print_labels", "Print labels for the store.", ("article", "copies"),
        ("In the store, {} is article {}.", "For the shelf of {}, we want {} stickers."),
        "Please make the stickers for {}.",
    ),
)  # fmt: skip
# Tools that nobody asks for: name, description, arguments.
_OTHERS = (
    ("search_web", "Search the web.", ("query", "max_results")),
    ("read_file", "Read a text file.", ("path", "encoding")),
    ("send_mail", "Send an electronic letter.", ("recipient", "subject")),
    ("set_alarm", "Ring at a time of the day.", ("hour", "minute")),
    ("translate", "Translate a text.", ("text", "language")),
    ("weather", "Forecast the weather.", ("city", "days")),
    ("run_query", "Ask the data base.", ("statement", "timeout")),
    ("book_train", "Buy a railway ticket.", ("origin", "destination")),
    ("convert_unit", "Convert a quantity.", ("quantity", "unit")),
    ("play_music", "Play a piece of music.", ("title", "volume")),
)


def agent(source: Source) -> Draft:
    """A system prompt, ten tools and a long history; which tool, with which arguments?"""
    draw = source.draw
    tool = draw.choice(_ASKABLE)
    subjects = different(lambda draw: f"the {key(draw)}", draw, 3)
    values = different(number(5), draw, 2 * len(subjects))
    turns = [
        [said.format(subject, value) for said, value in zip(tool.said, pair, strict=True)]
        for subject, pair in zip(subjects, _pairs(values), strict=True)
    ]
    planted = scatter(draw, (f"User: {turn}\nAssistant: Noted." for own in turns for turn in own))
    definitions = [_definition(one.name, one.description, one.fields) for one in _ASKABLE]
    definitions += [_definition(*one) for one in draw.sample(_OTHERS, _TOOLS - len(_ASKABLE))]
    draw.shuffle(definitions)
    history = prose(source, planted)
    head = (
        "System: You are the assistant of an office. You act through tools alone: you answer "
        'with one JSON object that has the name of a tool as "tool" and its arguments as '
        '"arguments". You take the arguments from what the user has said before.\nTools:\n'
        + "\n".join(definitions)
    )
    return Draft(
        head=f"{head}\n\n",
        body=replace(history, unit="User: {}\nAssistant: I see.".format, joint="\n"),
        tail=f"\nUser: {tool.request.format(subjects[0])}\n",
        prefix='{"tool": "',
        answers=(tool.name, *values[:2]),
        needed=(_definition(tool.name, tool.description, tool.fields), *turns[0]),
        protected=(head,),
        new_tokens=48,
    )


def _pairs(values: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _definition(name: str, description: str, fields: Sequence[str]) -> str:
    arguments = {field: "string" for field in fields}
    return json.dumps({"name": name, "description": description, "arguments": arguments})

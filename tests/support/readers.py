"""Perfect readers: they answer a prompt from its text alone, without the task's own answers."""

import ast
import json
import re
from collections import Counter

from claa_ops.evaluate.tasks.beyond import BRIDGES


def read(task: str, prompt: str) -> str:
    """The answer to the prompt's question."""
    return next(reader for begin, reader in READERS.items() if task.startswith(begin))(prompt)


def _needles(prompt: str) -> str:
    question = re.search(r"Which secret \w+ of (.*) does the text above give", prompt)[1]
    asked = re.split(", | and ", question)
    found = re.findall(r"One of the secret \w+ of (\S+) is (\S+)\.", prompt)
    return ", ".join(value for name, value in found if name in asked)


def _variables(prompt: str) -> str:
    text, question = prompt.rsplit("Which 5 variables have the value ", 1)
    wanted = question.split(",")[0]
    values = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
        values[name] = values.get(value, value)  # an example's too
    return ", ".join(name for name, value in values.items() if value == wanted)


def _common_words(prompt: str) -> str:
    words = re.findall(r"\d+\. (\w+)", prompt.split("list of words.\n")[-1])
    return ", ".join(word for word, _ in Counter(words).most_common(10))


def _frequent_words(prompt: str) -> str:
    counts = Counter(prompt.split("\n\n")[1].split())
    del counts["..."]
    (_, least), (_, next_one) = counts.most_common(4)[2:]
    assert least > next_one
    return ", ".join(word for word, _ in counts.most_common(3))


def _chain(prompt: str) -> str:
    text, question = prompt.strip().rsplit("\n\n", 1)
    rooms = dict(re.findall(r"The parcel of (\w+ \w+) lies in room (\w+)\.", text))
    houses = dict(re.findall(r"Room (\w+) is part of the house called (\w+)\.", text))
    towns = dict(re.findall(r"The house called (\w+) stands in the town of (\w+)\.", text))
    mayors = dict(re.findall(r"The mayor of the town of (\w+) is (\w+ \w+)\.", text))
    house = houses[rooms[re.search(r"the parcel of (\w+ \w+)", question)[1]]]
    if question.startswith("In which house"):
        return house
    town = towns[house]
    return town if question.startswith("In which town") else mayors[town]


def _bridge(prompt: str) -> str:
    text, question = prompt.strip().rsplit("\n\n", 1)
    owner = re.search(r"the parcel of (\w+ \w+)", question)[1]
    said = re.search(rf"The parcel of {owner} (.*?)\.", text)[1]
    for says, other, pairs in BRIDGES:
        for name, same in pairs.items():
            if said == says.format(name):
                return re.search(
                    re.escape(other.format(same, "HOUSE")).replace("HOUSE", r"(\w+)"), text
                )[1]
    raise AssertionError(said)


def _codes(prompt: str) -> dict[str, str]:
    return dict(re.findall(r"The code of the (\w+ \w+) is (\d+)\.", prompt))


def _keys(prompt: str) -> str:
    asked = re.findall(r"[wW]hat is the code of the (\w+ \w+)\?", prompt)
    return _codes(prompt)[asked[-1]]


def _instructions(prompt: str) -> str:
    codes = _codes(prompt)
    names = re.findall(r"the code of the (\w+ \w+)[ .]", prompt.split("Follow all")[1])
    first, second, third = (
        codes[name.removesuffix(" in").removesuffix(" between")] for name in names
    )
    return f"[{first}]\n*{second}*\n#{third}"


def _code(prompt: str) -> str:
    begin, _, rest = prompt.partition("\n\n")
    module, name = re.fullmatch(r"(.*)What does (\w+)\(\) return\?\n", rest, re.DOTALL).groups()
    for part in ast.parse(module).body:
        if part.name == name:
            return str(part.body[0].value.value)
    raise AssertionError(name)


def _table(prompt: str) -> str:
    rows = [line.strip("| ").split(" | ") for line in prompt.split("\n") if line.startswith("| ")]
    column, name = re.search(r"Which (\w+) number does the table give for (.*)\?", prompt).groups()
    (row,) = (row for row in rows if row[0] == name)
    return row[rows[0].index(column.capitalize())]


_TOOLS = {
    "reserve_room": ("for the meeting about (.*), for all", "about {} will be .* id (.*)\\.",
                     "about {}, (.*) people"),
    "send_payment": ("bill for (.*) with", "supplier of {} has the account (.*)\\.",
                     "bill for {} says (.*) crowns"),
    "order_parts": ("needs for (.*)\\.", "part for {} has the number (.*)\\.",
                    "repair {}, we need (.*) pieces"),
    "open_ticket": ("wrong with (.*)\\.", "steers {} has the id (.*)\\.",
                    "display of {} shows error (.*)\\."),
    "print_labels": ("stickers for (.*)\\.", "store, {} is article (.*)\\.",
                     "shelf of {}, we want (.*) stickers"),
}  # fmt: skip


def _agent(prompt: str) -> str:
    *history, request = prompt.strip().split("\n")
    tools = [json.loads(line) for line in history if line.startswith("{")]
    assert len(tools) == len({tool["name"] for tool in tools}) == 10
    for name, (asked, *said) in _TOOLS.items():
        if (found := re.search(asked, request)) is not None:
            (tool,) = (tool for tool in tools if tool["name"] == name)
            values = [re.search(one.format(found[1]), prompt)[1] for one in said]
            arguments = dict(zip(tool["arguments"], values, strict=True))
            return json.dumps({"tool": name, "arguments": arguments})
    raise AssertionError(request)


# By how the names of the tasks begin.
READERS = {
    "ruler-niah": _needles,
    "ruler-vt": _variables,
    "ruler-cwe": _common_words,
    "ruler-fwe": _frequent_words,
    "beyond-chain": _chain,
    "beyond-bridge": _bridge,
    "beyond-keys": _keys,
    "beyond-short": _keys,
    "beyond-question-first": _keys,
    "beyond-two-questions": _keys,
    "beyond-instructions": _instructions,
    "beyond-code": _code,
    "beyond-table": _table,
    "beyond-agent": _agent,
}

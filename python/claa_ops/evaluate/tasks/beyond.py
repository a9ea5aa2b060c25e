"""Tasks beyond RULER: what prompts ask for that a single look at planted facts does not show.

Each of them is our own, and is graded by the share of the right answers, numbers or names, that
stand in what a model says. `beyond_documents` has those in code, tables and the prompts of agents.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

from claa_ops.evaluate.tasks.beyond_documents import agent, code, table
from claa_ops.evaluate.tasks.layout import Draft, Make, Question, Source, prose, scatter
from claa_ops.evaluate.tasks.words import different, key, number, person, place

_HEAD = "Read this text. There will be a question about it.\n\n"
_CHAINS = 6  # in a prompt, one of which is asked for
_KEYS = 6
# Lengths of short prompts, one after the other.
SHORT = (192, 256, 384, 511)


def _chain(hops: int) -> Make:
    """Facts of which each leads to the next, beside as many others of the same kinds."""

    def make(source: Source) -> Draft:
        draw = source.draw
        people = different(person, draw, 2 * _CHAINS)
        rooms = different(
            lambda draw: f"{draw.choice('BCDFGHKLMNPRT')}{draw.randrange(100, 1000)}", draw, _CHAINS
        )
        places = different(place, draw, 2 * _CHAINS)
        houses, towns = places[:_CHAINS], places[_CHAINS:]
        owners, mayors = people[:_CHAINS], people[_CHAINS:]
        series = [
            [
                f"The parcel of {owner} lies in room {room}.",
                f"Room {room} is part of the house called {house}.",
                f"The house called {house} stands in the town of {town}.",
                f"The mayor of the town of {town} is {mayor}.",
            ][:hops]
            for owner, room, house, town, mayor in zip(
                owners, rooms, houses, towns, mayors, strict=True
            )
        ]
        question, prefix, answer = {
            2: ("In which house is", "is in the house called", houses[0]),
            3: ("In which town is", "is in the town of", towns[0]),
            4: ("Who is the mayor of the town of", "is in a town whose mayor is", mayors[0]),
        }[hops]
        owner = f"the parcel of {owners[0]}"
        return Draft(
            head=_HEAD,
            body=prose(source, scatter(draw, itertools.chain(*series))),
            tail=f"\n\n{question} {owner}?\n",
            prefix=f"T{owner[1:]} {prefix}",
            answers=(answer,),
            needed=tuple(series[0]),
        )

    return make


_CAPITALS = {
    "Austria": "Vienna", "Cuba": "Havana", "Egypt": "Cairo", "Finland": "Helsinki",
    "France": "Paris", "Greece": "Athens", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo",
    "Kenya": "Nairobi", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Spain": "Madrid",
}  # fmt: skip
_MONTHS = {
    "first": "January", "second": "February", "third": "March", "fourth": "April",
    "sixth": "June", "seventh": "July", "eighth": "August", "ninth": "September",
    "tenth": "October", "eleventh": "November", "last": "December",
}  # fmt: skip
_YOUNG = {
    "calf": "cow", "chick": "hen", "cub": "bear", "cygnet": "swan", "duckling": "duck",
    "foal": "horse", "kid": "goat", "kitten": "cat", "lamb": "sheep", "piglet": "pig",
    "puppy": "dog", "tadpole": "frog",
}  # fmt: skip
# What a fact says of a parcel, what another says of the same in other words, and both in pairs.
BRIDGES = (
    ("went to the capital of {}", "What goes to {} is kept in the house called {}.", _CAPITALS),
    ("came in the {} month of the year", "What comes in {} is kept in the house called {}.",
     _MONTHS),
    ("has a {} on its stamp", "What has the young of a {} on its stamp is kept in the house "
     "called {}.", _YOUNG),
)  # fmt: skip


def _bridge(source: Source) -> Draft:
    """Two facts that name what they share in different words."""
    draw = source.draw
    says, other, pairs = draw.choice(BRIDGES)
    shared = draw.sample(sorted(pairs), _CHAINS)
    owners, houses = different(person, draw, _CHAINS), different(place, draw, _CHAINS)
    series = [
        [f"The parcel of {owner} {says.format(name)}.", other.format(pairs[name], house)]
        for owner, name, house in zip(owners, shared, houses, strict=True)
    ]
    return Draft(
        head=_HEAD,
        body=prose(source, scatter(draw, itertools.chain(*series))),
        tail=f"\n\nIn which house is the parcel of {owners[0]} kept?\n",
        prefix=f"The parcel of {owners[0]} is kept in the house called",
        answers=(houses[0],),
        needed=tuple(series[0]),
    )


def _locks(draw: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Names, their codes, and the facts that say so."""
    names, codes = different(key, draw, _KEYS), different(number(5), draw, _KEYS)
    pairs = zip(names, codes, strict=True)
    return names, codes, [f"The code of the {name} is {code}." for name, code in pairs]


def _keys(source: Source) -> Draft:
    """One of six codes."""
    names, codes, facts = _locks(source.draw)
    return Draft(
        head=_HEAD,
        body=prose(source, scatter(source.draw, facts)),
        tail=f"\n\nWhat is the code of the {names[0]}?\n",
        prefix=f"The code of the {names[0]} is",
        answers=(codes[0],),
        needed=(facts[0],),
    )


def _question_first(source: Source) -> Draft:
    """The question stands before the text, and nothing after it repeats it."""
    names, codes, facts = _locks(source.draw)
    return Draft(
        head=f"What is the code of the {names[0]}? Look for it in this text.\n\n",
        body=prose(source, scatter(source.draw, facts)),
        tail="\n\nNow answer the question that stands before the text.\n",
        prefix="",
        answers=(codes[0],),
        needed=(facts[0],),
    )


def _two_questions(source: Source) -> Draft:
    """One code is asked for, and after the answer another."""
    names, codes, facts = _locks(source.draw)
    return Draft(
        head="Read this text. There will be questions about it.\n\n",
        body=prose(source, scatter(source.draw, facts)),
        tail=f"\n\nWhat is the code of the {names[0]}?\n",
        prefix=f"The code of the {names[0]} is",
        answers=(codes[0],),
        needed=(facts[0],),
        then=Question(
            text=f"And what is the code of the {names[1]}?",
            prefix=f"The code of the {names[1]} is",
            answers=(codes[1],),
            needed=(facts[1],),
        ),
    )


def _instructions(source: Source) -> Draft:
    """Three codes, each to be written in a way of its own."""
    names, codes, facts = _locks(source.draw)
    return Draft(
        head="Read this text. There will be instructions after it.\n\n",
        body=prose(source, scatter(source.draw, facts)),
        tail="\n\nFollow all of these instructions, and write nothing else.\n"
        f"1. Write the code of the {names[0]} in square brackets.\n"
        f"2. On the next line, write the code of the {names[1]} between two asterisks.\n"
        f"3. On the last line, write a hash sign and right after it the code of the {names[2]}.\n",
        prefix="",
        answers=(f"[{codes[0]}]", f"*{codes[1]}*", f"#{codes[2]}"),
        needed=tuple(facts[:3]),
        new_tokens=64,
    )


def _bare(make: Make) -> Make:
    """The same without an answer's prefix."""

    def without_prefix(source: Source) -> Draft:
        return replace(make(source), prefix="", new_tokens=48)

    return without_prefix


BEYOND: dict[str, Make] = {
    "beyond-chain-2": _chain(2),
    "beyond-chain-3": _chain(3),
    "beyond-chain-4": _chain(4),
    "beyond-chain-3-bare": _bare(_chain(3)),
    "beyond-bridge": _bridge,
    "beyond-keys": _keys,
    "beyond-keys-bare": _bare(_keys),
    "beyond-short": _keys,
    "beyond-short-bare": _bare(_keys),
    "beyond-question-first": _question_first,
    "beyond-two-questions": _two_questions,
    "beyond-instructions": _instructions,
    "beyond-code": code,
    "beyond-table": table,
    "beyond-agent": agent,
}

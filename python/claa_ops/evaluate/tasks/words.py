"""Names, words and codes that the tasks made here draw their facts from."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

ADJECTIVES = (
    "amber ancient azure bitter bold brass bright broken calm cedar clever copper crimson curly "
    "distant dusty eager early faded fancy frozen gentle golden grand hasty hidden hollow humble "
    "iron ivory jolly keen little lively lonely lucky marble mellow misty narrow noble olive "
    "painted pale patient plain polite proud quiet rapid round rusty shiny silent silver sleepy "
    "smooth solid spare steady sturdy sunny tender tidy tiny velvet warm weary wild winding wooden"
).split()
NOUNS = (
    "anchor apple archive bakery barrel basket beacon boathouse bottle bridge bucket button candle "
    "canyon carpet cellar chapel compass cottage cradle curtain desert donkey engine feather "
    "foundry fountain gallery garden gate glacier greenhouse hammer harbour island jacket kettle "
    "ladder lantern library lighthouse meadow mill mirror observatory orchard pencil pepper pillow "
    "pocket quarry ribbon river saddle scarf shovel stable teapot theatre ticket tower tunnel "
    "valley vault violin wagon walnut whistle window"
).split()
_FIRST = (
    "Anton Bruno Clara Felix Greta Hanna Ivo Jonas Karin Lena Leon Mara Milan Nadia Nils Olga "
    "Oskar Paul Piet Rosa Ruth Selma Simon Tilda Tomas Ulrich Vera Wanda Xaver Yvonne"
).split()
_LAST = (
    "Abbott Brandt Cole Duarte Eklund Farkas Gruber Holm Ivanova Jansen Keller Kowal Larsen "
    "Lindqvist Marsh Mendez Moreau Novak Okafor Olsen Petrov Pryce Quist Reyes Sandoval Tanaka "
    "Virtanen Weiss Ybarra Zeman"
).split()
_BEGIN = (
    "bal bri cor dar dun fal fen gal gor hal hes jor kan kel lim lor mar mer nor os pel pen ras "
    "rin sal sil tal tel tor ulm ves wel wor yar zan"
).split()
_MIDDLE = "a am e en er i in o on or u un".split()
_END = "bach brook by crest dale dorf fell ford gate haven holm mere stead ton vik wick".split()


def key(draw: random.Random) -> str:
    """Two words for a thing, such as ``rusty lantern``."""
    return f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"


def person(draw: random.Random) -> str:
    """A full name."""
    return f"{draw.choice(_FIRST)} {draw.choice(_LAST)}"


def place(draw: random.Random) -> str:
    """A name that no place has, as far as we know, such as ``Halenford``."""
    return (draw.choice(_BEGIN) + draw.choice(_MIDDLE) + draw.choice(_END)).capitalize()


def coinage(draw: random.Random) -> str:
    """A long word that nobody uses, one of three million."""
    return (
        draw.choice(_BEGIN)
        + draw.choice(_MIDDLE)
        + draw.choice(_BEGIN)
        + draw.choice(_MIDDLE)
        + draw.choice(_END)
    )


def number(digits: int) -> Callable[[random.Random], str]:
    """Numbers of that many digits, so that none is part of another."""
    return lambda draw: str(draw.randrange(10 ** (digits - 1), 10**digits))


def letters(count: int, alphabet: str = string.ascii_lowercase) -> Callable[[random.Random], str]:
    """Words of that many letters without a meaning."""
    return lambda draw: "".join(draw.choices(alphabet, k=count))


def identifier(draw: random.Random) -> str:
    """A random UUID."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def without_end(make: Callable[[random.Random], Item], draw: random.Random) -> Iterator[Item]:
    """What ``make`` draws, each only once."""
    seen = set()
    while True:
        item = make(draw)
        if item not in seen:
            seen.add(item)
            yield item


def different(make: Callable[[random.Random], Item], draw: random.Random, count: int) -> list[Item]:
    """That many of what ``make`` draws, no two the same."""
    items = without_end(make, draw)
    return [next(items) for _ in range(count)]

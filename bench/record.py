"""Files of results: one case per line, so that a diff shows which cases changed."""

import json
from pathlib import Path

DIGITS = 3  # significant ones: a second run differs in the third


def rounded(value: object) -> object:
    """The same value with its floats rounded; counts stay as they are."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return value


def text_of(report: dict) -> str:
    """JSON of a report: an entry on each line, and of a list an item on each."""
    entries = []
    for name, value in rounded(report).items():
        if isinstance(value, list):
            items = ",\n  ".join(json.dumps(each) for each in value)
            entries.append(f'"{name}": [\n  {items}\n ]' if value else f'"{name}": []')
        else:
            entries.append(f'"{name}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(entries) + "\n}\n"


def write(path: Path, report: dict) -> None:
    """Write a report, and the folder that it belongs to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(report))

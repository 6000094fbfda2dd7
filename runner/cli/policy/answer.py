"""Answers on stdout: as lines, whatever of them may come from a hostile file, or as JSON."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from policies.model import plain
from runner.terminal import clean

_MOST_ITEMS = 8
"""Of a list; JSON has them all."""


def say(lines: Iterable[str]) -> None:
    for line in lines:
        print(clean(line))  # noqa: T201 - the answer


def say_json(value: Any) -> None:  # noqa: ANN401 - any of our frozen values
    print(json.dumps(plain(value), indent=1, ensure_ascii=True))  # noqa: T201 - the answer


def shown(value: Any) -> str:  # noqa: ANN401 - any of our values, made plain
    """A plain value in few words."""
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case [list(), *_]:  # sets of patterns, of each of which one must match
            return " and ".join(map(shown, value))
        case list() | tuple():
            items = [shown(item) for item in value[:_MOST_ITEMS]]
            more = [f"and {len(value) - _MOST_ITEMS} more"] if len(value) > _MOST_ITEMS else []
            return f"[{', '.join(items + more)}]"
        case dict():
            return ", ".join(f"{name} {shown(item)}" for name, item in value.items() if item)
        case _:
            return str(value)


def table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Rows with their columns one below the other, indented."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()

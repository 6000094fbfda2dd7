"""Patterns of policies: exact strings or globs, always matched in full.

``*`` stands for any characters but ``/``; ``**`` for any characters. There are no regular
expressions in the language: an unanchored one in a CI's actor filter let strangers in. Nor
behind it: five stars against a hostile name kept the one that did for a minute.
"""

import re
from collections.abc import Iterable
from functools import lru_cache


@lru_cache(maxsize=1024)
def _pieces(pattern: str) -> tuple[str, ...]:
    return tuple(piece for piece in re.split(r"(\*{1,2})", pattern) if piece)


def matches(pattern: str, text: str) -> bool:
    """Whether all of ``text`` is what ``pattern`` describes."""
    reached = {0}
    for piece in _pieces(pattern):
        if piece in {"*", "**"}:
            reached = _after_star(reached, text, stop="/" if piece == "*" else "")
        else:
            reached = {p + len(piece) for p in reached if text.startswith(piece, p)}
    return len(text) in reached


def _after_star(reached: set[int], text: str, stop: str) -> set[int]:
    """Where a star may end that begins in ``reached`` and does not pass ``stop``."""
    found, within = set(), False
    for position in range(len(text) + 1):
        within = position in reached or (within and text[position - 1] != stop)
        if within:
            found.add(position)
    return found


def matches_any(patterns: Iterable[str], text: str) -> bool:
    return any(matches(pattern, text) for pattern in patterns)

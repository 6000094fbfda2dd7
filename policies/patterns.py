"""Patterns of policies: exact strings or globs, always matched in full.

``*`` stands for any characters but ``/``; ``**`` for any characters. There are no regular
expressions in the language: an unanchored one in a CI's actor filter let strangers in.
"""

import re
from collections.abc import Iterable
from functools import lru_cache


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*{1,2})", pattern)
    return re.compile(
        "".join({"*": "[^/]*", "**": ".*"}.get(p) or re.escape(p) for p in pieces), re.DOTALL
    )


def matches(pattern: str, text: str) -> bool:
    """Whether all of ``text`` is what ``pattern`` describes."""
    return _compiled(pattern).fullmatch(text) is not None


def matches_any(patterns: Iterable[str], text: str) -> bool:
    return any(matches(pattern, text) for pattern in patterns)

"""Names of files as they may be shown: hostile until escaped."""

_SHOWN = 200
"""Characters of a name in a message."""


def shown(name: str) -> str:
    r"""``name`` with everything unprintable escaped, and cut to a bounded length.

    >>> shown("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    cut = name if len(name) <= _SHOWN else f"{name[: _SHOWN - 3]}..."
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in cut
    )

r"""Variables in a Dockerfile's words, as far as they can be known without building.

>>> expand("debian:${TAG:-12}", {}, "\\")
Expansion(text='debian:12', missing=())
>>> expand("debian:$TAG", {}, "\\")
Expansion(text='debian:$TAG', missing=('TAG',))
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

TEXT_CHARACTERS = 4096
"""Of one expanded word: `ARG B=$A$A`, `ARG C=$B$B` and so on would double without end."""
_DEPTH = 16
_OPERATOR = re.compile(r":?[-+?]|\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*+|[0-9]++|[@*#?$!-]")


@dataclass(frozen=True, slots=True)
class Expansion:
    """A word with its variables replaced.

    Attributes:
        text: Quotes removed; what is missing stands there as it was written.
        missing: Names without a known value, or the reason why the word cannot be read.
    """

    text: str
    missing: tuple[str, ...] = ()


class _Unreadable(ValueError):
    """A word that has no reading; the message says why."""


def expand(word: str, values: Mapping[str, str], escape: str) -> Expansion:
    """Replaces ``$X``, ``${X}``, ``${X:-d}``, ``${X-d}``, ``${X:+a}`` and ``${X+a}``."""
    reader = _Reader(word, values, escape)
    try:
        text = reader.until("", 0)
    except _Unreadable as error:
        return Expansion(word[:TEXT_CHARACTERS], (str(error),))
    return Expansion(text, tuple(dict.fromkeys(reader.missing)))


class _Reader:
    def __init__(self, word: str, values: Mapping[str, str], escape: str) -> None:
        self._word = word
        self._values = values
        self._escape = escape
        self._at = 0
        self._length = 0
        self.missing: list[str] = []

    def until(self, stop: str, depth: int) -> str:
        """Reads to ``stop``, or to the end where that is empty."""
        if depth > _DEPTH:
            raise _Unreadable("too many nested substitutions")
        out: list[str] = []
        quote = False
        while self._at < len(self._word):
            char = self._word[self._at]
            if char == stop and not quote:
                self._at += 1
                return "".join(out)
            if char == "$":
                piece = self._variable(depth)
            elif char == self._escape:
                piece = self._escaped(quote=quote)
            elif char == '"':
                self._at += 1
                quote = not quote
                piece = ""
            elif char == "'" and not quote:
                piece = self._single_quoted()
            else:
                self._at += 1
                piece = char
            self._length += len(piece)
            if self._length > TEXT_CHARACTERS * (depth + 1):
                raise _Unreadable(f"longer than {TEXT_CHARACTERS} characters")
            out.append(piece)
        if stop or quote:
            raise _Unreadable("an open quote or brace")
        return "".join(out)

    def _escaped(self, *, quote: bool) -> str:
        following = self._word[self._at + 1 : self._at + 2]
        self._at += 1 + len(following)
        if quote and following not in {'"', "$", self._escape}:
            return self._escape + following
        return following

    def _single_quoted(self) -> str:
        end = self._word.find("'", self._at + 1)
        if end < 0:
            raise _Unreadable("an open quote or brace")
        piece = self._word[self._at + 1 : end]
        self._at = end + 1
        return piece

    def _variable(self, depth: int) -> str:
        start = self._at
        brace = self._word.startswith("{", start + 1)
        name = _NAME.match(self._word, start + 1 + brace)
        if name is None:
            if brace:
                raise _Unreadable("a bad substitution")
            self._at += 1
            return "$"
        self._at = name.end()
        if not brace:
            return self._value(name[0], start)
        operator = _OPERATOR.match(self._word, self._at)
        if operator is None:
            raise _Unreadable(f"the substitution of {name[0][:100]}")
        self._at = operator.end()
        if operator[0] == "}":
            return self._value(name[0], start)
        return self._modified(name[0], operator[0], start, depth)

    def _value(self, name: str, start: int) -> str:
        if name in self._values:
            return self._values[name]
        self.missing.append(name[:100])
        return self._word[start : self._at]

    def _modified(self, name: str, operator: str, start: int, depth: int) -> str:
        known = len(self.missing)
        word = self.until("}", depth + 1)
        value = self._values.get(name)
        is_set = bool(value) if operator.startswith(":") else value is not None
        kind = operator[-1]
        if is_set == (kind == "+") and kind != "?":
            return word
        del self.missing[known:]  # the word is not used
        if kind == "+":
            return ""
        if is_set:
            return value or ""
        self.missing.append(name[:100])
        return self._word[start : self._at]

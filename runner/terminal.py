"""Hostile bytes on their way to a terminal: what could move its cursor or its state is taken out.

Threat 16: OSC 52 writes the clipboard, OSC 8 disguises links, CSI hides and overwrites lines.
"""

import re
import unicodedata
from collections.abc import Callable

LINE_CHARACTERS = 4096
"""A longer line is cut in pieces."""

_SEQUENCES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI
    r"|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS, SOS, PM, APC with their text
    r"|\x1b[ -/]*[0-~]?"  # two-character sequences, and a lone escape
)
_KEPT = {"\t"}


def clean(text: str) -> str:
    """``text`` as one printable line: no control, format or private character is left."""
    plain = _SEQUENCES.sub("", text)
    return "".join(
        character
        if character in _KEPT or unicodedata.category(character) not in _UNPRINTABLE
        else character.encode("unicode_escape").decode("ascii")
        for character in plain
    )


_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


class Lines:
    """Cuts a stream of bytes into clean lines; a carriage return ends a line too."""

    def __init__(self, line: Callable[[str], None]) -> None:
        self._line = line
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = re.split(rb"\r\n|\n|\r", self._rest + data)
        for line in lines:
            self._emit(line)
        while len(self._rest) > LINE_CHARACTERS:
            self._emit(self._rest[:LINE_CHARACTERS])
            self._rest = self._rest[LINE_CHARACTERS:]

    def finish(self) -> None:
        if self._rest:
            self._emit(self._rest)
            self._rest = b""

    def _emit(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        for start in range(0, max(len(text), 1), LINE_CHARACTERS):
            self._line(clean(text[start : start + LINE_CHARACTERS]))

"""Hostile bytes on their way to a terminal: what could move its cursor or its state is taken out.

Threat 16: OSC 52 writes the clipboard, OSC 8 disguises links, CSI hides and overwrites lines.
"""

import codecs
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
    if text.isprintable():  # most lines, and much faster
        return text
    plain = _SEQUENCES.sub("", text)
    return "".join(
        character
        if character in _KEPT or unicodedata.category(character) not in _UNPRINTABLE
        else character.encode("unicode_escape").decode("ascii")
        for character in plain
    )


_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


class Lines:
    """Cuts a stream of bytes into clean lines; a carriage return ends a line too.

    The lines are the same however the bytes were cut on their way.
    """

    def __init__(self, line: Callable[[str], None]) -> None:
        self._line = line
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._after_return = False

    def feed(self, data: bytes) -> None:
        self._take(self._decoder.decode(data))

    def finish(self) -> None:
        self._take(self._decoder.decode(b"", final=True))
        if self._rest:
            self._emit(self._rest)
            self._rest = ""

    def _take(self, text: str) -> None:
        if not text:
            return
        if self._after_return:  # a line feed here is the second half of the line's end
            text = text.removeprefix("\n")
        self._after_return = text.endswith("\r")
        *lines, self._rest = re.split(r"\r\n|\n|\r", self._rest + text)
        for line in lines:
            self._emit(line)
        while len(self._rest) > LINE_CHARACTERS:
            self._emit(self._rest[:LINE_CHARACTERS])
            self._rest = self._rest[LINE_CHARACTERS:]

    def _emit(self, line: str) -> None:
        for start in range(0, max(len(line), 1), LINE_CHARACTERS):
            self._line(clean(line[start : start + LINE_CHARACTERS]))

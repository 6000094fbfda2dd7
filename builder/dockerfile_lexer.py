"""The lines of a Dockerfile as instructions: directives, continuations, here-documents.

Follows the parser of BuildKit's frontend 1.x (``frontend/dockerfile/parser``), and calls a line
doubtful where buildah's, an older copy with changes of its own, could make something else of it.
``tests/dockerfiles`` has an example of each. Linear in the length of the input, whatever it holds.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from builder.errors import DockerfileInvalid
from builder.variables import expand

DOCKERFILE_BYTES = 1 << 20
INSTRUCTIONS = frozenset(
    {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK"}
    | {"LABEL", "MAINTAINER", "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}
)
_WITH_FLAGS = frozenset({"ADD", "COPY", "FROM", "RUN"})
_WITH_HEREDOCS = frozenset({"ADD", "COPY", "RUN"})
_WITHOUT_FLAGS = frozenset({"ARG", "ENV"})
_DIRECTIVE = re.compile(r"#\s*+([a-zA-Z][a-zA-Z0-9]*+)\s*+=(.*)", re.DOTALL)
_DIRECTIVES = frozenset({"syntax", "escape", "check"})
_ESCAPE_OF_BUILDAH = re.compile(r"#[ \t]*+escape[ \t]*+=[ \t]*+(.)", re.IGNORECASE)
_DOUBTFUL_CHARACTER = re.compile(r"[\x1c-\x1f]|\r\r(?:\n|\Z)")
"""Go's white space lacks the former; of the latter buildah drops one and BuildKit all."""
_COMMAND = re.compile(r"([^\t\v\f\r ]++)[\t\v\f\r ]*+(.*)", re.DOTALL)
ARGUMENT_SPACE = re.compile(r"[\t\v\f\r ]++")
_FLAG_PIECE = re.compile(
    r"""[^\s'"\\]++|\\.?|'(?:[^'\\]++|\\.)*'|"(?:[^"\\]++|\\.)*\"""", re.DOTALL
)
# Pieces are put together in loops: Python before 3.11.5 gets repetitions of whole groups wrong
# where they are possessive (gh-106052), and plain ones would need memory for each character.
_HEREDOC = re.compile(r"[0-9]*+<<(-?+)([ \t]*+)([^<]+)", re.DOTALL)
_HEREDOC_PIECE = re.compile(
    r"""<<-?[ \t]*+|\\.?|'[^']*+'|"(?:[^"\\]++|\\.)*"|[^\s'"\\<]++|<""", re.DOTALL
)
_DOUBTFUL_HEREDOC = re.compile(r"\$\{(?![A-Za-z_][A-Za-z0-9_]*+\})|[\udc80-\udcff]")
"""Beside a here-document: substitutions, whose words are split or make buildah see none; bytes
that are no UTF-8, which are replaced before they are compared with the line that ends it."""
_JSON = json.JSONDecoder()
_QUOTE_CHARACTERS = 100


def quoted(text: str) -> str:
    """``text`` from a Dockerfile as it may stand in a message: escaped and bounded."""
    return ascii(text if len(text) <= _QUOTE_CHARACTERS else f"{text[:_QUOTE_CHARACTERS]}...")


def invalid(line: int, what: str) -> DockerfileInvalid:
    return DockerfileInvalid(f"Dockerfile, line {line}: {what}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction.

    Attributes:
        line: Where it starts, from 1.
        name: In upper case.
        flags: ``--name`` or ``--name=value``, quotes removed.
        rest: What follows the flags, on one line.
        trigger: The instruction inside ONBUILD.
    """

    line: int
    name: str
    flags: tuple[str, ...] = ()
    rest: str = ""
    trigger: "Instruction | None" = None

    @property
    def words(self) -> list[str]:
        return [word for word in ARGUMENT_SPACE.split(self.rest) if word]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A Dockerfile, cut into instructions.

    Attributes:
        doubtful: Lines that builders read differently, as sentences.
    """

    frontend: str | None
    escape: str
    instructions: tuple[Instruction, ...]
    doubtful: tuple[str, ...]


def read_source(data: bytes) -> Source:
    """Raises DockerfileInvalid, with the line, for what is outside the grammar."""
    if len(data) > DOCKERFILE_BYTES:
        raise DockerfileInvalid(f"the Dockerfile has more than {DOCKERFILE_BYTES} bytes")
    if b"\0" in data:
        raise invalid(data[: data.index(b"\0")].count(b"\n") + 1, "a NUL byte")
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = [line.rstrip("\r") for line in text.split("\n")]
    directives = _directives(lines)
    escape = directives.get("escape", "\\")
    reader = _Reader(lines, escape)
    theirs = _ESCAPE_OF_BUILDAH.match(lines[0].lstrip())
    if escape != (theirs[1] if theirs else "\\"):
        reader.doubtful.append("Builders differ on whether the directive `# escape=` counts.")
    if (odd := _DOUBTFUL_CHARACTER.search(text)) is not None:
        reader.doubt(text.count("\n", 0, odd.start()) + 1, "holds control characters")
    return Source(
        frontend=directives.get("syntax", "").partition(" ")[0] or None,
        escape=escape,
        instructions=tuple(reader.instructions()),
        doubtful=tuple(reader.doubtful),
    )


def _directives(lines: list[str]) -> dict[str, str]:
    """Those at the very top; anything else, a blank line too, ends them."""
    found: dict[str, str] = {}
    shebang = lines[0].startswith("#!")  # BuildKit looks for `# syntax=` below it
    for number, line in enumerate(lines[shebang:], 1 + shebang):
        match = _DIRECTIVE.fullmatch(line)
        name, value = (match[1].lower(), match[2].strip()) if match else ("", "")
        if name not in _DIRECTIVES or not value:
            break
        if name in found:
            raise invalid(number, f"a second `# {name}=`")
        if name == "escape" and value not in {"\\", "`"}:
            raise invalid(number, f"the escape character {quoted(value)} is neither \\ nor `")
        found[name] = value
    if shebang:
        found.pop("escape", None)
    return found


class _Reader:
    def __init__(self, lines: list[str], escape: str) -> None:
        self._lines = lines
        self._escape = escape
        self._next = 0
        self._last = {line: number for number, line in enumerate(lines)}
        """The last line with this text, so that an open end is seen without a search."""
        self._last_untabbed = {line.lstrip("\t"): number for number, line in enumerate(lines)}
        self.doubtful: list[str] = []

    def doubt(self, line: int, what: str) -> None:
        self.doubtful.append(f"Line {line} {what}, which builders read differently.")

    def instructions(self) -> Iterator[Instruction]:
        while self._next < len(self._lines):
            start = self._next + 1
            text = self._logical_line()
            if text:
                instruction = parse_instruction(start, text)
                self._look_twice(instruction.trigger or instruction, text)
                self._skip_heredocs(instruction.trigger or instruction, text)
                yield instruction

    def _logical_line(self) -> str:
        parts: list[str] = []
        more = True
        while more and self._next < len(self._lines):
            line = self._lines[self._next]
            self._next += 1
            stripped = line.lstrip()
            if not stripped or stripped.startswith("#"):
                more = bool(parts)
                continue
            body = line.rstrip(" \t")
            more = body.endswith(self._escape)
            if more and body[:-1].endswith(self._escape):
                more = False
                self.doubt(self._next, "ends in two escape characters")
            parts.append(body[:-1] if more else line)
        return "".join(parts).strip()

    def _look_twice(self, instruction: Instruction, text: str) -> None:
        if instruction.name in _WITH_FLAGS:
            head = text[: len(text) - len(instruction.rest)] if instruction.flags else ""
            if not head.isascii():
                self.doubt(instruction.line, "has flags outside ASCII")
        if instruction.name in _WITH_HEREDOCS and _json_end(instruction.rest) is not None:
            self.doubt(instruction.line, "goes on behind its JSON form")

    def _skip_heredocs(self, instruction: Instruction, text: str) -> None:
        if (
            instruction.name not in _WITH_HEREDOCS
            or "<<" not in text
            or json_form(instruction.rest) is not None
        ):
            return
        found = heredocs(text)  # also in flags, which is where buildah looks too
        if _DOUBTFUL_HEREDOC.search(text):
            self.doubt(instruction.line, "has a here-document beside a substitution or odd bytes")
        for heredoc in found:
            last = (self._last_untabbed if heredoc.chomp else self._last).get(heredoc.name, -1)
            if last < self._next:
                if heredoc.spaced:  # as in $((1 << 2)), which older parsers leave alone
                    continue
                raise invalid(
                    instruction.line, f"the here-document {quoted(heredoc.name)} has no end"
                )
            if "$" in heredoc.name:
                raise invalid(instruction.line, "a variable names a here-document")
            if heredoc.spaced:
                self.doubt(instruction.line, "has white space in front of a here-document's name")
            while True:
                line = self._lines[self._next]
                self._next += 1
                if (line.lstrip("\t") if heredoc.chomp else line) == heredoc.name:
                    break


def parse_instruction(line: int, text: str, *, nested: bool = False) -> Instruction:
    """One logical line. Raises DockerfileInvalid."""
    match = _COMMAND.fullmatch(text)
    name, rest = (match[1].upper(), match[2]) if match else ("", "")
    if name not in INSTRUCTIONS:
        raise invalid(line, f"unknown instruction {quoted(match[1] if match else text)}")
    if name == "ONBUILD":
        if nested:
            raise invalid(line, "ONBUILD within ONBUILD")
        trigger = parse_instruction(line, rest.strip(), nested=True)
        return Instruction(line=line, name=name, rest=rest, trigger=trigger)
    if nested and name in {"FROM", "MAINTAINER"}:
        raise invalid(line, f"{name} cannot be a trigger of ONBUILD")
    if name in _WITHOUT_FLAGS and rest.startswith("--"):
        raise invalid(line, f"{name} has no flags")
    flags: list[str] = []
    position = 0
    while name in _WITH_FLAGS and rest.startswith("--", position):
        flag, position = _word(_FLAG_PIECE, rest, position)
        if flag is None:
            raise invalid(line, "a flag with an open quote")
        while position < len(rest) and rest[position].isspace():
            position += 1
        if flag == "--":
            break
        flags.append(_unquoted(flag))
    return Instruction(line=line, name=name, flags=tuple(flags), rest=rest[position:].strip())


def _word(piece: re.Pattern[str], text: str, position: int) -> tuple[str | None, int]:
    """The word at ``position`` and where it ends; None where a quote stays open."""
    start = position
    while match := piece.match(text, position):
        position = match.end()
    open_quote = position < len(text) and not text[position].isspace()
    return (None if open_quote else text[start:position]), position


def _unquoted(flag: str) -> str:
    kept: list[str] = []
    quote = ""
    characters = iter(flag)
    for char in characters:
        if char == "\\":
            kept.append(next(characters, ""))
        elif char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        else:
            kept.append(char)
    return "".join(kept)


def json_form(rest: str) -> list[str] | None:
    """The strings of an instruction's JSON form, or None where it is not in that form.

    Like builders, does not look at what follows the closing bracket.
    """
    found = _json_list(rest)
    return None if found is None else found[0]


def _json_end(rest: str) -> int | None:
    """Where the JSON form ends, if that is not the end of ``rest``."""
    found = _json_list(rest)
    return None if found is None or found[1] == len(rest) else found[1]


def _json_list(rest: str) -> tuple[list[str], int] | None:
    if not rest.startswith("["):
        return None
    try:
        value, end = _JSON.raw_decode(rest)
    except (ValueError, RecursionError):
        return None
    return (value, end) if all(isinstance(item, str) for item in value) else None


def split_words(text: str, escape: str) -> list[str] | None:
    """Words with their quotes and escapes kept; None where a quote stays open."""
    e = re.escape(escape)
    return _split(
        re.compile(rf"""{e}.?|'[^']*+'|"(?:[^"{e}]++|{e}.)*"|[^\s'"{e}]++""", re.DOTALL), text
    )


def _split(piece: re.Pattern[str], text: str) -> list[str] | None:
    words = []
    text = text.rstrip()
    position = 0
    while position < len(text):
        word, position = _word(piece, text, position)
        if word is None:
            return None
        words.append(word)
        while position < len(text) and text[position].isspace():
            position += 1
    return words


@dataclass(frozen=True, slots=True)
class Heredoc:
    name: str
    chomp: bool
    spaced: bool


def heredocs(text: str) -> list[Heredoc]:
    """The here-documents that a logical line opens, in order.

    White space behind ``<<`` does not end a word, as in ``<< EOF``.
    """
    found = []
    for word in _split(_HEREDOC_PIECE, text) or []:
        match = _HEREDOC.fullmatch(word)
        if match:
            name = expand(match[3], {}, "\\").text
            if name:
                found.append(Heredoc(name, bool(match[1]), bool(match[2])))
    return found


def is_heredoc(word: str) -> bool:
    return _HEREDOC.fullmatch(word) is not None

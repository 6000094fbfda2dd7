"""The lines of a Dockerfile as instructions: directives, continuations, here-documents.

Follows the parser of BuildKit's frontend 1.x (``frontend/dockerfile/parser``), which buildah's
was copied from. Linear in the length of the input, whatever it holds.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from builder.errors import DockerfileInvalid

DOCKERFILE_BYTES = 1 << 20
INSTRUCTIONS = frozenset(
    {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK"}
    | {"LABEL", "MAINTAINER", "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}
)
_WITH_FLAGS = frozenset({"ADD", "COPY", "FROM", "RUN"})
_WITH_HEREDOCS = frozenset({"ADD", "COPY", "RUN"})
_DIRECTIVE = re.compile(r"#\s*+([a-zA-Z][a-zA-Z0-9]*+)\s*+=(.*)", re.DOTALL)
_DIRECTIVES = frozenset({"syntax", "escape", "check"})
_COMMAND = re.compile(r"(\S++)\s*+(.*)", re.DOTALL)
_FLAG_PIECE = re.compile(
    r"""[^\s'"\\]++|\\.?|'(?:[^'\\]++|\\.)*'|"(?:[^"\\]++|\\.)*\"""", re.DOTALL
)
# Pieces are put together in loops: Python before 3.11.5 gets repetitions of whole groups wrong
# where they are possessive (gh-106052), and plain ones would need memory for each character.
_HEREDOC = re.compile(r"[0-9]*<<(-?)(\s*)([^<]+)", re.DOTALL)
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
        """The arguments of the JSON form, or else the words."""
        return json_form(self.rest) or self.rest.split()


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

    def instructions(self) -> Iterator[Instruction]:
        while self._next < len(self._lines):
            start = self._next + 1
            text = self._logical_line()
            if text:
                instruction = parse_instruction(start, text)
                self._skip_heredocs(instruction)
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
                self.doubtful.append(
                    f"Line {self._next} ends in two escape characters, which builders read "
                    "differently."
                )
            parts.append(body[:-1] if more else line)
        return "".join(parts).strip()

    def _skip_heredocs(self, instruction: Instruction) -> None:
        inner = instruction.trigger or instruction
        if inner.name not in _WITH_HEREDOCS or json_form(inner.rest) is not None:
            return
        for heredoc in heredocs(inner.rest):
            last = (self._last_untabbed if heredoc.chomp else self._last).get(heredoc.name, -1)
            if last < self._next:
                if heredoc.spaced:  # as in $((1 << 2)), which older parsers leave alone
                    continue
                raise invalid(
                    instruction.line, f"the here-document {quoted(heredoc.name)} has no end"
                )
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
    """The strings of an instruction's JSON form, or None where it is not in that form."""
    if not rest.startswith("["):
        return None
    try:
        value = json.loads(rest)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    return None


def split_words(text: str, escape: str) -> list[str] | None:
    """Words with their quotes and escapes kept; None where a quote stays open.

    White space behind ``<<`` does not end a word, as in ``<< EOF``.
    """
    e = re.escape(escape)
    piece = re.compile(
        rf"""<<[ \t]*+|{e}.?|'[^']*+'|"(?:[^"{e}]++|{e}.)*"|[^\s'"{e}<]++|<""", re.DOTALL
    )
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


def heredocs(rest: str) -> list[Heredoc]:
    """The here-documents that a line opens, in order."""
    found = []
    for word in split_words(rest, "\\") or [] if "<<" in rest else []:
        match = _HEREDOC.fullmatch(word)
        if match and not (match[1] and match[2]):
            found.append(Heredoc(_plain(match[3]), bool(match[1]), bool(match[2])))
    return found


def is_heredoc(word: str) -> bool:
    return _HEREDOC.fullmatch(word) is not None


def _plain(word: str) -> str:
    """A word without its quotes; a backslash is kept within single quotes."""
    return re.sub(
        r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)""",
        lambda m: m[1] or (re.sub(r'\\(["$\\])', r"\1", m[2]) if m[2] else "") or m[3] or "",
        word,
    )

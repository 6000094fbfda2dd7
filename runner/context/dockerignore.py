r"""The patterns of a ``.dockerignore`` file, as ``docker build`` reads them.

    >>> rules = IgnoreRules.parse(b"*.log\n!keep.log\n", ".dockerignore")
    >>> rules.excluded("a.log"), rules.excluded("keep.log")
    (True, False)

The semantics are those of moby's ``patternmatcher`` and ``ignorefile``: the last pattern that
matches a path or one of its parents decides. Where moby's translation to regular expressions is
an accident (``*`` and ``?`` inside a class, ``\d`` as a digit) the documented meaning of Go's
``filepath.Match`` is followed, and a class never matches ``/``.

The file is hostile. Each pattern becomes a regular expression whose repetitions are atomic, so
that one match costs at most (path length * pattern length) steps: for a glob, taking the leftmost
match of each literal piece is never wrong.
"""

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import Self

from runner.context.names import shown
from runner.errors import ContextInvalid

FILE_BYTES = 1 << 20
PATTERNS = 10_000
_PATTERN_CHARACTERS = 1024
_UNALIGNED = 4
"""Most ``**`` inside names (``a**b``) in one pattern: each doubles what it compiles to."""
_EVALUATIONS = 100_000_000
"""Patterns times paths that one snapshot may cost: about a minute."""
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
"""What Go's ``strings.TrimSpace`` trims; ``str.strip`` takes the separators 1C to 1F too."""


class _BadPattern(ValueError):
    """A pattern that means nothing; the message says why."""


@dataclass(frozen=True, slots=True)
class _Pattern:
    exception: bool
    alternatives: tuple[tuple[str, ...], ...]
    """Each a list of regular expressions, one per path segment; ``**`` stands for itself."""
    literal: str | None
    """The only path that it matches, where there are no wildcards."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring patterns of one kind: which of them matched makes no difference."""

    exception: bool
    literals: frozenset[str]
    wildcards: re.Pattern[str] | None
    cost: int

    def matches(self, path: str) -> bool:
        return path in self.literals or (
            self.wildcards is not None and self.wildcards.fullmatch(path) is not None
        )


@dataclass(slots=True)
class IgnoreRules:
    """What stays out of the context.

    A walk asks ``decide`` for each path with the answer for its parent, and ``excludes`` what
    that answer means.
    """

    name: str
    _groups: tuple[_Group, ...] = ()
    _exceptions: tuple[tuple[re.Pattern[str] | None, ...], ...] = ()
    _evaluations: int = field(default=0, compare=False)

    @classmethod
    def parse(cls, data: bytes, name: str) -> Self:
        """Reads the ignore file ``name``.

        Raises:
            ContextInvalid: A bad pattern (the message names its line), or more than 1 MiB or
                10,000 patterns.
        """
        if len(data) > FILE_BYTES:
            raise ContextInvalid(
                f"{shown(name)} is larger than {FILE_BYTES} bytes",
                advice="Shorten it: patterns may use * and ** instead of naming each file.",
            )
        patterns = []
        lines = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").split("\n")
        for number, line in enumerate(lines, 1):
            text = line.strip(_SPACE)
            if not text or line.startswith("#"):
                continue
            try:
                patterns.append(_pattern(text))
            except _BadPattern as error:
                raise ContextInvalid(
                    f"{shown(name)}, line {number}: {error}: {shown(text)}",
                    advice="Mend the line; nothing was sent.",
                ) from None
            if len(patterns) > PATTERNS:
                raise ContextInvalid(
                    f"{shown(name)} has more than {PATTERNS} patterns",
                    advice="Shorten it: patterns may use * and ** instead of naming each file.",
                )
        groups = tuple(
            _group(exception, tuple(members))
            for exception, members in groupby(patterns, key=lambda p: p.exception)
        )
        exceptions = tuple(
            tuple(None if segment == "**" else re.compile(segment) for segment in alternative)
            for pattern in patterns
            if pattern.exception
            for alternative in pattern.alternatives
        )
        return cls(name, groups, exceptions)

    def decide(self, path: str, above: int = -1) -> int:
        """The last group that matches ``path`` or, as ``above`` says, a parent of it; or -1.

        Raises:
            ContextInvalid: The snapshot has asked for more matching than it is worth.
        """
        for index in range(len(self._groups) - 1, above, -1):
            group = self._groups[index]
            self._evaluations += group.cost
            if group.matches(path):
                return index
        if self._evaluations > _EVALUATIONS:
            raise ContextInvalid(
                f"{shown(self.name)} has too many patterns for so many files",
                advice="Exclude whole directories first, or use fewer patterns.",
            )
        return above

    def excludes(self, decision: int) -> bool:
        return decision >= 0 and not self._groups[decision].exception

    def excluded(self, path: str) -> bool:
        """Whether ``path`` stays out, all its parents considered."""
        decision = -1
        for end in [*(m.start() for m in re.finditer("/", path)), len(path)]:
            decision = self.decide(path[:end], decision)
        return self.excludes(decision)

    def may_include_below(self, directory: str) -> bool:
        """Whether an exception could match something below an excluded ``directory``."""
        parts = directory.split("/")
        self._evaluations += len(self._exceptions)
        return any(_reaches_below(exception, parts) for exception in self._exceptions)


def _reaches_below(pattern: tuple[re.Pattern[str] | None, ...], parts: list[str]) -> bool:
    for segment, part in zip(pattern, parts, strict=False):
        if segment is None:
            return True
        if not segment.fullmatch(part):
            return False
    return len(pattern) > len(parts)


def _pattern(text: str) -> _Pattern:
    if len(text) > _PATTERN_CHARACTERS:
        raise _BadPattern(f"longer than {_PATTERN_CHARACTERS} characters")
    exception = text.startswith("!")
    body = text[1:].strip(_SPACE) if exception else text
    if not body or (exception and body.strip("/") == ""):
        raise _BadPattern("! needs a pattern")
    clean = posixpath.normpath(body).lstrip("/") or "/"
    units = list(_units(clean))
    if re.fullmatch(r"\*\*[^/*?\[\]\\][^*?\[\]\\]*", clean):
        units[1:1] = ["/", "*"]  # `**foo` is any path that ends with foo, as moby reads it
    literal = None if re.search(r"[*?\[\\]", clean) else clean
    return _Pattern(exception, tuple(_alternatives(units)), literal)


def _units(pattern: str) -> Iterator[str]:
    """``/``, ``*``, ``**``, and for all else a regular expression of one character."""
    position = 0
    while position < len(pattern):
        char = pattern[position]
        if pattern.startswith("**", position):
            position += 2
            yield "**" if position < len(pattern) else "*"
            # A match includes what is below it, so `**` at the end means no more than `*`.
        elif char in {"*", "/"}:
            position += 1
            yield char
        elif char == "?":
            position += 1
            yield "[^/]"
        elif char == "[":
            expression, position = _class(pattern, position + 1)
            yield expression
        else:
            literal, position = _character(pattern, position)
            yield re.escape(literal)


def _character(pattern: str, position: int) -> tuple[str, int]:
    if pattern[position] == "\\":
        position += 1
        if position == len(pattern):
            raise _BadPattern("nothing follows the last backslash")
    return pattern[position], position + 1


def _class(pattern: str, position: int) -> tuple[str, int]:
    """A ``[...]``, from behind its bracket, as ``filepath.Match`` reads it."""

    def end(position: int) -> tuple[str, int]:
        if position >= len(pattern) or pattern[position] in "-]":
            raise _BadPattern("a bad or unfinished [class]")
        return _character(pattern, position)

    negated = pattern.startswith("^", position)
    position += negated
    ranges: list[str] = []
    while not (ranges and pattern.startswith("]", position)):
        low, position = end(position)
        high = low
        if pattern.startswith("-", position):
            high, position = end(position + 1)
        # Go accepts an empty range, which matches nothing
        ranges.append(f"{re.escape(low)}-{re.escape(high)}" if low <= high else "")
    body = "".join(ranges)
    if not body:
        return (r"[^/]" if negated else r"(?!)"), position + 1
    return rf"(?!/)[{'^' if negated else ''}{body}]", position + 1


def _alternatives(units: list[str], unaligned: int = 0) -> Iterator[tuple[str, ...]]:
    """Lists of segments, for each way that a ``**`` inside a name can be read.

    ``a**b`` matches ``ab`` and ``aX/Y/b`` but not ``aXb``: moby reads ``**`` as "any
    directories, or nothing".
    """
    for index, unit in enumerate(units):
        if unit != "**" or index == 0 or units[index - 1] == "/":
            continue
        if unaligned == _UNALIGNED:
            raise _BadPattern(f"more than {_UNALIGNED} times ** within a name")
        head, tail = units[:index], units[index + 1 :]
        tail = tail[1:] if tail[:1] == ["/"] else tail
        yield from _alternatives(head + tail, unaligned + 1)
        yield from _alternatives([*head, "*", "/", "**", "/", *tail], unaligned + 1)
        return
    yield tuple(_segments(units))


def _segments(units: list[str]) -> Iterator[str]:
    name: list[str] = []
    previous = ""
    for unit in units:
        if unit == "**":
            if previous != "**":
                yield unit
        elif unit == "/":
            if name:
                yield _name(name)
            name = []
            continue
        else:
            name.append(unit)
        previous = unit
    if name:
        yield _name(name)


def _name(units: list[str]) -> str:
    """One segment: literal pieces between stars, each found leftmost, the last at the end."""
    pieces = [""]
    for unit in units:
        if unit == "*":
            pieces.append("")
        else:
            pieces[-1] += unit
    if len(pieces) == 1:
        return pieces[0]
    middle = "".join(f"(?>[^/]*?{piece})" for piece in pieces[1:-1] if piece)
    return f"(?>{pieces[0]}{middle}[^/]*{pieces[-1]})"


def _expression(segments: tuple[str, ...], names: Iterator[int]) -> str:
    """The segments as one expression; those between two ``**`` are found leftmost.

    A look-ahead and a back-reference stand for an atomic group, which Python before 3.11.5 gets
    wrong around repetitions of groups (gh-106052).
    """
    runs: list[list[str]] = [[]]
    for segment in segments:
        if segment == "**":
            runs.append([])
        else:
            runs[-1].append(segment)
    if len(runs) == 1:
        return "/".join(runs[0])
    anywhere = "(?:[^/]*/)*?"
    first, *middle, last = ("".join(f"{s}/" for s in run) for run in runs)
    between = "".join(
        f"(?=(?P<g{name}>{anywhere}{run}))(?P=g{name})"
        for name, run in zip(names, middle, strict=False)
    )
    return f"{first}{between}{anywhere}{last.removesuffix('/')}"


def _group(exception: bool, patterns: tuple[_Pattern, ...]) -> _Group:
    names = count()
    expressions = [
        _expression(alternative, names)
        for pattern in patterns
        if pattern.literal is None
        for alternative in pattern.alternatives
    ]
    return _Group(
        exception,
        frozenset(p.literal for p in patterns if p.literal is not None),
        re.compile("|".join(f"(?:{e})" for e in expressions), re.DOTALL) if expressions else None,
        1 + len(expressions),
    )

r"""Variables in a Dockerfile's words, as far as they can be known without building.

>>> expand("debian:${TAG:-12}", {}, "\\")
Expansion(text='debian:12', missing=())
>>> expand("debian:$TAG", {}, "\\")
Expansion(text='debian:$TAG', missing=('TAG',))
"""

import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass

TEXT_CHARACTERS = 4096
"""Of one expanded word: `ARG B=$A$A`, `ARG C=$B$B` and so on would double without end."""
_DEPTH = 16
_OPERATOR = re.compile(r":?[-+?]|\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*+")
_PARAMETERS = "0123456789@*#?$!-"
"""Where a name would stand: builders read them differently."""

Values = Mapping[str, str | None]
"""What names stand for; None where that is set, and nobody can tell to what."""


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


def expand(word: str, values: Values, escape: str) -> Expansion:
    """Replaces ``$X``, ``${X}``, ``${X:-d}``, ``${X-d}``, ``${X:+a}`` and ``${X+a}``."""
    word = word.removeprefix("\ufeff")  # which Go's text/scanner drops
    reader = _Reader(word, values)
    if escape != "\\" and ("\\" in word or escape in word):  # buildah knows the backslash alone
        return Expansion(word[:TEXT_CHARACTERS], ("an escape",))
    try:
        text = reader.until("", 0)
    except _Unreadable as error:
        return Expansion(word[:TEXT_CHARACTERS], (str(error),))
    return Expansion(text, tuple(dict.fromkeys(reader.missing)))


def platform_arguments(platform: str) -> dict[str, str]:
    """The arguments that BuildKit and buildah predefine for every FROM."""
    system, _, rest = platform.partition("/")
    architecture, _, variant = rest.partition("/")
    parts = {"PLATFORM": platform, "OS": system, "ARCH": architecture, "VARIANT": variant}
    return {f"{side}{key}": value for side in ("TARGET", "BUILD") for key, value in parts.items()}


class Variables:
    """What names stand for, from one instruction to the next.

    Attributes:
        escape: Of the Dockerfile.
        triggered: Whether words are those of an ONBUILD, whose variables are another build's.
        set_by_env: Names that ENV set in any stage.
    """

    def __init__(
        self, escape: str, build_args: Mapping[str, str], predefined: Mapping[str, str]
    ) -> None:
        self.triggered = False
        self.set_by_env: dict[str, None] = {}
        self.escape = escape
        self._build_args = dict[str, str | None](build_args)
        # One that the user sets counts for BuildKit, and for buildah only sometimes.
        self._predefined = {k: None if k in build_args else v for k, v in predefined.items()}
        self._global: dict[str, str | None] = {}
        """Of each ARG before the first FROM."""
        self._scope = self._global
        """Where ARG declares."""
        self._environment: dict[str, str | None] = {}
        """Of the current stage's ENV, which wins over ARG and which later stages inherit."""
        self._triggers: dict[str, str | None] = {}
        """Names that the current stage's ONBUILD sets in a stage that starts from it."""
        self._stages: dict[str, tuple[dict[str, str | None], dict[str, str | None]]] = {}
        """The last two of each stage with a name."""

    def expand(self, word: str, values: Values) -> Expansion:
        """``word``, with one of the mappings below."""
        if self.triggered and "$" in word:
            return Expansion(word[:TEXT_CHARACTERS], ("another build triggers it",))
        return expand(word, values, self.escape)

    @property
    def outside(self) -> Values:
        """For FROM."""
        return ChainMap(self._global, self._predefined)

    @property
    def inside(self) -> Values:
        """For instructions of the current stage."""
        return ChainMap(self._environment, self._scope)

    @property
    def arguments(self) -> Values:
        """Those of the current stage that ARG declares."""
        return self._scope

    @property
    def planned(self) -> Values:
        """For what buildah reads before it builds anything."""
        return ChainMap(self._predefined, self._build_args, self._global)

    def enter_stage(self, name: str | None, base: str | None) -> None:
        """Begins a stage ``name`` from ``base``; None for one that could be any stage."""
        if base is None:
            self._environment = dict.fromkeys(self.set_by_env)
        else:
            environment, triggers = self._stages.get(base, ({}, {}))
            self._environment = environment | triggers
        self._scope, self._triggers = {}, {}
        if name is not None:
            self._stages[name] = self._environment, self._triggers

    def inherit(self, environment: Mapping[str, str]) -> None:
        """Takes in the ENV of the image that the current stage starts from."""
        self._environment.update(environment)

    def declare(self, name: str, default: str | None) -> None:
        """ARG."""
        if name in self._predefined:
            # A default counts for BuildKit and not for buildah.
            self._scope[name] = self._predefined[name] if default is None else None
        elif name in self._build_args:
            self._scope[name] = self._build_args[name]
        elif default is not None:
            expansion = self.expand(default, self.inside)
            self._scope[name] = None if expansion.missing else expansion.text
        elif name in self._global:
            self._scope[name] = self._global[name]

    def set(self, name: str, value: str | None) -> None:
        """ENV; or an ONBUILD with ENV or ARG, for stages that start from this one."""
        if self.triggered:
            self._triggers[name] = None
        else:
            self._environment[name] = value
        self.set_by_env[name] = None


class _Reader:
    def __init__(self, word: str, values: Values) -> None:
        self._word = word
        self._values = values
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
            elif char == "\\":
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
        if quote and following not in {'"', "$", "\\"}:
            return "\\" + following
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
        following = self._word[name.end() if name else start + 1 + brace :][:1]
        if not following.isascii() or (name is None and following and following in _PARAMETERS):
            raise _Unreadable("a parameter, or a name outside ASCII")
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
        value = self._values.get(name)
        return self._miss(name, start) if value is None else value

    def _miss(self, name: str, start: int) -> str:
        self.missing.append(name)
        return self._word[start : self._at]

    def _modified(self, name: str, operator: str, start: int, depth: int) -> str:
        known = len(self.missing)
        word = self.until("}", depth + 1)
        value = self._values.get(name)
        unsure = value is None and name in self._values
        filled = bool(value) if operator.startswith(":") else value is not None
        kind = operator[-1]
        if not unsure and kind != "?" and filled == (kind == "+"):
            return word
        del self.missing[known:]  # the word is not used
        if unsure or (kind == "?" and not filled):
            return self._miss(name, start)
        return "" if kind == "+" else value or ""

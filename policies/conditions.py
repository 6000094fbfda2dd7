"""Conditions: CEL over facts, cut down until none of them can fail.

    >>> condition = compile_condition("source.fork && !('docker.io/a/b:1' in dockerfile.images)")
    >>> condition.holds(View({"source.fork": True, "dockerfile.images": ()}))
    True

The type checker finds unknown names and mixed types when the policy is loaded. What could still
fail while evaluating (arithmetic, indices, maps, conversions) is not in the language, and neither
are regular expressions and prefixes: text is compared whole, or with ``glob``, which matches in
full.
A fact that is unknown makes a condition unknown unless the rest decides it alone, as in Kleene's
logic: ``false && unknown`` is false. docs/adr/0007 has why this library.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from cel_expr_python import cel

from policies.patterns import matches
from policies.vocabulary import FACTS, TRUST, Kind, Value

MOST_CHARACTERS = 4096
MOST_DEPTH = 32
"""Of parentheses; the parser recurses."""

_FUNCTIONS = (
    *("_&&_", "_||_", "!_", "_?_:_", "@not_strictly_false"),
    *("_==_", "_!=_", "_<_", "_<=_", "_>_", "_>=_", "@in", "size"),
)
_CONFIG = "\n".join(
    [
        "stdlib:",
        "  include_macros: [all, exists]",
        "  include_functions:",
        *(f'    - name: "{name}"' for name in _FUNCTIONS),
    ]
)
_TYPES = {
    Kind.BOOL: cel.Type.BOOL,
    Kind.INT: cel.Type.INT,
    Kind.STRING: cel.Type.STRING,
    Kind.LIST: cel.Type.List(cel.Type.STRING),
}
_STRING = re.compile(r"(?<![\w'\"])(?:'[^'\"\\\n]*'|\"[^\"'\\\n]*\")(?!['\"])")
_LIST = re.compile(r"\[\s*(?:(?:\0+\s*,\s*)*\0+|(?:[0-9]+\s*,\s*)*[0-9]+)?\s*\]")
_PLAIN = re.compile(r"[\0\w\s.,()<>=!&|?:]*", re.ASCII)
_FACT_AS_PATTERN = re.compile(
    r"\.\s*glob\s*\(\s*(?!\0)((?:\w+\s*\.|tenant\b|trust\b|destinations\b))"
)
"""A hostile ``**`` would match everything."""
_MESSAGE = re.compile(r"ERROR: <input>:(\d+):(\d+): ([^\n]*)")
_OPEN = re.compile(r"\bbase\s*\.\s*onbuild\b")
_MISSING = 'No value with name "'


class ConditionInvalid(Exception):
    """Not a condition; never leaves this package.

    Attributes:
        line: From 1, within the condition.
        column: From 1, likewise.
    """

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


class ConditionFailed(Exception):
    """Evaluating went wrong in a way that the language should not allow."""


class View:
    """Facts as conditions see them."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        # Names and paths of hostile files may have bytes that are no text.
        self.activation = _environment().Activation({
            name: _text(value) for name, value in values.items()
        })  # fmt: skip


def _text(value: Value) -> Any:  # noqa: ANN401 - what the library takes
    if isinstance(value, tuple):
        return [_text(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition that was checked."""

    text: str
    program: Any

    @property
    def is_open(self) -> bool:
        """Whether it asks for what nobody can know before the base images are resolved."""
        return _OPEN.search(self.text) is not None

    def holds(self, view: View) -> bool | None:
        """Whether it does; None where that depends on a fact that is unknown.

        Raises:
            ConditionFailed: A comparison of hostile lists took more steps than the library allows.
        """
        try:
            result = self.program.eval(view.activation)
        except RuntimeError as error:
            raise ConditionFailed(str(error)) from None
        value = result.value()
        if isinstance(value, bool):
            return value
        if _MISSING in str(value):
            return None
        raise ConditionFailed(str(value))


@cache
def _environment() -> Any:  # noqa: ANN401 - the library's
    glob = cel.FunctionDecl(
        "glob",
        [
            cel.Overload(
                "string_glob_string",
                return_type=cel.Type.BOOL,
                parameters=[cel.Type.STRING, cel.Type.STRING],
                is_member=True,
                impl=lambda text, pattern: matches(pattern, text),
            )
        ],
    )
    variables = {name: _TYPES[fact.kind] for name, fact in FACTS.items()}
    return cel.NewEnv(
        config=cel.NewEnvConfigFromYaml(_CONFIG),
        variables={**variables, TRUST: cel.Type.STRING},
        functions=[glob],
    )


def compile_condition(text: str) -> Condition:
    """Checks ``text``, which then cannot fail.

    Raises:
        ConditionInvalid: With line and column.
    """
    _require_plain(text)
    try:
        program = _environment().compile(text)
    except RuntimeError as error:
        match = _MESSAGE.search(str(error))
        if match is None:
            raise ConditionInvalid("not a condition", 1, 1) from None
        message = match[3].removesuffix(" (in container '')")
        raise ConditionInvalid(message, int(match[1]), int(match[2])) from None
    if program.return_type() != cel.Type.BOOL:
        raise ConditionInvalid("not true or false", 1, 1)
    return Condition(text, program)


def _require_plain(text: str) -> None:
    """Refuses what the type checker takes and an evaluation may not: maps, and mixed lists."""
    if len(text) > MOST_CHARACTERS:
        raise ConditionInvalid(f"longer than {MOST_CHARACTERS} characters", 1, 1)
    if "\0" in text:
        raise _at(text, text.index("\0"), "a null byte is not part of the language")
    bare = _STRING.sub(lambda match: "\0" * len(match[0]), text)
    bare = _LIST.sub(lambda match: "\0" * len(match[0]), bare)
    end = len(_PLAIN.match(bare)[0])  # type: ignore[index] # it matches nothing at least
    if end < len(bare):
        what = "a list of anything but texts or numbers" if bare[end] in "[]" else repr(bare[end])
        raise _at(text, end, f"{what} is not part of the language")
    if (match := _FACT_AS_PATTERN.search(bare)) is not None:
        raise _at(text, match.start(1), "a pattern is written out, or a variable of exists or all")
    depth = 0
    for position, character in enumerate(bare):
        depth += (character in "(!?") - (character == ")")
        if depth > MOST_DEPTH:
            raise _at(text, position, "too deep")


def _at(text: str, position: int, message: str) -> ConditionInvalid:
    before = text[:position]
    return ConditionInvalid(message, before.count("\n") + 1, position - before.rfind("\n"))

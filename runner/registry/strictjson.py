"""JSON from strangers, read so that no two readers can disagree about what it says.

Go's decoder, which most registries and runtimes use, takes the last of two equal keys and
matches the names of fields in any case; others take the first, or match exactly. So equal keys
are refused everywhere, and keys that differ from a known name in case alone are refused where
names are known (``JsonObject``).
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from policies.errors import InvalidReference
from policies.reference import Digest
from runner.errors import VerificationFailed

DEPTH = 32
"""Of nested arrays and objects; an image configuration needs 5."""
VALUES = 200_000
"""Of all values, estimated from commas and brackets before anything is built in memory:
empty arrays take 3 bytes as text and some 60 as objects."""
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SEPARATORS = b",[{"


def parse(data: bytes, *, most_bytes: int) -> "JsonObject":
    """The one object that ``data`` holds.

    Raises:
        VerificationFailed: Rules ``document-size``, ``json`` and ``duplicate-key``.
    """
    if len(data) > most_bytes:
        raise VerificationFailed(
            f"a document of {len(data)} bytes, at most {most_bytes} are read", rule="document-size"
        )
    if sum(map(data.count, _SEPARATORS)) > VALUES:
        raise VerificationFailed(f"more than {VALUES} JSON values", rule="json")
    try:
        # Decoded here, because json.loads would also accept UTF-16 and UTF-32.
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:  # ValueError covers Unicode and digit limits
        raise VerificationFailed(f"not JSON: {_short(error)}", rule="json") from None
    if _deeper_than(value, DEPTH):
        raise VerificationFailed(f"JSON nested deeper than {DEPTH}", rule="json")
    return JsonObject(value, "document")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise VerificationFailed("a JSON object with two equal keys", rule="duplicate-key")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number beyond all bounds")
    return number


def _deeper_than(value: Any, depth: int) -> bool:  # noqa: ANN401 - any JSON value
    level = [value]
    for _ in range(depth + 1):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _short(error: BaseException) -> str:
    return ascii(str(error))[1:-1][:200]


class JsonObject:
    """An object whose members are asked for by name and kind; ``where`` says which one it is.

    Every method raises VerificationFailed, rule ``schema``, where the member is of another kind.
    """

    def __init__(self, value: Any, where: str) -> None:  # noqa: ANN401 - any JSON value
        if not isinstance(value, dict):
            raise VerificationFailed(f"{where} is no JSON object", rule="schema")
        self._members = value
        self._where = where

    def only_spelled(self, *names: str) -> None:
        """Refuses keys that some readers take for one of ``names`` (rule ``duplicate-key``)."""
        folded = {name.casefold() for name in names}
        for key in self._members:
            if key not in names and key.casefold() in folded:
                raise VerificationFailed(
                    f"{self._where}: some readers take {key[:100]!a} for another key",
                    rule="duplicate-key",
                )

    def __contains__(self, name: str) -> bool:
        """Whether the key is there at all, be its value null."""
        return name in self._members

    def given(self, name: str) -> bool:
        """Whether the member has a value besides null."""
        return self._members.get(name) is not None

    def _fail(self, name: str, kind: str) -> NoReturn:
        raise VerificationFailed(f"{self._where}: {name} is not {kind}", rule="schema")

    def integer(self, name: str) -> int:
        value = self._members.get(name)
        if type(value) is not int:  # neither true nor 1.0
            self._fail(name, "an integer")
        return value

    def text(self, name: str) -> str:
        value = self._members.get(name)
        if not isinstance(value, str):
            self._fail(name, "a string")
        return value

    def word(self, name: str) -> str:
        """A lower-case name such as an architecture: safe in messages and file names."""
        value = self.text(name)
        if not _WORD.fullmatch(value):
            self._fail(name, "a lower-case word")
        return value

    def optional_word(self, name: str) -> str | None:
        """None where the member is absent, null or empty."""
        return self.word(name) if self._members.get(name) not in (None, "") else None

    def digest(self, name: str) -> Digest:
        """Raises VerificationFailed, rule ``digest``, too."""
        return as_digest(self.text(name), f"{self._where}: {name}")

    def child(self, name: str) -> "JsonObject":
        return JsonObject(self._members.get(name), f"{self._where}: {name}")

    def texts(self, name: str) -> dict[str, str]:
        """An object of strings, such as annotations."""
        value = self._members.get(name)
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            self._fail(name, "an object of strings")
        return value

    def array(self, name: str) -> list[Any]:
        value = self._members.get(name)
        if not isinstance(value, list):
            self._fail(name, "an array")
        return value

    def children(self, name: str) -> Iterator["JsonObject"]:
        for number, item in enumerate(self.array(name)):
            yield JsonObject(item, f"{self._where}: {name}[{number}]")


def as_digest(value: Any, where: str) -> Digest:  # noqa: ANN401 - any JSON value
    """Raises VerificationFailed, rule ``digest``, for anything but a well-formed digest."""
    try:
        return Digest(value if isinstance(value, str) else "")
    except InvalidReference:
        raise VerificationFailed(f"{where} is not a digest", rule="digest") from None

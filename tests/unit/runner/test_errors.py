"""The docstring of ``runner.errors`` is the tree: complete, and true."""

import re
from collections.abc import Iterator

import pytest

from runner import errors
from runner.errors import RunnerError


def drawn() -> dict[str, tuple[str, int, str]]:
    """Name to parent, status and code."""
    row = re.compile(r"^    ([│├└─ ]*)(\w+) +(\d+)  ([a-z-]+)$", re.MULTILINE)
    found, above = {}, {0: "RunnerError"}
    for branch, name, status, code in row.findall(errors.__doc__ or ""):
        depth = len(branch) // 4
        above[depth] = name
        found[name] = (above[depth - 1], int(status), code)
    return found


def below(root: type[RunnerError]) -> Iterator[type[RunnerError]]:
    for child in root.__subclasses__():
        yield child
        yield from below(child)


CLASSES = sorted(
    {error for error in below(RunnerError) if not error.__module__.startswith("test")},
    key=lambda error: error.__name__,
)


def test_the_drawing_has_every_error_and_no_other() -> None:
    expected = {
        error.__name__: (error.__bases__[0].__name__, int(error.status), error.code)
        for error in CLASSES
    }
    assert drawn() == expected


def test_all_is_sorted_and_complete() -> None:
    names = [error.__name__ for error in CLASSES]
    assert errors.__all__ == sorted({*names, "RunnerError", "ExitStatus"})
    assert all(hasattr(errors, name) for name in errors.__all__)


def test_every_code_is_its_own() -> None:
    codes = [error.code for error in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_has_advice_and_a_place_in_the_tree(error: type[RunnerError]) -> None:
    assert error("what happened").advice
    assert error("what happened", advice="do this").advice == "do this"
    assert error("what happened").message == "what happened"
    assert issubclass(error, RunnerError)


def test_a_broken_rule_stands_in_the_message() -> None:
    error = errors.VerificationFailed("too long", rule="blob-size")
    assert (error.message, error.rule) == ("too long [blob-size]", "blob-size")

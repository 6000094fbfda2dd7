import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.patterns import matches, matches_any

names = st.text(alphabet="ab/.-\n", max_size=12)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("a.b/c", "a.b/c", True),
        ("a.b/c", "axb/c", False),
        ("a.b/*", "a.b/c", True),
        ("a.b/*", "a.b/", True),
        ("a.b/*", "a.b/c/d", False),
        ("a.b/**", "a.b/c/d", True),
        ("*/c", "a.b/c", True),
        ("*", "a/b", False),
        ("**", "", True),
        ("", "", True),
        ("", "a", False),
        ("***", "a/b", True),
        ("**a*b", "a/ab", True),
        ("a*b*c", "abbc", True),
        ("a*b*c", "ab/c", False),
        ("*.b/c", "evil/a.b/c", False),
        ("a[bc]", "ab", False),
        ("a?", "ab", False),
        ("a.*", "abc", False),
        ("a|b", "a", False),
        ("a**", "a\nb", True),
    ],
)
def test_only_stars_stand_for_something_else(pattern: str, text: str, expected: bool) -> None:
    assert matches(pattern, text) is expected


@given(names, names.filter(bool))
def test_a_pattern_without_a_star_matches_nothing_but_itself(text: str, extra: str) -> None:
    assert matches(text, text)
    assert not matches(text, text + extra)
    assert not matches(text, extra + text)


@given(names, names, names)
def test_a_star_covers_what_stands_in_its_place(before: str, middle: str, after: str) -> None:
    assert matches(f"{before}**{after}", before + middle + after)
    assert matches(f"{before}*{after}", before + middle + after) or "/" in middle


@given(names.map(lambda name: name.replace("/", "")), names)
def test_one_star_alone_never_crosses_a_slash(name: str, rest: str) -> None:
    assert matches("*", name)
    assert not matches("*", f"{name}/{rest}")


def test_any_one_of_several_is_enough() -> None:
    assert matches_any(["a", "b*"], "bc")
    assert not matches_any([], "a")


def test_a_hostile_name_does_not_hold_us() -> None:
    started = time.monotonic()
    assert not matches("*a" * 500, "a" * 255 + "b")
    assert not matches("**a" * 300, "a/" * 120 + "b")
    assert time.monotonic() - started < 5

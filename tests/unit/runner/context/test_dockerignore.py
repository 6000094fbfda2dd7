import contextlib
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.context.dockerignore import FILE_BYTES, PATTERNS, IgnoreRules
from runner.errors import ContextInvalid


def rules(text: str) -> IgnoreRules:
    return IgnoreRules.parse(text.encode("utf-8", "surrogateescape"), ".dockerignore")


@pytest.mark.parametrize(
    ("patterns", "path", "excluded"),
    [
        ("", "a", False),
        ("a", "a", True),
        ("a", "b/a", False),
        ("a", "a/b/c", True),
        ("/a/", "a", True),
        ("./a//b/../c/", "a/c/d", True),
        ("../a", "a", False),
        ("/", "a", False),
        (".", "a", False),
        ("# a\n\n  \n", "# a", False),
        (" #a", "#a", True),
        ("\\#a", "#a", True),
        ("\ufeffa\r\nb\r\n", "a", True),
        ("\ufeffa\r\nb\r\n", "b", True),
        ("\u00a0a\u3000", "a", True),
        ("*", "a/b", True),
        ("*.log", "x.log", True),
        ("*.log", "a/x.log", False),
        ("*.log", ".log", True),
        ("*/*.log", "a/x.log", True),
        ("*/*.log", "a/b/x.log", False),
        ("a*b*c", "a1b2b3c", True),
        ("a*b*c", "a1b2", False),
        ("a*bc*c", "abcc", True),
        ("a?c", "abc", True),
        ("a?c", "a\u00e9c", True),
        ("a?c", "a\udcffc", True),
        ("a?c", "a/c", False),
        ("**", "a/b", True),
        ("***", "a/b", True),
        ("**/b", "b", True),
        ("**/b", "a/x/b", True),
        ("**/b", "ab", False),
        ("**b", "a/xb", True),
        ("**b/c", "a/xb/c", True),
        ("**b*", "xb1", False),
        ("**/*.md", "a/b/c.md", True),
        ("a/**", "a", False),
        ("a/**", "a/b/c", True),
        ("a**", "abc/d", True),
        ("a/**/d", "a/d", True),
        ("a/**/d", "a/b/c/d", True),
        ("a/**/d", "xa/d", False),
        ("a/**/b/**/d", "a/b/x/b/d", True),
        ("a/**/b/**/d", "a/d/b", False),
        ("**/**/b", "x/y/b", True),
        ("a**b", "ab", True),
        ("a**b", "a1/2/b", True),
        ("a**b", "axb", False),
        ("a**/b", "ab", True),
        ("a/**b", "a/x/b", True),
        ("[a-c]x", "bx", True),
        ("[a-c]x", "dx", False),
        ("[^a-c]x", "dx", True),
        ("x[^a]y", "x/y", False),
        ("[c-a]x", "bx", False),
        ("[^c-a]x", "bx", True),
        ("[\\]]x", "]x", True),
        ("[*?]x", "*x", True),
        ("[*?]x", "ax", False),
        ("a]b", "a]b", True),
        ("\\*", "*", True),
        ("\\*", "a", False),
        ("\\d", "d", True),
        ("a.b+(c)|$", "a.b+(c)|$", True),
        ("a.b", "axb", False),
        ("*.log\n!keep.log", "keep.log", False),
        ("!keep.log\n*.log", "keep.log", True),
        ("*\n! src ", "src/a", False),
        ("*\n!src\nsrc/*.o", "src/a.o", True),
        ("dir\n!dir/file", "dir/file", False),
        ("dir\n!dir/file", "dir/other", True),
        ("dir\n!**/file", "dir/a/file", False),
        ("a\nb\n!b\nb/c", "b/c/d", True),
    ],
)
def test_the_last_match_of_a_path_or_its_parents_decides(
    patterns: str, path: str, *, excluded: bool
) -> None:
    assert rules(patterns).excluded(path) is excluded


@pytest.mark.parametrize(
    ("patterns", "directory", "may"),
    [
        ("*", "a", False),
        ("*\n!b", "a", False),
        ("*\n!a", "a", False),
        ("*\n!a/b", "a", True),
        ("*\n!a/b", "a/b", False),
        ("*\n!a/*/c", "a/x", True),
        ("*\n!**/c", "x/y", True),
        ("*\n!a/**/c", "b", False),
        ("*\n!a/**/c", "a/b/c/d", True),
        ("*\n!a**c", "ax", True),
    ],
)
def test_an_excluded_directory_is_looked_into_only_where_an_exception_could_match(
    patterns: str, directory: str, *, may: bool
) -> None:
    assert rules(patterns).may_include_below(directory) is may


@pytest.mark.parametrize(
    "pattern",
    [
        *("[", "[a", "[]", "[]a]", "[^]", "[a-]", "[-a]", "a\\", "[\\", "!", "! ", "!/"),
        *("x" * 1025, "a**b**c**d**e**f"),
    ],
)
def test_a_bad_pattern_is_named_by_its_line(pattern: str) -> None:
    with pytest.raises(ContextInvalid, match=re.escape(".dockerignore, line 3: ")):
        rules(f"# comment\ngood\n{pattern}\n")


def test_a_message_does_not_carry_control_characters() -> None:
    with pytest.raises(ContextInvalid) as caught:
        rules("[\x1b0;owned\x07")
    assert caught.value.message.isprintable()


def test_the_file_and_the_number_of_patterns_are_bounded() -> None:
    with pytest.raises(ContextInvalid, match="larger than"):
        rules("#" * (FILE_BYTES + 1))
    rules("a\n" * PATTERNS)
    with pytest.raises(ContextInvalid, match="more than 10000 patterns"):
        rules("a\n" * (PATTERNS + 1))


def test_matching_that_is_worth_too_much_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.context.dockerignore._EVALUATIONS", 100)
    walk = rules("a*b\n" * 50)
    walk.decide("x")
    with pytest.raises(ContextInvalid, match="too many patterns"):
        walk.decide("x")


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("a*" * 500 + "b", "a" * 4000),
        ("*a" * 500 + "b", "a" * 4000),
        ("**/a/" * 200 + "b", "a/" * 2000 + "c"),
        ("**/*a*/" * 140 + "b", "a/" * 2000 + "c"),
        ("**/" + "*/" * 500 + "b", "a/" * 2000 + "c"),
        ("?*" * 500 + "b", "a" * 4000),
    ],
)
def test_hostile_patterns_do_not_backtrack_without_end(pattern: str, path: str) -> None:
    compiled = rules(pattern)
    start = time.process_time()
    assert compiled.decide(path) == -1
    assert time.process_time() - start < 2


def glob(pattern: str, path: str) -> bool:
    """The same language, in the plainest way: by cases on the first character."""
    if not pattern:
        return not path
    if pattern.startswith("**/"):
        below = [path[i + 1 :] for i, c in enumerate(path) if c == "/"]
        return any(glob(pattern[3:], rest) for rest in [path, *below])
    if pattern[0] == "*":
        end = (path + "/").index("/")
        return any(glob(pattern[1:], path[i:]) for i in range(end + 1))
    return path[:1] == pattern[0] and glob(pattern[1:], path[1:])


paths = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=4).map("/".join)
segments = st.one_of(st.just("**"), st.from_regex(r"(?:[ab]|\*(?!\*)){1,4}", fullmatch=True))
globs = st.lists(segments, min_size=0, max_size=4).map(lambda s: "/".join([*s, "a*"]))


@given(globs, paths)
def test_atomic_matching_finds_what_plain_matching_finds(pattern: str, path: str) -> None:
    parents = [path[:i] for i, c in enumerate(path) if c == "/"]
    expected = any(glob(pattern, p) for p in [*parents, path])
    assert rules(pattern).excluded(path) is expected


@given(st.binary(max_size=60), st.text(max_size=10))
def test_any_bytes_are_rules_or_a_clear_error(data: bytes, path: str) -> None:
    with contextlib.suppress(ContextInvalid):
        assert IgnoreRules.parse(data, ".dockerignore").excluded(path) in {True, False}

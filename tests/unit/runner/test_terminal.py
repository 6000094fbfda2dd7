"""Threat 16: what a build writes must not move a terminal's cursor or change its state."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runner.terminal import LINE_CHARACTERS, Lines, clean


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 日本\ttab", "plain é 日本\ttab"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[1;1H\x1b[?25lx", "x"),
        ("\x1b]52;c;ZXZpbA==\x07after", "after"),
        ("\x1b]52;c;ZXZpbA==\x1b\\after", "after"),
        ("\x1b]8;;http://evil\x1b\\good\x1b]8;;\x1b\\", "good"),
        ("\x1b]0;title", ""),
        ("\x1bP+q544e\x1b\\x", "x"),
        ("\x1b_apc\x9cx", "x"),
        ("\x1b(0x", "x"),
        ("\x1bcx", "x"),
        ("\x1b", ""),
        ("\x1b\x1b[31mx", "x"),
        ("\x9b31mx", "\\x9b31mx"),
        ("a\bb\x07\x7f\0", "a\\x08b\\x07\\x7f\\x00"),
        ("a\r\nb\x0b\x0c\x85", "a\\r\\nb\\x0b\\x0c\\x85"),
        ("user\u202etxt.exe", "user\\u202etxt.exe"),
        ("\u2066\u2069\u200f\u061c\u200b\ufeff", "\\u2066\\u2069\\u200f\\u061c\\u200b\\ufeff"),
        ("\u2028\u2029\ue000\ud800\U000e0041", "\\u2028\\u2029\\ue000\\ud800\\U000e0041"),
    ],
)
def test_what_a_terminal_would_act_on_is_taken_out(text: str, expected: str) -> None:
    assert clean(text) == expected


pieces = st.sampled_from(["\x1b", "[", "]52;", "\x07", "\x9b", "\x9d", "\x1b\\", "31m", "\r", "(0"])


@given(st.text(max_size=40) | st.lists(pieces | st.characters(), max_size=20).map("".join))
@example("\x1b]\x1b[")
def test_no_control_or_format_character_is_left(text: str) -> None:
    for character in clean(text):
        assert character == "\t" or unicodedata.category(character) not in {"Cc", "Cf", "Cs"}


def lines_of(*chunks: bytes) -> list[str]:
    found: list[str] = []
    lines = Lines(found.append)
    for chunk in chunks:
        lines.feed(chunk)
    lines.finish()
    return found


bits = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"", "é€𝄞".encode(), b"\xe2\x82", b"\xff", b"\x1b[31m", b"a",
     b"x" * LINE_CHARACTERS, "é".encode() * (LINE_CHARACTERS + 1)]
)  # fmt: skip


@given(st.lists(bits, max_size=8).map(b"".join), st.lists(st.integers(0, 1 << 16), max_size=12))
def test_any_chunking_gives_the_same_lines(stream: bytes, places: list[int]) -> None:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    chunks = [stream[edges[i] : edges[i + 1]] for i in range(len(edges) - 1)]
    assert lines_of(*chunks) == lines_of(stream)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([b"a\r", b"\nb"], ["a", "b"]),
        ([b"a\r", b"", b"\n", b"\n"], ["a", ""]),
        ([b"10%\r20%\r", b"done\n"], ["10%", "20%", "done"]),
        (["é".encode()[:1], "é".encode()[1:] + b"\n"], ["é"]),
        ([b"\xc3"], ["\ufffd"]),
        ([b"\n\n"], ["", ""]),
        ([b"a" * LINE_CHARACTERS + b"b"], ["a" * LINE_CHARACTERS, "b"]),
        ([], []),
    ],
)
def test_lines_end_where_they_end(chunks: list[bytes], expected: list[str]) -> None:
    assert lines_of(*chunks) == expected


def test_a_line_is_shown_as_soon_as_it_ended() -> None:
    found: list[str] = []
    Lines(found.append).feed(b"10%\r")
    assert found == ["10%"]

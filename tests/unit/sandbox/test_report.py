"""Two lines from inside: claims, parsed strictly. A build can print such lines too."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.report import (
    EXIT_BYTES,
    ExitReport,
    OutputSplitter,
    ReportInvalid,
    parse_exit,
    text,
    words,
)

CLAIM = b"sha256:x\n".hex().encode()
LINE = b"runner-exit 1 nonce=n command=1 status=3 claim=" + CLAIM


def split(pieces: list[bytes]) -> tuple[bytes, bytes | None]:
    splitter = OutputSplitter()
    output = b"".join(map(splitter.feed, pieces))
    rest, line = splitter.finish()
    return output + rest, line


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


bits = st.sampled_from(
    [b"\n", b"x", b"\nrunner-", b"\nrunner-exit 1 nonce=", b"\n" + LINE, LINE, b"y" * EXIT_BYTES]
)
streams = st.lists(bits, max_size=8).map(b"".join)


@given(streams, st.lists(st.integers(0, 1 << 16), max_size=12))
def test_any_chunking_gives_the_same_output(stream: bytes, places: list[int]) -> None:
    whole, line = split([stream])
    # Cut right behind the line's end that precedes the report, that end was given already.
    early = {whole} if line is None else {whole, whole + b"\n"}
    output, found = split(cut(stream, places))
    assert (output in early, found) == (True, line)


@given(streams)
def test_nothing_of_the_output_is_lost(stream: bytes) -> None:
    output, line = split([stream])
    assert output + (b"" if line is None else b"\n" + line + b"\n") == stream


@given(st.lists(st.integers(0, 1 << 10), max_size=12))
def test_only_the_line_at_the_very_end_counts(places: list[int]) -> None:
    forged = b"a\n" + LINE.replace(b"status=3", b"status=0") + b"\nmore"
    assert split(cut(forged, places)) == (forged, None)
    output, line = split(cut(forged + b"\n" + LINE + b"\n", places))
    assert (output.removesuffix(b"\n"), line) == (forged, LINE)


@pytest.mark.parametrize(
    "stream",
    [
        LINE + b"\n",
        b"\n" + LINE,
        b"\n" + LINE + b"\n\n",
        b"\n" + LINE + b"x" * EXIT_BYTES + b"\n",
        b"",
        b"\nrunner-exit 1 nonce",
    ],
)
def test_what_is_no_report_is_output(stream: bytes) -> None:
    assert split([stream]) == (stream, None)


def test_a_whole_line_is_given_at_once() -> None:
    """It may be the last one for ten minutes."""
    splitter = OutputSplitter()
    assert splitter.feed(b"abc") == b"abc"
    assert splitter.feed(b"abc\n") == b"abc\n"
    assert splitter.feed(b"def") == b"def"
    assert splitter.feed(b"\nrunner-ex") == b""
    assert splitter.feed(b"ample\n") == b"\nrunner-example\n"
    assert splitter.feed(b"\n" + LINE + b"\n") == b""
    assert splitter.finish() == (b"", LINE)


def test_a_sound_report_is_read() -> None:
    assert parse_exit(LINE, "n") == ExitReport(1, 3, "sha256:x")
    assert parse_exit(LINE.replace(CLAIM, b""), "n").claim is None
    assert parse_exit(LINE.replace(CLAIM, b"61" * 900), "n").claim == "a" * 256


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"nonce=n", b"nonce=m"),
        (b"nonce=n ", b""),
        (b"status=3", b"status=256"),
        (b"status=3", b"status=-1"),
        (b"status=3", b"status="),
        (b"status=3", b"status=" + b"9" * 5000),
        (b"status=3 ", b""),
        (b"command=1", b"command=65"),
        (b"command=1", b"command=x"),
        (b"command=1", b"command=1 command=1"),
        (b"claim=", b"claim=0"),
        (b"claim=" + CLAIM, b""),
        (b"claim=" + CLAIM, b"claim=zz"),
        (b"claim=", b"claim =" ),
        (b" 1 ", b" 2 "),
        (b"runner-exit", b"runner-canary"),
        (b" nonce", b"  nonce"),
        (LINE, b"runner-exit"),
        (LINE, b""),
        (b"status=3", b"Status=3"),
    ],
)  # fmt: skip
def test_a_report_with_one_thing_changed_is_none(old: bytes, new: bytes) -> None:
    with pytest.raises(ReportInvalid):
        parse_exit(LINE.replace(old, new, 1), "n")


def test_words_and_text_are_bounded_to_what_init_writes() -> None:
    assert words(b"kind 1 a=b c=", b"kind") == {"a": b"b", "c": b""}
    assert text({"a": b"ff41"}, "a") == "\\xffA"

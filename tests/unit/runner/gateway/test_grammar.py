"""What requests may say, without a socket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.gateway import grammar
from runner.gateway.grammar import Refusal
from runner.gateway.http import Request
from runner.registry.image import OCI_INDEX, OCI_MANIFEST


def status(refused: pytest.ExceptionInfo[Refusal]) -> int:
    return refused.value.status


# -- parts of a blob -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (None, None),
        ("bytes=0-", range(100)),
        ("bytes=0-0", range(1)),
        ("bytes=10-19", range(10, 20)),
        ("bytes=10-", range(10, 100)),
        ("bytes=-10", range(90, 100)),
        ("bytes=-1000", range(100)),
        ("bytes=99-1000", range(99, 100)),
        ("lines=1-2", None),
        ("Bytes=1-2", None),
        ("", None),
    ],
)
def test_a_range_is_read(header: str | None, part: range | None) -> None:
    assert grammar.read_part(header, 100) == part


@pytest.mark.parametrize(
    "header",
    ["bytes=", "bytes=-", "bytes=-0", "bytes=5-4", "bytes=100-", "bytes=100-200", "bytes=0-1,3-4",
     "bytes=0-1, 3-4", "bytes= 0-1", "bytes=a-b", "bytes=0x0-1", "bytes=1-2-3", "bytes=+0-1",
     "bytes=0-" + "9" * 19, "bytes=" + "9" * 100 + "-", "bytes=\u0661-\u0662"],
)  # fmt: skip
def test_a_range_that_cannot_be_had_is_refused(header: str) -> None:
    with pytest.raises(Refusal) as refused:
        grammar.read_part(header, 100)
    assert status(refused) == 416
    assert refused.value.headers["Content-Range"] == "bytes */100"


@given(st.from_regex(r"bytes=[0-9]{0,20}-[0-9]{0,20}", fullmatch=True), st.integers(0, 10**19))
def test_a_part_is_never_empty_and_never_beyond_the_blob(header: str, size: int) -> None:
    try:
        part = grammar.read_part(header, size)
    except Refusal:
        return
    assert part is not None
    assert 0 <= part.start < part.stop <= size


def test_no_part_of_an_empty_blob_can_be_had() -> None:
    for header in ("bytes=0-", "bytes=0-0", "bytes=-1"):
        with pytest.raises(Refusal):
            grammar.read_part(header, 0)


# -- chunks --------------------------------------------------------------------------------------


def test_a_chunk_says_how_long_it_is() -> None:
    assert grammar.read_chunk({}, 7) is None
    assert grammar.read_chunk({"content-range": "7-9"}, 7) == 3
    assert grammar.read_chunk({"content-range": "0-0", "content-length": "1"}, 0) == 1


@pytest.mark.parametrize("length", ["2", "4", "0"])
def test_a_chunk_of_two_lengths_is_refused(length: str) -> None:
    with pytest.raises(Refusal) as refused:
        grammar.read_chunk({"content-range": "7-9", "content-length": length}, 7)
    assert status(refused) == 400


@given(st.text(alphabet="0123456789-", max_size=9) | st.text(max_size=9), st.integers(0, 100))
def test_no_chunk_is_taken_for_another_place(header: str, size: int) -> None:
    try:
        length = grammar.read_chunk({"content-range": header}, size)
    except Refusal:
        return
    first, _, last = header.partition("-")
    assert int(first) == size
    assert length == int(last) - size + 1 > 0


# -- queries, listings, kinds --------------------------------------------------------------------


def test_a_parameter_given_twice_is_refused() -> None:
    assert grammar.read_query("a=1&b=%3A&c=") == {"a": "1", "b": ":", "c": ""}
    for text in ("digest=a&digest=b", "a&" * 40, "mount=1&mount=1"):
        with pytest.raises(Refusal) as refused:
            grammar.read_query(text)
        assert status(refused) == 400


def test_several_tags_are_read_and_bad_ones_refused() -> None:
    assert grammar.read_tags(grammar.read_query("tag=1.2&tag=latest")) == ["1.2", "latest"]
    assert grammar.read_tags({}) == []
    for bad in ("-x", "a" * 129, "a/b", "ä"):
        with pytest.raises(Refusal):
            grammar.read_tags({"tag": f"good {bad}"})


@pytest.mark.parametrize(
    ("query", "page", "more"),
    [
        ({}, "abcd", False),
        ({"n": "2"}, "ab", True),
        ({"n": "2", "last": "b"}, "cd", False),
        ({"n": "4"}, "abcd", False),
        ({"n": "0"}, "", False),
        ({"last": "bb"}, "cd", False),
        ({"last": "z"}, "", False),
    ],
)
def test_tags_come_in_pages(query: dict[str, str], page: str, more: bool) -> None:
    assert grammar.read_page("abcd", query) == (list(page), more)


@pytest.mark.parametrize("number", ["-1", "x", "", "1" * 10, "1.0", "\u0661"])
def test_a_page_of_no_number_is_refused(number: str) -> None:
    with pytest.raises(Refusal) as refused:
        grammar.read_page("abcd", {"n": number})
    assert status(refused) == 400


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (None, True),
        ("", True),
        ("*/*", True),
        ("application/json", True),
        (OCI_MANIFEST, True),
        (f"{OCI_INDEX}, {OCI_MANIFEST};q=0.5", True),
        (f"{OCI_INDEX}, application/*", True),
        (OCI_INDEX, False),
    ],
)
def test_who_names_kinds_of_manifests_gets_one_of_those(header: str, accepted: bool) -> None:
    assert grammar.accepts(header, OCI_MANIFEST) is accepted


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "identity, gzip"}, 415),
        ({"expect": "200-ok"}, 417),
        ({"content-encoding": "identity", "expect": "100-Continue"}, None),
    ],
)
def test_a_body_is_taken_as_it_is(headers: dict[str, str], expected: int | None) -> None:
    request = Request("PUT", "/v2/", headers, iter(()))
    if expected is None:
        grammar.check_head(request)
        return
    with pytest.raises(Refusal) as refused:
        grammar.check_head(request)
    assert status(refused) == expected

"""The server name of a ClientHello, from real clients and from hostile ones."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.gateway.clienthello import MOST_BYTES, ClientHello, NotAHello, read
from tests.support.egress import HOST, hello

HELLO = hello(HOST)


def vector(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size, "big") + data


def name(text: bytes, kind: bytes = b"\0") -> bytes:
    return kind + vector(2, text)


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vector(2, data)


def message(*extensions: bytes, tail: bytes = b"") -> bytes:
    """A ClientHello out of its parts, as a handshake message."""
    body = b"\3\3" + bytes(32) + vector(1, b"") + vector(2, b"\x13\1") + vector(1, b"\0")
    return b"\1" + vector(3, body + vector(2, b"".join(extensions)) + tail)


def records(data: bytes, *sizes: int) -> bytes:
    """``data`` in records of these sizes, the rest in the last one."""
    made = b""
    for size in (*sizes, len(data)):
        if data:
            made += b"\x16\3\1" + vector(2, data[:size])
        data = data[size:]
    return made


def sni(*names: bytes) -> bytes:
    return extension(0, vector(2, b"".join(names)))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (HELLO, HOST),
        (hello(HOST.upper()), HOST),
        (hello(HOST, maximum_version=ssl.TLSVersion.TLSv1_2), HOST),
        (hello(None), None),
        (hello("127.0.0.1"), None),
        (records(message()), None),
        (records(message(extension(16, b"\0\3\2h2"), sni(name(b"A.b")))), "a.b"),
    ],
)
def test_the_name_is_read_in_lower_case(data: bytes, found: str | None) -> None:
    assert read(data) == ClientHello(found)


def test_what_follows_the_hello_is_not_looked_at() -> None:
    assert read(HELLO + b"anything") == ClientHello(HOST)


@given(st.integers(0, len(HELLO) - 1))
def test_a_part_of_a_hello_is_waited_for(size: int) -> None:
    assert read(HELLO[:size]) is None


@given(st.lists(st.integers(1, 300), max_size=30))
def test_a_hello_may_come_in_several_records(sizes: list[int]) -> None:
    assert read(records(HELLO[5:], *sizes)) == ClientHello(HOST)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1\r\n", "not TLS"),
        (b"SSH-2.0-x\r\n", "not TLS"),
        (b"\x80\x2e\1\0\2", "not TLS"),
        (b"\x17\3\3\0\1\0", "not TLS"),
        (b"\x16\2\0", "not TLS"),
        (b"\x16\3\1\0\0", "no usable length"),
        (b"\x16\3\1\x40\1", "no usable length"),
        (records(b"\2" + vector(3, b"x")), "no ClientHello"),
        (records(HELLO[5:], *[1] * 40), "too many records"),
        (records(b"\1" + MOST_BYTES.to_bytes(3, "big")), "too long"),
        (records(message() + message()), "shares the record"),
        (records(message() + b"\2\0\0\0", len(message()) - 1), "shares the record"),
        (records(message(sni(name(b"a.b"), name(b"c.d")))), "exactly one"),
        (records(message(sni(name(b"a.b", kind=b"\1")))), "exactly one"),
        (records(message(extension(0, vector(2, name(b"a.b")) + b"x"))), "exactly one"),
        (records(message(sni(name(b"a.b")), sni(name(b"c.d")))), "stands twice"),
        (records(message(sni(name(b"\xff.b")))), "not ASCII"),
        (records(message(extension(0, b""))), "cut short"),
        (records(message(extension(0, vector(2, b"\0\0\x09a.b")))), "cut short"),
        (records(message(b"\0\0\0")), "cut short"),
        (records(message(tail=b"x")), "follows the extensions"),
        (records(b"\1" + vector(3, b"\3\3")), "cut short"),
    ],
)
def test_what_two_readers_could_read_differently_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(NotAHello, match=why):
        read(data)


@given(st.binary(max_size=300), st.integers(0, len(HELLO)), st.integers(0, 20))
def test_hostile_bytes_are_read_refused_or_waited_for(junk: bytes, at: int, cut: int) -> None:
    for data in (junk, HELLO[:at] + junk + HELLO[at + cut :]):
        try:
            found = read(data)
        except NotAHello:
            continue
        assert found is None or isinstance(found, ClientHello)

"""The server name in the first bytes of a TLS connection.

Read from the ClientHello (RFC 8446 4.1.2, RFC 6066 3), which every version from TLS 1.0 on sends
in clear. With Encrypted ClientHello this is the outer name: that of the provider who decrypts the
inner one. A policy that allows the provider's name allows what hides behind it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

MOST_BYTES = 32 << 10
"""Of what has to be read; with post-quantum keys and a session ticket some 6 KiB are usual."""
_MOST_RECORDS = 32
_RECORD_BYTES = 1 << 14
_RECORD_HEAD_BYTES = 5
_MESSAGE_HEAD_BYTES = 4
_HANDSHAKE, _MAJOR_VERSION, _CLIENT_HELLO = b"\x16", b"\x03", b"\x01"
_SERVER_NAME, _HOST_NAME = 0, 0


class NotAHello(Exception):
    """These are not the first bytes of a TLS client; says why, in words of ours."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """``server_name`` in lower case; None where the client names none."""

    server_name: str | None


def read(received: bytes) -> ClientHello | None:
    """The ClientHello at the beginning of ``received``; None where more bytes are needed.

    Raises:
        NotAHello: Whatever follows, this becomes none.
    """
    message = _message(received)
    if message is None and len(received) > MOST_BYTES:
        raise NotAHello("the ClientHello is too long")
    return None if message is None else ClientHello(_server_name(_Reader(message)))


def _message(received: bytes) -> bytes | None:
    """The handshake message's body out of its records."""
    message = b""
    for fragment, length in _fragments(received):
        announced = len(message) + length
        message += fragment
        if not _CLIENT_HELLO.startswith(message[:1]):
            raise NotAHello("the first message is no ClientHello")
        if len(message) < _MESSAGE_HEAD_BYTES:
            continue
        size = _MESSAGE_HEAD_BYTES + int.from_bytes(message[1:_MESSAGE_HEAD_BYTES], "big")
        if size > MOST_BYTES:
            raise NotAHello("the ClientHello is too long")
        if announced > size:
            raise NotAHello("something else shares the record of the ClientHello")
        if len(message) == size:
            return message[_MESSAGE_HEAD_BYTES:]
    return None


def _fragments(received: bytes) -> Iterator[tuple[bytes, int]]:
    """What each record has so far, and how long it will be."""
    position = 0
    for _ in range(_MOST_RECORDS):
        head = received[position : position + _RECORD_HEAD_BYTES]
        if not (_HANDSHAKE.startswith(head[:1]) and _MAJOR_VERSION.startswith(head[1:2])):
            raise NotAHello("the first bytes are not TLS")
        if len(head) < _RECORD_HEAD_BYTES:
            return
        length = int.from_bytes(head[3:], "big")
        if not 0 < length <= _RECORD_BYTES:
            raise NotAHello("a record has no usable length")
        position += _RECORD_HEAD_BYTES
        yield received[position : position + length], length
        position += length
        if position > len(received):
            return
    raise NotAHello("the ClientHello comes in too many records")


class _Reader:
    """Takes a structure apart from its front. Every method raises NotAHello where it ends early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def at_end(self) -> bool:
        return self._position == len(self._data)

    def take(self, size: int) -> bytes:
        taken = self._data[self._position : self._position + size]
        self._position += size
        if len(taken) < size:
            raise NotAHello("the ClientHello is cut short")
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size_of_length: int) -> "_Reader":
        return _Reader(self.take(self.number(size_of_length)))

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._position)


def _server_name(hello: _Reader) -> str | None:
    hello.take(2 + 32)  # version and random
    hello.vector(1)  # session
    hello.vector(2)  # cipher suites
    hello.vector(1)  # compression methods
    if hello.at_end():
        return None
    extensions = _extensions(hello.vector(2))
    if not hello.at_end():
        raise NotAHello("something follows the extensions")
    names = extensions.get(_SERVER_NAME)
    return None if names is None else _only_name(names)


def _extensions(block: _Reader) -> dict[int, _Reader]:
    found: dict[int, _Reader] = {}
    while not block.at_end():
        kind = block.number(2)
        if kind in found:
            raise NotAHello("an extension stands twice")
        found[kind] = block.vector(2)
    return found


def _only_name(extension: _Reader) -> str:
    """Of several names, a server could take another than we."""
    names = extension.vector(2)
    kind, name = names.number(1), names.vector(2).rest()
    if kind != _HOST_NAME or not names.at_end() or not extension.at_end():
        raise NotAHello("there is not exactly one server name")
    if not name.isascii():
        raise NotAHello("the server name is not ASCII")
    return name.decode("ascii").lower()

"""Bytes that come in pieces, as a stream."""

import io
from collections.abc import Iterator
from typing import BinaryIO, cast


def stream_of(pieces: Iterator[bytes]) -> BinaryIO:
    """A stream that reads ``pieces`` as it goes, to their end, and raises what they raise."""
    return cast("BinaryIO", io.BufferedReader(_Pieces(pieces)))


class _Pieces(io.RawIOBase):
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override] # narrower
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)

"""Layers decompressed as a stream, push-style, in pieces of bounded size.

A stream may consist of several gzip members or zstd frames (eStargz and zstd:chunked layers do);
it has to end where the last of them ends, and every byte has to belong to one.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import zstandard

from runner.errors import VerificationFailed

MEMBERS = 1 << 20
"""Of gzip members or zstd frames in one layer. eStargz writes one for each file; each costs an
object and a copy of what follows, so that a layer of empty ones would take hours."""
WINDOW_BYTES = 128 << 20
"""Of memory for zstd: what ``zstd --ultra`` needs, and the most that it gives by itself."""
_GZIP_PIECE = 16 << 10
_ZSTD_PIECE = 1 << 10
"""Input handed over at once. Deflate makes at most 1,032 bytes of one, a zstd block 128 KiB of
four; so one piece never makes more than some 32 MiB."""
_BATCH_BYTES = 1 << 20


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: memoryview, /) -> bytes: ...


def _gzip() -> _Decompressor:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _zstd() -> _Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj()


class Inflater:
    """Turns compressed bytes into plain ones, in batches.

    Every method raises VerificationFailed: rules ``layer-stream`` (corrupt, cut short, or followed
    by something else) and ``layer-members``. How much comes out is for the caller to bound: at
    most some 33 MiB come at once.
    """

    def __init__(self, compression: str) -> None:
        self._make: Callable[[], _Decompressor] = {"gzip": _gzip, "zstd": _zstd}[compression]
        self._piece = {"gzip": _GZIP_PIECE, "zstd": _ZSTD_PIECE}[compression]
        self._compression = compression
        self._decompressor = self._make()
        self._members = 1

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The plain bytes that ``data`` continues to, in batches of about a MiB."""
        view = memoryview(data)
        batch: list[bytes] = []
        waiting = 0
        for start in range(0, len(view), self._piece):
            for plain in self._inflated(view[start : start + self._piece]):
                batch.append(plain)
                waiting += len(plain)
            if waiting >= _BATCH_BYTES:
                yield b"".join(batch)
                batch, waiting = [], 0
        if waiting:
            yield b"".join(batch)

    def finish(self) -> None:
        """The stream ends here."""
        if not self._decompressor.eof:
            raise VerificationFailed(
                f"the {self._compression} stream is cut short", rule="layer-stream"
            )

    def _inflated(self, piece: memoryview) -> Iterator[bytes]:
        while piece:
            if self._decompressor.eof:
                self._members += 1
                if self._members > MEMBERS:
                    raise VerificationFailed(
                        f"more than {MEMBERS} members in one layer", rule="layer-members"
                    )
                self._decompressor = self._make()
            try:
                plain = self._decompressor.decompress(piece)
            except (zlib.error, zstandard.ZstdError) as error:
                raise VerificationFailed(
                    f"not a {self._compression} stream: {ascii(str(error))[:200]}",
                    rule="layer-stream",
                ) from None
            yield plain
            piece = memoryview(self._decompressor.unused_data)


def inflated(chunks: Iterator[bytes], compression: str) -> Iterator[bytes]:
    """The plain bytes of ``chunks``, all members of them; ``compression`` is empty for none.

    Raises:
        VerificationFailed: As ``Inflater`` does.
    """
    if not compression:
        yield from chunks
        return
    inflater = Inflater(compression)
    for chunk in chunks:
        yield from inflater.feed(chunk)
    inflater.finish()

"""A tar of an OCI layout, read where it lies.

The tar is hostile. Its headers are read as a stream, by the reader that layers go through; nothing
is extracted. A blob is a range of the file's bytes, and is hashed like any other.
"""

import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from runner.errors import ImageNotFound, LayoutInvalid, VerificationFailed
from runner.layers import BLOCK, Entry, HeaderReader
from runner.stores.blobs import CHUNK_BYTES

ENTRIES = 20_000
"""In one tar: an image for 64 platforms with 127 layers each has fewer."""
BYTES = 64 << 30
"""Of one tar: as much as one build may pull."""
_PATH_BYTES = 256
_FILE = re.compile(
    rb"(?:\./)?(oci-layout|index\.json|blobs/(?:sha256/[0-9a-f]{64}|sha512/[0-9a-f]{128}))"
)
_DIRECTORY = re.compile(rb"\.?/?|(?:\./)?blobs(?:/sha(?:256|512))?/?")
_FILES, _DIRECTORIES = frozenset({b"0", b"\0"}), frozenset({b"5"})
_NEEDED = ("oci-layout", "index.json")
_Range = tuple[int, int]
"""Where something begins, and its size."""


class LayoutArchive:
    """The files of a layout in a tar, such as ``skopeo copy ... oci-archive:FILE`` makes it."""

    def __init__(self, path: Path) -> None:
        """Reads the headers.

        Raises:
            ImageNotFound: There is no such file.
            LayoutInvalid: It is no tar, or holds something besides one layout.
        """
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self._missing(f"{path}: {error.strerror}") from None
        try:
            self._ranges = self._read()
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return str(self._path)

    def open(self, name: str) -> BinaryIO:
        if name not in self._ranges:
            raise self._missing(f"{self._path} has no {name}")
        return io.BufferedReader(_Part(os.dup(self._fd), *self._ranges[name]))

    def size(self, name: str) -> int | None:
        """Bytes of the file with this name, or None where the layout has none."""
        return self._ranges[name][1] if name in self._ranges else None

    def close(self) -> None:
        """What was opened stays readable. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> dict[str, _Range]:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise self._missing(f"{self._path} is no file")
        if status.st_size > BYTES:
            raise self._invalid(f"more than {BYTES} bytes")
        try:
            entries = list(_entries(self._fd))
        except VerificationFailed as error:
            raise self._invalid(error.message.removeprefix("the layer's tar: ")) from None
        ranges: dict[str, _Range] = {}
        for entry, start in entries:
            if entry.kind in _DIRECTORIES and _DIRECTORY.fullmatch(entry.name):
                continue
            match = _FILE.fullmatch(entry.name)
            if match is None or entry.kind not in _FILES:
                raise self._invalid(f"an entry {entry.name[:200]!a} of type {entry.kind!a}")
            name = match[1].decode()
            if name in ranges:
                raise self._invalid(f"two entries {name}")
            ranges[name] = start, entry.size
        for name in _NEEDED:
            if name not in ranges:
                raise self._invalid(f"no {name}")
        return ranges

    def _invalid(self, what: str) -> LayoutInvalid:
        return LayoutInvalid(f"{self._path} is no tar of an OCI layout: {what}")

    def _missing(self, message: str) -> ImageNotFound:
        advice = "Make one: skopeo copy docker://IMAGE oci-archive:FILE"
        return ImageNotFound(message, advice=advice)


def _entries(fd: int) -> Iterator[tuple[Entry, int]]:
    """Every entry, and where its bytes begin. Raises VerificationFailed, as HeaderReader does."""
    seen: list[Entry] = []
    reader = HeaderReader(most_entries=ENTRIES, path_bytes=_PATH_BYTES, seen=seen.append)
    position = 0
    step = BLOCK
    while piece := os.pread(fd, step, position):
        reader.feed(piece)
        position += len(piece)
        step = min(reader.skipping, CHUNK_BYTES) or BLOCK
        if seen:
            yield seen.pop(), position
    reader.finish()


class _Part(io.RawIOBase):
    """A range of a file, which several may read at the same time."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        """Closes ``fd`` in the end."""
        self._fd = fd
        self._position = start
        self._end = start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override] # narrower than a buffer
        with memoryview(buffer) as whole, whole[: self._end - self._position] as view:
            count = os.preadv(self._fd, [view], self._position)
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()

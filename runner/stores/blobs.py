"""Bytes by their digest, in a directory.

Blobs are hashed while they arrive, appear under their name only when whole, and are made by
us alone: names come from digests, never from a request.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from policies.reference import Digest
from runner.files import disk_full_is_a_limit

CHUNK_BYTES = 1 << 20


class BlobSource(Protocol):
    """Where bytes can be read by digest."""

    def size(self, digest: Digest) -> int | None:
        """Bytes of the blob, or None where it does not exist here."""

    def open(self, digest: Digest) -> BinaryIO:
        """The blob's bytes. Raises FileNotFoundError where it does not exist here."""


class BlobWriter:
    """One blob on its way in: hashed as it comes, invisible until committed."""

    def __init__(self, path: Path, blobs: Path, algorithm: str) -> None:
        self._path = path
        self._blobs = blobs
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm)
        with disk_full_is_a_limit(path):
            self._file = path.open("xb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # tells gc that somebody is writing it
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Raises DiskExceeded where the host's file system is full."""
        view = memoryview(data)
        self._hash.update(view)
        self.size += len(view)
        with disk_full_is_a_limit(self._path):
            while view:
                view = view[self._file.write(view) :]

    @property
    def digest(self) -> Digest:
        """Of the bytes that arrived so far."""
        return Digest(f"{self._algorithm}:{self._hash.hexdigest()}")

    def commit(self) -> Digest:
        """Makes the blob visible under its digest, durable."""
        digest = self.digest
        with disk_full_is_a_limit(self._path), self._file:
            os.fsync(self._file.fileno())
        target = self._blobs / digest.algorithm / digest.hex
        with disk_full_is_a_limit(target):
            target.parent.mkdir(exist_ok=True)
            self._path.chmod(0o444)
            self._path.rename(target)
        return digest

    def discard(self) -> None:
        """Forgets what arrived; harmless after a commit."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class BlobStore:
    """``DIRECTORY/blobs/ALGORITHM/HEX``, the layout of an OCI image layout."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs"
        self._arriving = directory / "arriving"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._arriving.mkdir(exist_ok=True)

    def path(self, digest: Digest) -> Path:
        return self._blobs / digest.algorithm / digest.hex

    def size(self, digest: Digest) -> int | None:
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def open(self, digest: Digest) -> BinaryIO:
        return self.path(digest).open("rb")

    def writer(self, algorithm: str = "sha256") -> BlobWriter:
        """A new blob; the caller commits or discards it."""
        return BlobWriter(self._arriving / secrets.token_hex(16), self._blobs, algorithm)

    @contextlib.contextmanager
    def arriving(self, algorithm: str = "sha256") -> Iterator[BlobWriter]:
        """A new blob that is discarded unless it was committed inside."""
        writer = self.writer(algorithm)
        try:
            yield writer
        finally:
            writer.discard()

    def collect(self) -> list[Path]:
        """Removes what killed writers left, and returns it."""
        removed = []
        for path in self._arriving.iterdir():
            with contextlib.suppress(BlockingIOError, FileNotFoundError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path)
        return removed

    def evict(self, most_bytes: int) -> list[Path]:
        """Removes the blobs read longest ago until no more than ``most_bytes`` are left."""
        blobs = [(path.stat(), path) for path in self._blobs.glob("*/*")]
        total = sum(status.st_size for status, _ in blobs)
        removed = []
        for status, path in sorted(blobs, key=lambda item: item[0].st_atime_ns):
            if total <= most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size
            removed.append(path)
        return removed

    def add(self, data: bytes) -> Digest:
        """Stores small ``data`` whole."""
        with self.arriving() as writer:
            writer.write(data)
            return writer.commit()


def read_all(source: BlobSource, digest: Digest, most_bytes: int) -> bytes:
    """The whole blob. Raises ValueError where it is longer than ``most_bytes``."""
    with source.open(digest) as stream:
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"{digest} is longer than {most_bytes} bytes")
    return data

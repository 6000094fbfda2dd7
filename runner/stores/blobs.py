"""Bytes by their digest, in a directory.

Blobs are hashed while they arrive, appear under their name only when whole, and are made by
us alone: names come from digests, never from a request.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from policies.reference import Digest
from runner.files import disk_full_is_a_limit
from sandbox.locks import Lock, abandoned, make_locked

CHUNK_BYTES = 1 << 20
ALGORITHMS = ("sha256", "sha512")
_AGAIN_SECONDS = 0.05


class BlobSource(Protocol):
    """Where bytes can be read by digest."""

    def size(self, digest: Digest) -> int | None:
        """Bytes of the blob, or None where it does not exist here."""

    def open(self, digest: Digest) -> BinaryIO:
        """The blob's bytes. Raises FileNotFoundError where it does not exist here."""


class BlobWriter:
    """One blob on its way in: hashed as it comes, invisible until committed."""

    def __init__(self, path: Path, blobs: Path, algorithm: str) -> None:
        self.path = self._path = path
        self._blobs = blobs
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm)
        with disk_full_is_a_limit(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
            os.fchmod(fd, 0o444)  # sandboxes of several users share it, whatever the umask is
        self._file = os.fdopen(fd, "wb", buffering=0)
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

    def hash_with(self, algorithm: str) -> None:
        """From now on ``digest`` is of this kind; what came before is read once more."""
        if algorithm == self._algorithm:
            return
        again = hashlib.new(algorithm)
        if self.size:
            with self._path.open("rb", buffering=0) as file:
                while piece := file.read(CHUNK_BYTES):
                    again.update(piece)
        self._algorithm, self._hash = algorithm, again

    def sync(self) -> None:
        """Waits until the bytes would survive a crash of the host, for blobs that shall."""
        with disk_full_is_a_limit(self._path):
            os.fsync(self._file.fileno())

    def commit(self) -> Digest:
        """Makes the blob visible under its digest."""
        digest = self.digest
        target = self._blobs / digest.algorithm / digest.hex
        with disk_full_is_a_limit(target):
            self._file.close()
            self._path.rename(target)
        return digest

    def discard(self) -> None:
        """Forgets what arrived; harmless after a commit."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class BlobStore:
    """``DIRECTORY/blobs/ALGORITHM/HEX``, the layout of an OCI image layout.

    Several processes may use one at the same time.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs"
        self._arriving = directory / "arriving"
        self._notes = directory / "notes"
        self._held = directory / "held"
        for algorithm in ALGORITHMS:
            (self._blobs / algorithm).mkdir(parents=True, exist_ok=True)
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

    def link(self, digest: Digest, source: "BlobStore") -> None:
        """Gives this store the blob of another one on the same file system."""
        with contextlib.suppress(FileExistsError), disk_full_is_a_limit(self.directory):
            self.path(digest).hardlink_to(source.path(digest))

    def remove(self, digest: Digest) -> None:
        """Harmless where it does not exist."""
        self.path(digest).unlink(missing_ok=True)

    # -- shared by several, and bounded ----------------------------------------------------

    def notes(self, digest: Digest) -> Path:
        """A directory, if somebody makes it, for what is known of the blob; evicted with it."""
        return self._notes / digest.hex

    def forget(self, digest: Digest) -> None:
        """Removes the blob with all that is known of it. Whoever holds it keeps it."""
        self.remove(digest)
        shutil.rmtree(self.notes(digest), ignore_errors=True)

    def hold(self) -> "Held":
        """Keeps chosen blobs from eviction."""
        self._held.mkdir(exist_ok=True)
        return Held(self, self._held / secrets.token_hex(16))

    def collect(self) -> list[Path]:
        """Removes what killed writers and holders left, and returns it."""
        removed = remove_unlocked(self._arriving)
        for path in abandoned(self._held):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
        return removed

    def unheld(self) -> list[Path]:
        """The blobs that nobody holds."""
        return [path for path in self._blobs.glob("*/*") if not _is_held(path)]

    def evict(self, most_bytes: int) -> list[Path]:
        """Removes the blobs used longest ago until no more than ``most_bytes`` are left.

        What somebody holds stays: it would free nothing. May be called while others use the
        store; only one at a time evicts.
        """
        try:
            lock = Lock(self.directory / "evicting")
        except BlockingIOError:
            return []
        try:
            for path in abandoned(self._held):
                shutil.rmtree(path, ignore_errors=True)
            return self._evict(most_bytes)
        finally:
            lock.release()

    def _evict(self, most_bytes: int) -> list[Path]:
        blobs = []
        for path in self._blobs.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                blobs.append((path.stat(), path))
        total = sum(status.st_size for status, _ in blobs)
        removed = []
        for status, path in sorted(blobs, key=lambda item: item[0].st_atime_ns):
            if total <= most_bytes:
                break
            if _is_held(path):  # by now, which may be long after the list was made
                continue
            path.unlink(missing_ok=True)
            shutil.rmtree(self._notes / path.name, ignore_errors=True)
            total -= status.st_size
            removed.append(path)
        return removed

    def add(self, data: bytes, algorithm: str = "sha256") -> Digest:
        """Stores small ``data`` whole."""
        with self.arriving(algorithm) as writer:
            writer.write(data)
            return writer.commit()


def remove_unlocked(directory: Path) -> list[Path]:
    """Removes the files in ``directory`` that nobody has locked, and returns them."""
    removed = []
    for path in directory.iterdir():
        with contextlib.suppress(BlockingIOError, FileNotFoundError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed.append(path)
    return removed


def _is_held(path: Path) -> bool:
    try:
        return path.stat().st_nlink > 1
    except FileNotFoundError:
        return False


class Held:
    """Blobs of a store that stay readable until they are released, whatever is evicted.

    Each is one more name of the file, in a directory that is locked for as long as this object
    or its process lives: the system counts the holders, and nobody has to be asked.
    """

    def __init__(self, store: BlobStore, directory: Path) -> None:
        self._store = store
        self.directory = directory
        """What else is put here goes with the rest, also when this process is killed."""
        lock = make_locked(directory)
        self.release = weakref.finalize(self, _release, lock, directory)
        """May be called twice; called when this object goes, at the latest."""

    def take(self, digest: Digest) -> bool:
        """Whether the store has the blob, which counts as used now, and stays."""
        return self._keep(digest, self._store.path(digest))

    def drop(self, digest: Digest) -> None:
        """Lets go of one blob."""
        self.path(digest).unlink(missing_ok=True)

    def adopt(self, digest: Digest, writer: BlobWriter) -> None:
        """Holds a blob that is about to be committed, so that it cannot slip away in between."""
        self._keep(digest, writer.path)

    def _keep(self, digest: Digest, path: Path) -> bool:
        own = self.path(digest)
        with disk_full_is_a_limit(own):
            try:
                own.hardlink_to(path)
            except FileExistsError:
                return True
            except FileNotFoundError:
                return False
        os.utime(own, ns=(time.time_ns(), own.stat().st_mtime_ns))
        return True

    def size(self, digest: Digest) -> int | None:
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def open(self, digest: Digest) -> BinaryIO:
        return self.path(digest).open("rb")

    def path(self, digest: Digest) -> Path:
        """The blob's name here, which stays."""
        return self.directory / digest.hex


def _release(lock: Lock, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    lock.release()


@contextlib.contextmanager
def turn(
    path: Path, *, waiting: Callable[[], None], patience_seconds: float
) -> Iterator[Callable[[], None]]:
    """One at a time among all threads and processes that name ``path``.

    Whoever has the turn calls what is given from time to time. The others wait for as long as
    that happens, and go on side by side with one that stands still.

    Args:
        path: Made, and removed again.
        waiting: Called again and again meanwhile; what it raises ends the wait.
        patience_seconds: Between two signs of life.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    mine = False
    try:
        while not (mine := _locked(fd)) and time.time() - os.fstat(fd).st_mtime < patience_seconds:
            waiting()
            time.sleep(_AGAIN_SECONDS)
        os.utime(fd)
        yield lambda: os.utime(fd)
    finally:
        # Whoever waits has this file open, and whoever comes later makes another: two might
        # then have a turn, which costs a second look and nothing else.
        if mine:
            path.unlink(missing_ok=True)
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_all(source: BlobSource, digest: Digest, most_bytes: int) -> bytes:
    """The whole blob. Raises ValueError where it is longer than ``most_bytes``."""
    with source.open(digest) as stream:
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"{digest} is longer than {most_bytes} bytes")
    return data

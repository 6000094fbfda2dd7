"""What a build pushes: hashed as it arrives, bounded, and one image reference at most."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Self

from policies.model import Limits
from policies.reference import Digest
from runner.errors import NothingStaged, QuotaExceeded
from runner.gateway.documents import Referrer
from runner.gateway.reachable import Uploaded
from runner.registry.image import Descriptor
from runner.stores.blobs import BlobStore, BlobWriter

CHUNK_BYTES = 64 << 10
"""That a chunk of an upload should have at least, save the last one."""
SHORT_CHUNKS = 1000
"""Of one upload, which may have fewer bytes all the same."""


class UploadUnknown(LookupError):
    """No upload of this name is under way."""


class UploadBusy(Exception):
    """Another request writes this upload."""


class Sealed(Exception):
    """The session takes nothing in any more."""


class Upload:
    """One blob on its way in; a context manager, because one request at a time may write it.

    Entering raises UploadBusy, or UploadUnknown where it is over.
    """

    def __init__(self, name: str, writer: BlobWriter, staging: "Staging") -> None:
        self.id = name
        self._writer = writer
        self._staging = staging
        self._lock = threading.Lock()
        self._over = False
        self._chunks = 0

    def __enter__(self) -> Self:
        if not self._lock.acquire(blocking=False):
            raise UploadBusy(self.id)
        if self._over:
            self._lock.release()
            raise UploadUnknown(self.id)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()
        # After the release: seal() found this upload busy, or comes later and finds it free.
        if self._staging.sealed:
            self.discard()

    @property
    def size(self) -> int:
        return self._writer.size

    @property
    def writer(self) -> BlobWriter:
        return self._writer

    def begin_chunk(self) -> None:
        """Raises QuotaExceeded where there were too many for the bytes that they brought."""
        self._chunks += 1
        if self._chunks > SHORT_CHUNKS + self.size // CHUNK_BYTES:
            raise QuotaExceeded(f"an upload in {SHORT_CHUNKS} chunks of too few bytes")

    def hash_with(self, algorithm: str) -> None:
        """What the digest will be of; cheapest before anything was written."""
        self._writer.hash_with(algorithm)

    def write(self, data: bytes) -> None:
        """Raises QuotaExceeded where the session may not push so much."""
        self._staging.charge(len(data))
        self._writer.write(data)

    def discard(self) -> None:
        """Ends the upload; harmless after a commit."""
        self._over = True
        self._writer.discard()


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """In one repository."""

    uploads: int = 64
    """At a time. Builders use six or fewer."""
    blobs: int = 4096
    """That came, or began to; manifests included."""
    tags: int = 1
    """The last ones: a session pushes one image."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A manifest that was checked and taken."""

    descriptor: Descriptor
    referrer: Referrer | None = None


class Staging:
    """One repository of uploaded blobs, until it is sealed. Usable by several threads."""

    def __init__(
        self, store: BlobStore, reachable: Uploaded, limits: Limits, room: Room = Room()
    ) -> None:
        self.store = store
        self._reachable = reachable
        self.limits = limits
        self._room = room
        self._lock = threading.Lock()
        self._taken = threading.Condition(self._lock)
        self._taking = 0
        self._sealed = False
        self._uploads: dict[str, Upload] = {}
        self._bytes = 0
        self._blobs = 0
        self._tags: dict[str, Descriptor] = {}
        self._manifests: dict[Digest, Staged] = {}

    # -- reading back ----------------------------------------------------------------------

    def sees(self, digest: Digest) -> bool:
        return self._reachable.sees(digest)

    def size(self, digest: Digest) -> int | None:
        """Bytes of a blob that the session may see, wherever it is; None for all others."""
        if self._reachable.is_uploaded(digest):
            return self.store.size(digest)
        based = self._reachable.base_of(digest)
        return based[1] if based is not None else None

    def open(self, digest: Digest) -> tuple[BinaryIO, int] | None:
        """An uploaded blob, or None."""
        if not self._reachable.is_uploaded(digest):
            return None
        size = self.store.size(digest)
        return (self.store.open(digest), size) if size is not None else None

    def manifest(self, name: str | Digest) -> tuple[Descriptor, BinaryIO] | None:
        """The staged manifest with this tag or digest, as a file: who reads slowly costs little."""
        with self._lock:
            staged = self._manifests.get(name) if isinstance(name, Digest) else None
            descriptor = staged.descriptor if staged is not None else self._tags.get(name)
        if descriptor is None:
            return None
        try:
            return descriptor, self.store.open(descriptor.digest)
        except FileNotFoundError:  # removed just now
            return None

    def tags(self) -> list[str]:
        """In the order of their bytes."""
        with self._lock:
            return sorted(self._tags)

    def referrers(self, subject: Digest) -> Mapping[Descriptor, Referrer]:
        """Of the manifests that are about ``subject``."""
        with self._lock:
            return {
                staged.descriptor: staged.referrer
                for staged in self._manifests.values()
                if staged.referrer is not None and staged.referrer.subject == subject
            }

    # -- taking in -------------------------------------------------------------------------

    def charge(self, size: int) -> None:
        """Counts bytes against the quota. Raises QuotaExceeded."""
        with self._lock:
            self._require_open()
            self._bytes += size
            if self._bytes > self.limits.staged_bytes:
                raise QuotaExceeded(f"the build pushed more than {self.limits.staged_bytes} bytes")

    def _require_open(self) -> None:
        if self._sealed:
            raise Sealed

    @contextmanager
    def _into(self) -> Iterator[None]:
        """While something becomes a part of the session; ``seal`` waits for what began before."""
        with self._lock:
            self._require_open()
            self._taking += 1
        try:
            yield
        finally:
            with self._lock:
                self._taking -= 1
                self._taken.notify_all()

    def _count(self) -> None:
        with self._lock:
            self._blobs += 1
            if self._blobs > self._room.blobs:
                raise QuotaExceeded(f"the build pushed more than {self._room.blobs} blobs")

    def start(self, name: str, algorithm: str = "sha256") -> Upload:
        """Begins an upload. Raises QuotaExceeded where too many are under way."""
        self._count()
        with self._lock:
            self._require_open()
            if len(self._uploads) >= self._room.uploads:
                raise QuotaExceeded(f"more than {self._room.uploads} uploads at a time")
            upload = Upload(name, self.store.writer(algorithm), self)
            self._uploads[name] = upload
            return upload

    def upload(self, name: str) -> Upload:
        """Raises UploadUnknown."""
        with self._lock:
            try:
                return self._uploads[name]
            except KeyError:
                raise UploadUnknown(name) from None

    def finish(self, upload: Upload, digest: Digest) -> bool:
        """Makes the upload a blob, if its bytes have this digest; it is over either way.

        The caller has entered ``upload``.
        """
        try:
            upload.writer.hash_with(digest.algorithm)
            if upload.writer.digest != digest:
                return False
            with self._into():
                upload.writer.commit()
                self._reachable.uploaded(digest)
            return True
        finally:
            self.cancel(upload)

    def cancel(self, upload: Upload) -> None:
        """Forgets the upload, which the caller has entered."""
        with self._lock:
            self._uploads.pop(upload.id, None)
        upload.discard()

    def mount(self, digest: Digest, source: "Staging") -> bool:
        """Whether ``source``, which may be this one, has the blob; then it is here as well."""
        if not source.sees(digest):
            return False
        if source is not self:
            self._count()
            try:
                self.charge(source.size(digest) or 0)
                with self._into():
                    self.store.link(digest, source.store)
                    self._reachable.uploaded(digest)
            except FileNotFoundError:  # removed just now
                return False
        return True

    def take_manifest(self, tags: Sequence[str], staged: Staged, data: bytes) -> None:
        """Stores a manifest that was checked; the last one with a tag is the session's image."""
        self._count()
        self.charge(len(data))
        digest = staged.descriptor.digest
        with self._into():
            self.store.add(data, digest.algorithm)
            self._reachable.uploaded(digest)
            with self._lock:
                self._manifests[digest] = staged
                for tag in tags:
                    self._tags.pop(tag, None)
                    self._tags[tag] = staged.descriptor
                while len(self._tags) > self._room.tags:
                    del self._tags[next(iter(self._tags))]

    # -- taking out ------------------------------------------------------------------------

    def remove_manifest(self, name: str | Digest) -> bool:
        """Removes a tag, or a manifest with all its tags; whether there was one."""
        with self._lock:
            if not isinstance(name, Digest):
                return self._tags.pop(name, None) is not None
            staged = self._manifests.pop(name, None)
            self._tags = {tag: one for tag, one in self._tags.items() if one.digest != name}
        return staged is not None and self._remove(name)

    def remove_blob(self, digest: Digest) -> bool:
        """Whether there was one. A manifest is none."""
        with self._lock:
            if digest in self._manifests:
                return False
        return self._remove(digest)

    def _remove(self, digest: Digest) -> bool:
        size = self.store.size(digest) if self._reachable.is_uploaded(digest) else None
        if size is None:
            return False
        self._reachable.removed(digest)
        self.store.remove(digest)
        with self._lock:
            self._blobs -= 1
            self._bytes -= size
        return True

    # -- the end ---------------------------------------------------------------------------

    def seal(self) -> None:
        """Ends every upload. Nothing is taken in any more when this returns."""
        with self._lock:
            self._sealed = True
            self._taken.wait_for(lambda: self._taking == 0)
            uploads = list(self._uploads.values())
            self._uploads.clear()
        for upload in uploads:
            # One that is being written is ended by the request that writes it.
            with suppress(UploadBusy, UploadUnknown), upload:
                pass

    @property
    def sealed(self) -> bool:
        return self._sealed

    @property
    def root(self) -> Descriptor:
        """The one image that was pushed with a tag. Raises NothingStaged."""
        with self._lock:
            if self._tags:
                return next(reversed(self._tags.values()))
        raise NothingStaged(
            "the builder ended well, but pushed no image",
            advice="The log shows what the builder did; the builder image may be at fault.",
        )

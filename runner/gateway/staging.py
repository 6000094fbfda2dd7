"""What a build pushes: hashed as it arrives, bounded, and one image reference at most."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import BinaryIO, Self

from policies.model import Limits
from policies.reference import Digest
from runner.errors import NothingStaged, QuotaExceeded
from runner.gateway.reachable import ReachableSet
from runner.registry.image import Descriptor
from runner.stores.blobs import BlobStore, BlobWriter

UPLOADS = 64
"""At a time. Builders use six or fewer."""
BLOBS = 4096
"""In one session, manifests included."""


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

    def write(self, data: bytes) -> None:
        """Raises QuotaExceeded where the session may not push so much."""
        self._staging.charge(len(data))
        self._writer.write(data)

    def discard(self) -> None:
        """Ends the upload; harmless after a commit."""
        self._over = True
        self._writer.discard()


class Staging:
    """One session's store of uploaded blobs, until it is sealed. Usable by several threads."""

    def __init__(self, store: BlobStore, reachable: ReachableSet, limits: Limits) -> None:
        self.store = store
        self._reachable = reachable
        self.limits = limits
        self._lock = threading.Lock()
        self._taken = threading.Condition(self._lock)
        self._taking = 0
        self._sealed = False
        self._uploads: dict[str, Upload] = {}
        self._bytes = 0
        self._blobs = 0
        self._root: Descriptor | None = None
        self._tag: str | None = None
        self._types: dict[Digest, str] = {}

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

    def manifest(self, reference: str) -> tuple[Descriptor, bytes] | None:
        """The staged manifest with this tag or digest."""
        with self._lock:
            tagged = (
                self._root.digest if self._root is not None and reference == self._tag else None
            )
            digest = tagged or next(filter(reference.__eq__, self._types), None)
            if digest is None:
                return None
            media_type = self._types[digest]
        with self.store.open(digest) as stream:
            data = stream.read()
        return Descriptor(media_type, digest, len(data)), data

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
            if self._blobs > BLOBS:
                raise QuotaExceeded(f"the build pushed more than {BLOBS} blobs")

    def start(self, name: str) -> Upload:
        """Begins an upload. Raises QuotaExceeded where too many are under way."""
        self._count()
        with self._lock:
            self._require_open()
            if len(self._uploads) >= UPLOADS:
                raise QuotaExceeded(f"more than {UPLOADS} uploads at a time")
            upload = Upload(name, self.store.writer(), self)
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

    def take_manifest(self, tag: str | None, media_type: str, data: bytes) -> None:
        """Stores a manifest that was checked; with a tag it is the session's image."""
        self._count()
        self.charge(len(data))
        with self._into():
            digest = self.store.add(data)
            self._reachable.uploaded(digest)
            with self._lock:
                self._types[digest] = media_type
                if tag is not None:
                    self._tag = tag
                    self._root = Descriptor(media_type, digest, len(data))

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
        if self._root is None:
            raise NothingStaged(
                "the builder ended well, but pushed no image",
                advice="The log shows what the builder did; the builder image may be at fault.",
            )
        return self._root

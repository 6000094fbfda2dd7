"""What a build pushes: hashed as it arrives, bounded, and one image reference at most."""

import threading
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


class Upload:
    """One blob on its way in; a context manager, because one request at a time may write it."""

    def __init__(self, name: str, writer: BlobWriter, staging: "Staging") -> None:
        self.id = name
        self._writer = writer
        self._staging = staging
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if not self._lock.acquire(blocking=False):
            raise UploadUnknown(self.id)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()

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


class Staging:
    """One session's store of uploaded blobs, until it is sealed. Usable by several threads."""

    def __init__(self, store: BlobStore, reachable: ReachableSet, limits: Limits) -> None:
        self.store = store
        self._reachable = reachable
        self._limits = limits
        self._lock = threading.Lock()
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
            digest = tagged or next((known for known in self._types if known == reference), None)
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
            self._bytes += size
            if self._bytes > self._limits.staged_bytes:
                raise QuotaExceeded(f"the build pushed more than {self._limits.staged_bytes} bytes")

    def _count(self) -> None:
        with self._lock:
            self._blobs += 1
            if self._blobs > BLOBS:
                raise QuotaExceeded(f"the build pushed more than {BLOBS} blobs")

    def start(self, name: str) -> Upload:
        """Begins an upload. Raises QuotaExceeded where too many are under way."""
        self._count()
        with self._lock:
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
        """Makes the upload a blob, if its bytes have this digest; it is over either way."""
        self._forget(upload)
        if upload.writer.digest != digest:
            upload.writer.discard()
            return False
        upload.writer.commit()
        self._reachable.uploaded(digest)
        return True

    def cancel(self, upload: Upload) -> None:
        self._forget(upload)
        upload.writer.discard()

    def _forget(self, upload: Upload) -> None:
        with self._lock:
            self._uploads.pop(upload.id, None)

    def take_manifest(self, tag: str | None, media_type: str, data: bytes) -> None:
        """Stores a manifest that was checked; with a tag it is the session's image."""
        self._count()
        self.charge(len(data))
        digest = self.store.add(data)
        self._reachable.uploaded(digest)
        with self._lock:
            self._types[digest] = media_type
            if tag is not None:
                self._tag = tag
                self._root = Descriptor(media_type, digest, len(data))

    # -- the end ---------------------------------------------------------------------------

    def seal(self) -> None:
        """Ends every upload that is under way. Nothing may be taken in afterwards."""
        with self._lock:
            uploads = list(self._uploads.values())
            self._uploads.clear()
        for upload in uploads:
            upload.writer.discard()

    @property
    def root(self) -> Descriptor:
        """The one image that was pushed with a tag. Raises NothingStaged."""
        if self._root is None:
            raise NothingStaged(
                "the builder ended well, but pushed no image",
                advice="The log shows what the builder did; the builder image may be at fault.",
            )
        return self._root

"""Base images from real registries, for one session, through a cache that all share by digest.

A manifest can name any digest. So the cache gives a blob only where the repository whose manifest
names it has delivered these very bytes before, to whomever: otherwise a registry of the attacker's
would name another tenant's layer, and the cache would hand it out.
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from policies.reference import Digest, ImageReference
from runner.errors import (
    BaseImageDenied,
    QuotaExceeded,
    RegistryProtocol,
    RegistryUnreachable,
    VerificationFailed,
)
from runner.files import disk_full_is_a_limit
from runner.gateway.reachable import ReachableSet
from runner.registry.auth import Anonymous, Credentials
from runner.registry.client import RegistryClient
from runner.registry.image import Descriptor
from runner.registry.layout import LayoutClient
from runner.settings import Settings
from runner.stores.blobs import BlobStore

IMAGES = 1024
"""That one session resolves; a base image for several platforms is two."""
DOCUMENT_BYTES = 64 << 20
"""Of all their manifests, which stay in memory."""


class Upstream:
    """Pulls what the session's reachable set allows, with the identity that it allows.

    As a BlobSource it shows the blobs of resolved images that their repositories delivered.
    """

    def __init__(
        self,
        settings: Settings,
        credentials: Credentials,
        reachable: ReachableSet,
        cache: BlobStore,
        *,
        fetching: Callable[[ImageReference, Digest, int, int], None],
        local_images: Mapping[ImageReference, Path],
    ) -> None:
        """Opens nothing yet.

        Args:
            settings: How registries are reached.
            credentials: Of the user, for what the reachable set allows them for.
            reachable: Asked before anything is pulled, told of everything that was resolved.
            cache: Shared by all sessions, by digest.
            fetching: Gets image, digest, bytes so far and bytes in all while a blob arrives.
            local_images: Images that an OCI layout on this host stands in for.
        """
        self._layouts = {image.name: LayoutClient(path) for image, path in local_images.items()}
        self._reachable = reachable
        self._cache = cache
        self._fetching = fetching
        self._anonymous = RegistryClient(settings, Anonymous())
        self._as_user = RegistryClient(settings, credentials)
        self._pinned: dict[ImageReference, tuple[Descriptor, bytes]] = {}
        self._lock = threading.Lock()
        self._busy: dict[Digest, threading.Lock] = {}
        self._document_bytes = 0
        self._pulled_bytes = 0
        self._most_bytes = settings.http.blob_bytes
        self._delivered = cache.directory / "delivered"
        self._delivered.mkdir(exist_ok=True)
        self._closed = False

    def close(self) -> None:
        """Ends what is being fetched with its next piece."""
        self._closed = True
        self._anonymous.close()
        self._as_user.close()

    def _client(self, image: ImageReference) -> RegistryClient | LayoutClient:
        if (layout := self._layouts.get(image.name)) is not None:
            return layout
        return self._as_user if self._reachable.with_credentials(image) else self._anonymous

    def resolve(self, image: ImageReference) -> tuple[Descriptor, bytes]:
        """The manifest or index of ``image``; a tag is resolved once and pinned.

        Raises:
            BaseImageDenied: Outside the session's reachable set.
            RegistryError: The registry does not give it.
            QuotaExceeded: So many images, or so large manifests, were resolved before.
        """
        if not self._reachable.may_resolve(image):
            raise BaseImageDenied(f"this build may not start from {image}")
        with self._lock:
            if (pinned := self._pinned.get(image)) is not None:
                return pinned
        found = self._client(image).manifest(image)
        with self._lock:
            if (pinned := self._pinned.get(image)) is not None:
                return pinned
            self._document_bytes += len(found[1])
            if len(self._pinned) >= IMAGES or self._document_bytes > DOCUMENT_BYTES:
                raise QuotaExceeded(f"the build resolved more than {len(self._pinned)} images")
            try:
                self._reachable.resolved(image, *found)
            except VerificationFailed as error:
                raise RegistryProtocol(f"{image}: {error.message}") from None
            self._pinned[image] = found
            return found

    def resolved(self) -> dict[ImageReference, Digest]:
        """Every image that was resolved, and to what."""
        with self._lock:
            return {image: descriptor.digest for image, (descriptor, _) in self._pinned.items()}

    def open_blob(self, digest: Digest) -> tuple[BinaryIO, int]:
        """A blob of a resolved image, from the cache or fetched into it.

        Raises:
            FileNotFoundError: No image that the session resolved references it.
            RegistryError: The registry does not give it.
        """
        based = self._reachable.base_of(digest)
        if based is None:
            raise FileNotFoundError(digest)
        image, size = based
        with self._lock:
            busy = self._busy.setdefault(digest, threading.Lock())
        with busy:
            if not self._has(image, digest) or self._cache.size(digest) != size:
                self._fetch(image, digest, size)
        return self._cache.open(digest), size

    def size(self, digest: Digest) -> int | None:
        based = self._reachable.base_of(digest)
        known = based is not None and self._has(based[0], digest)
        return self._cache.size(digest) if known else None

    def open(self, digest: Digest) -> BinaryIO:
        if self.size(digest) is None:
            raise FileNotFoundError(digest)
        return self._cache.open(digest)

    def _mark(self, image: ImageReference, digest: Digest) -> Path:
        """Exists where the repository of ``image`` has delivered the blob."""
        return self._delivered / Digest.of(f"{image.name}@{digest}".encode()).hex

    def _has(self, image: ImageReference, digest: Digest) -> bool:
        return self._mark(image, digest).exists()

    def _fetch(self, image: ImageReference, digest: Digest, size: int) -> None:
        with self._lock:
            self._pulled_bytes += size
            if self._pulled_bytes > self._most_bytes:
                raise QuotaExceeded(f"the build pulled more than {self._most_bytes} bytes")
        with (
            disk_full_is_a_limit(self._cache.directory),
            self._cache.arriving(digest.algorithm) as writer,
            self._client(image).read_blob(image, digest, size) as pieces,
        ):
            for piece in pieces:
                if self._closed:
                    raise RegistryUnreachable(f"{image}: the session ended while it was pulled")
                writer.write(piece)
                if writer.size > size:
                    raise RegistryProtocol(f"{image.host} gave more bytes than {digest} has")
                self._fetching(image, digest, writer.size, size)
            if writer.digest != digest:
                raise RegistryProtocol(f"{image.host} gave other bytes than {digest}")
            writer.commit()
            self._mark(image, digest).touch()

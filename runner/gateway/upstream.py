"""Base images from real registries, for one session, through a cache that all share by digest."""

import threading
from collections.abc import Callable
from typing import BinaryIO

from policies.reference import Digest, ImageReference
from runner.errors import BaseImageDenied, RegistryProtocol, VerificationFailed
from runner.gateway.reachable import ReachableSet
from runner.registry.auth import Anonymous, Credentials
from runner.registry.client import RegistryClient
from runner.registry.image import Descriptor
from runner.settings import Settings
from runner.stores.blobs import BlobStore


class Upstream:
    """Pulls what the session's reachable set allows, with the identity that it allows."""

    def __init__(
        self,
        settings: Settings,
        credentials: Credentials,
        reachable: ReachableSet,
        cache: BlobStore,
        fetching: Callable[[ImageReference, Digest, int, int], None],
    ) -> None:
        """``fetching`` gets image, digest, bytes so far and bytes in all while a blob arrives."""
        self._reachable = reachable
        self._cache = cache
        self._fetching = fetching
        self._anonymous = RegistryClient(settings, Anonymous())
        self._as_user = RegistryClient(settings, credentials)
        self._pinned: dict[ImageReference, tuple[Descriptor, bytes]] = {}
        self._lock = threading.Lock()
        self._busy: dict[Digest, threading.Lock] = {}

    def close(self) -> None:
        self._anonymous.close()
        self._as_user.close()

    def _client(self, image: ImageReference) -> RegistryClient:
        return self._as_user if self._reachable.with_credentials(image) else self._anonymous

    def resolve(self, image: ImageReference) -> tuple[Descriptor, bytes]:
        """The manifest or index of ``image``; a tag is resolved once and pinned.

        Raises:
            BaseImageDenied: Outside the session's reachable set.
            RegistryError: The registry does not give it.
        """
        if not self._reachable.may_resolve(image):
            raise BaseImageDenied(f"this build may not start from {image}")
        with self._lock:
            if (pinned := self._pinned.get(image)) is not None:
                return pinned
        found = self._client(image).manifest(image)
        try:
            self._reachable.resolved(image, *found)
        except VerificationFailed as error:
            raise RegistryProtocol(f"{image}: {error.message}") from None
        with self._lock:
            return self._pinned.setdefault(image, found)

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
            if self._cache.size(digest) != size:
                self._fetch(image, digest, size)
        return self._cache.open(digest), size

    def _fetch(self, image: ImageReference, digest: Digest, size: int) -> None:
        with (
            self._cache.arriving(digest.algorithm) as writer,
            self._client(image).read_blob(image, digest, size) as pieces,
        ):
            for piece in pieces:
                writer.write(piece)
                self._fetching(image, digest, writer.size, size)
            if writer.digest != digest:
                raise RegistryProtocol(f"{image.host} gave other bytes than {digest}")
            writer.commit()

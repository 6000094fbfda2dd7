"""Base images from real registries, for one session, through a cache that all share by digest.

A manifest can name any digest. So the cache gives a blob only where the repository whose manifest
names it has delivered these very bytes before, to whomever: otherwise a registry of the attacker's
would name another tenant's layer, and the cache would hand it out. Manifests are asked for again
in each session, with its own identity.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from policies.patterns import matches_any
from policies.reference import Digest, ImageReference
from runner.errors import (
    BaseImageDenied,
    ImageNotFound,
    QuotaExceeded,
    RegistryError,
    RegistryProtocol,
    RegistryUnreachable,
    VerificationFailed,
)
from runner.files import disk_full_is_a_limit
from runner.gateway.kept import Kept, mark
from runner.gateway.reachable import ReachableSet
from runner.registry.auth import Anonymous, Credentials
from runner.registry.client import RegistryClient
from runner.registry.image import Descriptor
from runner.registry.layout import LayoutClient
from runner.settings import Settings
from runner.stores.blobs import BlobStore, turn

IMAGES = 1024
"""That one session resolves; a base image for several platforms is two."""
DOCUMENTS_AT_A_TIME = 4
"""That are read from registries; each takes some MiB while it comes."""
DOCUMENT_BYTES = 64 << 20
"""Of all their manifests, which stay in memory."""
PATIENCE_SECONDS = 60.0
"""With another build that fetches the same blob from the same repository and gets on."""


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
        local_images: Mapping[ImageReference, LayoutClient],
    ) -> None:
        """Opens nothing yet.

        Args:
            settings: How registries are reached.
            credentials: Of the user, for what the reachable set allows them for.
            reachable: Asked before anything is pulled, told of everything that was resolved.
            cache: Shared by all sessions, by digest.
            fetching: Gets image, digest, bytes so far and bytes in all while a blob arrives.
            local_images: Images whose repository an OCI layout on this host stands in for.
        """
        asked_for = settings.base_images.asked_for
        self._layouts = {asked_for(image).name: each for image, each in local_images.items()}
        self._settings = settings
        self._reachable = reachable
        self._cache = cache
        self._held = cache.hold()
        self._kept = Kept(cache)
        self._fetching = fetching
        self._anonymous = RegistryClient(settings, Anonymous())
        self._as_user = RegistryClient(settings, credentials)
        self._pinned: dict[ImageReference, tuple[Descriptor, bytes]] = {}
        self._taken: set[tuple[str, Digest]] = set()
        self._lock = threading.Lock()
        self._reading = threading.BoundedSemaphore(DOCUMENTS_AT_A_TIME)
        self._document_bytes = 0
        self._pulled_bytes = 0
        self._most_bytes = settings.http.blob_bytes
        self._closed = False

    def close(self) -> None:
        """Ends what is being fetched with its next piece."""
        self._closed = True
        self._anonymous.close()
        self._as_user.close()

    def release(self) -> None:
        """Lets go of the blobs in the cache, once nobody reads the session's image any more."""
        self._held.release()

    def _asked(self, image: ImageReference) -> ImageReference:
        """What stands for ``image`` in some registry."""
        return self._settings.base_images.asked_for(image)

    def _client(self, asked: ImageReference) -> RegistryClient | LayoutClient:
        if (layout := self._layouts.get(asked.name)) is not None:
            return layout
        if self._settings.base_images.offline:
            raise ImageNotFound(
                f"{asked} is not at hand, and no registry is asked",
                advice="runner base pull IMAGE --from oci:DIR brings an image that local of "
                "[base_images] names: docs/base-images.md.",
            )
        return self._as_user if self._reachable.with_credentials(asked) else self._anonymous

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
        with self._reading:
            found = self._manifest(image)
        with self._lock:
            if (pinned := self._pinned.get(image)) is not None:
                return pinned
            self._document_bytes += len(found[1])
            if len(self._pinned) >= IMAGES or self._document_bytes > DOCUMENT_BYTES:
                raise QuotaExceeded(f"the build resolved more than {len(self._pinned)} images")
            try:
                blobs = self._reachable.resolved(image, *found)
            except VerificationFailed as error:
                raise RegistryProtocol(f"{image}: {error.message}") from None
            self._pinned[image] = found
        asked = self._asked(image)
        for blob in blobs:  # those that no builder asks for have to be there for verify, too
            self._take(asked, blob.digest, blob.size)
        return found

    def _manifest(self, image: ImageReference) -> tuple[Descriptor, bytes]:
        asked = self._asked(image)
        rules = self._settings.base_images
        local = matches_any(rules.local, image.name)
        if local and rules.offline and asked.name not in self._layouts:
            kept = self._kept.find(asked, self._held, self._settings.http.manifest_bytes)
            if kept is not None:
                return kept
        found = self._client(asked).manifest(asked)
        if local:  # for a time without a way out
            self._kept.add(asked, *found, self._held)
        return found

    def resolved(self) -> dict[ImageReference, Digest]:
        """Every image that was resolved, and to what."""
        with self._lock:
            return {image: descriptor.digest for image, (descriptor, _) in self._pinned.items()}

    def open_blob(self, digest: Digest, name: str = "") -> tuple[BinaryIO, int]:
        """A blob of a resolved image, from the cache or fetched into it.

        Args:
            digest: Of the blob.
            name: Of the repository that is asked first, where its image references the blob.

        Raises:
            FileNotFoundError: No image that the session resolved references it.
            RegistryError: No registry of such an image gives it.
        """
        failure: Exception = FileNotFoundError(digest)
        bases = self._reachable.bases_of(digest)
        for image, size in sorted(bases, key=lambda base: base[0].name != name):
            try:
                return self._opened(image, digest, size), size
            except RegistryError as error:
                failure = error
        raise failure

    def fetch(self, image: ImageReference, blob: Descriptor) -> None:
        """Makes sure that the repository of ``image`` itself delivered the blob, and keeps it.

        Raises:
            FileNotFoundError: The image was not resolved, or does not reference it.
            RegistryError: The registry does not give it.
        """
        if (image, blob.size) not in self._reachable.bases_of(blob.digest):
            raise FileNotFoundError(blob.digest)
        self._opened(image, blob.digest, blob.size).close()

    def forget(self, digests: Iterable[Digest]) -> None:
        """Removes blobs whose bytes are not what they were; whoever wants them fetches anew."""
        for digest in digests:
            self._held.drop(digest)
            self._cache.remove(digest)

    def path(self, digest: Digest) -> Path:
        """File of a blob that was fetched."""
        return self._held.path(digest)

    def _opened(self, image: ImageReference, digest: Digest, size: int) -> BinaryIO:
        asked = self._asked(image)
        if not self._take(asked, digest, size):
            with self._turn(asked, digest) as alive:
                if not self._take(asked, digest, size):
                    self._fetch(image, digest, size, alive)
        return self._held.open(digest)

    def size(self, digest: Digest) -> int | None:
        bases = self._reachable.bases_of(digest)
        taken = (size for image, size in bases if self._take(self._asked(image), digest, size))
        return next(taken, None)

    def open(self, digest: Digest) -> BinaryIO:
        if self.size(digest) is None:
            raise FileNotFoundError(digest)
        return self._held.open(digest)

    def _mark(self, asked: ImageReference, digest: Digest) -> Path:
        return mark(self._cache, asked, digest)

    def _take(self, asked: ImageReference, digest: Digest, size: int) -> bool:
        """Whether that repository has delivered the blob; then it stays as long as we do."""
        taken = asked.name, digest
        if taken in self._taken and self._held.size(digest) == size:
            return True  # whatever was evicted since
        if (
            self._mark(asked, digest).exists()
            and self._cache.size(digest) == size
            and self._held.take(digest)
        ):
            self._taken.add(taken)
            return True
        return False

    @contextlib.contextmanager
    def _turn(self, asked: ImageReference, digest: Digest) -> Iterator[Callable[[], None]]:
        """One fetch of a blob from one repository at a time, whichever builds want it."""
        mark = self._mark(asked, digest)
        mark.parent.mkdir(parents=True, exist_ok=True)
        path = mark.with_suffix(".turn")
        with turn(path, waiting=self._go_on, patience_seconds=PATIENCE_SECONDS) as alive:
            yield alive

    def _go_on(self) -> None:
        if self._closed:
            raise RegistryUnreachable("the session ended while an image was pulled")

    def _fetch(
        self, image: ImageReference, digest: Digest, size: int, alive: Callable[[], None]
    ) -> None:
        with self._lock:
            self._pulled_bytes += size
            if self._pulled_bytes > self._most_bytes:
                raise QuotaExceeded(f"the build pulled more than {self._most_bytes} bytes")
        asked = self._asked(image)
        with (
            disk_full_is_a_limit(self._cache.directory),
            self._cache.arriving(digest.algorithm) as writer,
            self._client(asked).read_blob(asked, digest, size) as pieces,
        ):
            for piece in pieces:
                self._go_on()
                alive()
                writer.write(piece)
                if writer.size > size:
                    raise RegistryProtocol(f"{asked.host} gave more bytes than {digest} has")
                self._fetching(image, digest, writer.size, size)
            if writer.digest != digest:
                raise RegistryProtocol(f"{asked.host} gave other bytes than {digest}")
            writer.sync()
            self._held.adopt(digest, writer)
            writer.commit()
            mark = self._mark(asked, digest)
            mark.parent.mkdir(parents=True, exist_ok=True)  # evicted with another one's blob
            mark.touch()
            self._taken.add((asked.name, digest))
        self._cache.evict(self._settings.cache_bytes)

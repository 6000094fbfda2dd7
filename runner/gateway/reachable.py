"""The reachable set: what one session may see. Gateway, stores, verify and publish ask it.

A session sees the blobs that it uploaded itself, and those that a manifest which it resolved
references. Anything else does not exist for it, whoever else may have it.
"""

import threading
from typing import BinaryIO

from policies.engine import may_start_from
from policies.grants import within
from policies.model import Decision
from policies.reference import Digest, ImageReference
from runner.errors import PolicyDenied
from runner.registry.image import Descriptor, Manifest, parse_document
from runner.stores.blobs import BlobSource


class Uploaded:
    """The blobs that came in here, and no others. Usable by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uploaded: set[Digest] = set()

    def uploaded(self, digest: Digest) -> None:
        with self._lock:
            self._uploaded.add(digest)

    def removed(self, digest: Digest) -> None:
        with self._lock:
            self._uploaded.discard(digest)

    def is_uploaded(self, digest: Digest) -> bool:
        with self._lock:
            return digest in self._uploaded

    def base_of(self, digest: Digest) -> tuple[ImageReference, int] | None:
        """A resolved image that references the blob, and the size it states."""
        del digest
        return None

    def sees(self, digest: Digest) -> bool:
        return self.is_uploaded(digest) or self.base_of(digest) is not None


class ReachableSet(Uploaded):
    """Grows while the session resolves and uploads; never shrinks."""

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self._decision = decision
        self._based: dict[Digest, dict[ImageReference, int]] = {}
        self._entries: set[tuple[str, Digest]] = set()
        self._pulled_as_user: set[ImageReference] = set()

    # -- what the decision allows ----------------------------------------------------------

    def decide(self, decision: Decision) -> None:
        """From now on ``decision`` holds, which knows what the base images bring along.

        Raises:
            PolicyDenied: It takes back what was done under the one before.
        """
        self._decision = decision
        for image in list(self._pulled_as_user):
            if not self.with_credentials(image):
                raise PolicyDenied(
                    f"{image} was pulled with credentials, which policy does not allow now that "
                    "its ONBUILD instructions are known"
                )

    def may_resolve(self, image: ImageReference) -> bool:
        """Whether the session may start from ``image``, itself or as an entry of an index."""
        with self._lock:
            is_entry = image.digest is not None and (image.name, image.digest) in self._entries
        return is_entry or may_start_from(self._decision.grant, image)

    def with_credentials(self, image: ImageReference) -> bool:
        """Whether ``image`` is to be pulled with the user's credentials; anonymously otherwise."""
        if not within(self._decision.grant.pull_credentials, image.name):
            return False
        with self._lock:
            self._pulled_as_user.add(image)
        return True

    # -- what the session did --------------------------------------------------------------

    def resolved(
        self, image: ImageReference, descriptor: Descriptor, document: bytes
    ) -> tuple[Descriptor, ...]:
        """Notes that ``document`` was resolved: the blobs returned are reachable from now on."""
        parsed = parse_document(document, descriptor.media_type)
        blobs = (parsed.config, *parsed.layers) if isinstance(parsed, Manifest) else ()
        with self._lock:
            for blob in blobs:
                self._based.setdefault(blob.digest, {}).setdefault(image, blob.size)
            if not isinstance(parsed, Manifest):
                entries = (entry.descriptor.digest for entry in parsed.manifests)
                self._entries.update((image.name, digest) for digest in entries)
        return blobs

    def base_of(self, digest: Digest) -> tuple[ImageReference, int] | None:
        return next(iter(self.bases_of(digest)), None)

    def bases_of(self, digest: Digest) -> list[tuple[ImageReference, int]]:
        """All resolved images that reference the blob, and the sizes they state.

        None of them owns it: a manifest may name what its repository does not have.
        """
        with self._lock:
            return list(self._based.get(digest, {}).items())


class ReachableBlobs:
    """The blobs of a session as one source: staged ones, then those of its base images."""

    def __init__(self, reachable: ReachableSet, staged: BlobSource, base: BlobSource) -> None:
        self._reachable = reachable
        self._staged = staged
        self._base = base

    def _source(self, digest: Digest) -> BlobSource | None:
        if self._reachable.is_uploaded(digest):
            return self._staged
        return self._base if self._reachable.base_of(digest) is not None else None

    def size(self, digest: Digest) -> int | None:
        source = self._source(digest)
        return source.size(digest) if source is not None else None

    def open(self, digest: Digest) -> BinaryIO:
        source = self._source(digest)
        if source is None:
            raise FileNotFoundError(digest)
        return source.open(digest)

"""An image in an OCI layout on this host, in the shape of a registry's client.

For sites without a way out: a layout stands in for one repository of one session. Its bytes are
as hostile as a registry's, and are checked in the same places.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from policies.reference import Digest, ImageReference
from runner.errors import ImageNotFound
from runner.registry import strictjson
from runner.registry.image import MANIFEST_BYTES, Descriptor
from runner.stores.blobs import CHUNK_BYTES


class LayoutClient:
    """Reads what ``RegistryClient`` would pull. Every method raises ImageNotFound."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def manifest(self, reference: ImageReference) -> tuple[Descriptor, bytes]:
        """The layout's only image, or the one that ``reference`` names by digest."""
        index = strictjson.parse(self._small("index.json"), most_bytes=MANIFEST_BYTES)
        listed = {entry.digest("digest"): entry for entry in index.children("manifests")}
        if reference.digest is None and len(listed) != 1:
            raise ImageNotFound(
                f"{self._directory} holds {len(listed)} images",
                advice="Make a layout with one image: skopeo copy ... oci:DIR:TAG",
            )
        digest = reference.digest or next(iter(listed))
        data = self._small(self._blob(digest))
        entry = listed.get(digest) or strictjson.parse(data, most_bytes=MANIFEST_BYTES)
        return Descriptor(entry.text("mediaType"), Digest.of(data), len(data)), data

    @contextmanager
    def read_blob(
        self, reference: ImageReference, digest: Digest, size: int | None
    ) -> Iterator[Iterator[bytes]]:
        """The bytes of a blob in pieces. The caller hashes them."""
        del reference, size
        try:
            with (self._directory / self._blob(digest)).open("rb") as stream:
                yield iter(lambda: stream.read(CHUNK_BYTES), b"")
        except OSError as error:
            raise self._missing(error) from None

    def close(self) -> None:
        """Nothing is held open."""

    @staticmethod
    def _blob(digest: Digest) -> str:
        return f"blobs/{digest.algorithm}/{digest.hex}"

    def _small(self, name: str) -> bytes:
        try:
            with (self._directory / name).open("rb") as stream:
                return stream.read(MANIFEST_BYTES + 1)
        except OSError as error:
            raise self._missing(error) from None

    def _missing(self, error: OSError) -> ImageNotFound:
        return ImageNotFound(
            f"{error.filename}: {error.strerror}", advice="Name a directory with an OCI layout."
        )

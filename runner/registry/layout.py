"""An image in an OCI layout on this host, in the shape of a registry's client.

For sites without a way out: a layout stands in for one repository of one session. Its bytes are
as hostile as a registry's, and are checked in the same places.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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
        with self._open(self._blob(digest)) as stream:
            yield iter(lambda: stream.read(CHUNK_BYTES), b"")

    def close(self) -> None:
        """Nothing is held open."""

    @staticmethod
    def _blob(digest: Digest) -> str:
        return f"blobs/{digest.algorithm}/{digest.hex}"

    def _small(self, name: str) -> bytes:
        with self._open(name) as stream:
            return stream.read(MANIFEST_BYTES + 1)

    def _open(self, name: str) -> BinaryIO:
        """A regular file of the layout, never what a link in its place points to."""
        path = self._directory / name
        try:
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
        except OSError as error:
            raise self._missing(f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise self._missing(f"{path} is no file")
        return file

    def _missing(self, message: str) -> ImageNotFound:
        return ImageNotFound(message, advice="Name a directory with an OCI layout.")

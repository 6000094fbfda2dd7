"""An image in an OCI layout on this host, in the shape of a registry's client.

For sites without a way out: a layout stands in for one repository of one session. Its bytes are
as hostile as a registry's, and are checked in the same places.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from policies.reference import Digest, ImageReference
from runner.errors import ImageNotFound, LayoutInvalid, VerificationFailed
from runner.registry import strictjson
from runner.registry.image import MANIFEST_BYTES, OCI_INDEX, OCI_MANIFEST, Descriptor
from runner.registry.strictjson import JsonObject
from runner.stores.blobs import CHUNK_BYTES

NAME = "org.opencontainers.image.ref.name"
"""What the index of a layout calls an image."""
_SHOWN_NAMES = 10


class LayoutFiles(Protocol):
    """The files of one layout. Its text is what messages call it."""

    def open(self, name: str) -> BinaryIO:
        """The file with this name in the layout. Raises ImageNotFound."""

    def close(self) -> None:
        """What was opened stays readable."""


class LayoutClient:
    """Reads what ``RegistryClient`` would pull.

    Every method raises ImageNotFound, and LayoutInvalid for what is no layout.
    """

    def __init__(self, files: LayoutFiles, name: str | None = None) -> None:
        """``name`` says which image of ``files`` is meant; None for the only one."""
        self._files = files
        self._name = name

    def manifest(self, reference: ImageReference) -> tuple[Descriptor, bytes]:
        """The image that is meant, or the one that ``reference`` names by digest."""
        try:
            return self._manifest(reference.digest)
        except VerificationFailed as error:
            raise LayoutInvalid(f"{self._files}: {error.message}") from None

    def _manifest(self, digest: Digest | None) -> tuple[Descriptor, bytes]:
        index = strictjson.parse(self._small("index.json"), most_bytes=MANIFEST_BYTES)
        entries = list(index.children("manifests"))
        digest = digest or self._meant(entries)
        data = self._small(_blob(digest))
        if hashlib.new(digest.algorithm, data).hexdigest() != digest.hex:
            raise VerificationFailed(f"other bytes under {digest}")
        listed = {entry.digest("digest"): entry.text("mediaType") for entry in entries}
        return Descriptor(listed.get(digest) or _media_type(data), digest, len(data)), data

    def _meant(self, entries: list[JsonObject]) -> Digest:
        named = [entry for entry in entries if self._name in {None, _name(entry)}]
        digests = {entry.digest("digest") for entry in named}
        if len(digests) != 1:
            called = "" if self._name is None else f" called {self._name}"
            names = sorted({_name(entry) for entry in entries} - {""})[:_SHOWN_NAMES]
            raise ImageNotFound(
                f"{self._files} holds {len(digests)} images{called}",
                advice=f"Make a layout with one image, or name one of its images ("
                f"{', '.join(names) or 'none has a name'}) as in oci:DIR:TAG.",
            )
        return digests.pop()

    @contextmanager
    def read_blob(
        self, reference: ImageReference, digest: Digest, size: int | None
    ) -> Iterator[Iterator[bytes]]:
        """The bytes of a blob in pieces. The caller hashes them."""
        del reference, size
        with self._files.open(_blob(digest)) as stream:
            yield iter(lambda: stream.read(CHUNK_BYTES), b"")

    def close(self) -> None:
        """Reads nothing more."""
        self._files.close()

    def _small(self, name: str) -> bytes:
        with self._files.open(name) as stream:
            return stream.read(MANIFEST_BYTES + 1)


def _blob(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.hex}"


def _media_type(data: bytes) -> str:
    """Of a manifest that no index of the layout lists; OCI lets it say nothing of itself."""
    document = strictjson.parse(data, most_bytes=MANIFEST_BYTES)
    if "mediaType" in document:
        return document.text("mediaType")
    return OCI_INDEX if "manifests" in document else OCI_MANIFEST


def _name(entry: JsonObject) -> str:
    return entry.texts("annotations").get(NAME, "") if entry.given("annotations") else ""


class LayoutDirectory:
    """A layout as files on this host."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def open(self, name: str) -> BinaryIO:
        """A regular file of the layout, never what a link in its place points to."""
        path = self._path / name
        try:
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
        except OSError as error:
            raise self._missing(f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise self._missing(f"{path} is no file")
        return file

    def close(self) -> None:
        """Nothing is held open."""

    def _missing(self, message: str) -> ImageNotFound:
        return ImageNotFound(message, advice="Name a directory with an OCI layout.")

"""An image in a registry, in the shape that the verifier reads."""

import io
from contextlib import ExitStack
from typing import BinaryIO, Self

from policies.reference import Digest, ImageReference
from runner.pieces import stream_of
from runner.registry.client import RegistryClient
from runner.registry.image import Index, parse_document


class RemoteImage:
    """Documents are fetched at once, blobs while they are read. A context manager."""

    def __init__(self, client: RegistryClient, reference: ImageReference) -> None:
        """Raises RegistryError, and VerificationFailed where the root is no image at all."""
        self._client = client
        self._reference = reference
        self._open = ExitStack()
        self.root, data = client.manifest_at_origin(reference)
        self._documents = {self.root.digest: data}
        parsed = parse_document(data, self.root.media_type)
        for entry in parsed.manifests if isinstance(parsed, Index) else ():
            digest = entry.descriptor.digest
            _, self._documents[digest] = client.manifest_at_origin(reference.at(digest))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def size(self, digest: Digest) -> int | None:
        document = self._documents.get(digest)
        if document is not None:
            return len(document)
        return self._client.has_blob(self._reference, digest)

    def open(self, digest: Digest) -> BinaryIO:
        document = self._documents.get(digest)
        if document is not None:
            return io.BytesIO(document)
        pieces = self._open.enter_context(self._client.read_blob(self._reference, digest, None))
        return stream_of(pieces)

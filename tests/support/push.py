"""Images made in memory, brought into a real registry."""

import json
from functools import partial
from typing import Any

from policies.reference import Digest, ImageReference
from runner.registry.auth import Anonymous, Credentials
from runner.registry.client import RegistryClient
from runner.registry.image import INDEX_TYPES
from runner.settings import Settings
from runner.verify import StagedImage


def push(
    settings: Settings, name: str, image: StagedImage, credentials: Credentials | None = None
) -> str:
    """Every blob and every manifest of ``image``, which ends as ``name`` with its tag.

    Returns:
        ``name`` again.
    """
    reference = ImageReference.parse(name)
    with RegistryClient(settings, credentials or Anonymous()) as client:
        _push_document(client, reference, image, image.root.digest, image.root.media_type)
    return name


def manifest_of(image: StagedImage) -> dict[str, Any]:
    """The root as a document."""
    document: dict[str, Any] = json.loads(_bytes(image, image.root.digest))
    return document


def layers_of(image: StagedImage) -> list[str]:
    """Digests, from the lowest."""
    return [layer["digest"] for layer in manifest_of(image)["layers"]]


def _push_document(
    client: RegistryClient,
    reference: ImageReference,
    image: StagedImage,
    digest: Digest,
    media_type: str,
) -> None:
    data = _bytes(image, digest)
    document = json.loads(data)
    if media_type in INDEX_TYPES:
        for entry in document["manifests"]:
            entry_digest = Digest(entry["digest"])
            if image.blobs.size(entry_digest) is None:
                continue  # the tests' index may name what nobody has
            own = reference.at(entry_digest)
            _push_document(client, own, image, entry_digest, entry["mediaType"])
    else:
        for blob in (document["config"], *document["layers"]):
            blob_digest = Digest(blob["digest"])
            size = image.blobs.size(blob_digest)
            assert size is not None
            client.push_blob(reference, blob_digest, size, partial(image.blobs.open, blob_digest))
    client.put_manifest(reference, media_type, data)


def _bytes(image: StagedImage, digest: Digest) -> bytes:
    with image.blobs.open(digest) as stream:
        return stream.read()

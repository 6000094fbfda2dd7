"""What the registry endpoint has to know of a manifest before it takes it.

Two readers of the same hostile JSON: one for images as builders push them, one for everything
that the image specification allows, for an endpoint that stands alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from policies.reference import Digest
from runner.errors import VerificationFailed
from runner.registry import strictjson
from runner.registry.image import (
    FOREIGN_WORDS,
    INDEX_TYPES,
    MANIFEST_BYTES,
    MANIFEST_TYPES,
    Index,
    parse_document,
)
from runner.registry.strictjson import JsonObject

VERSION = 2


@dataclass(frozen=True, slots=True)
class Referrer:
    """What a manifest says of another one; for the list of that one's referrers."""

    subject: Digest
    artifact_type: str
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Document:
    """Attributes:
    children: What has to be there before it.
    """

    children: tuple[Digest, ...]
    referrer: Referrer | None = None


def read_image(data: bytes, media_type: str) -> Document:
    """An image, or an index of images, that the verifier could take.

    Raises:
        VerificationFailed: It is none, or is about another one.
    """
    parsed = parse_document(data, media_type)
    if parsed.subject is not None:
        raise VerificationFailed("referrers are not taken from a sandbox", rule="subject")
    described = (
        [entry.descriptor for entry in parsed.manifests]
        if isinstance(parsed, Index)
        else [parsed.config, *parsed.layers]
    )
    return Document(tuple(child.digest for child in described))


def read_artifact(data: bytes, media_type: str) -> Document:
    """Any manifest or index of the image specification, whatever it describes.

    Raises:
        VerificationFailed: It is none.
    """
    if media_type not in MANIFEST_TYPES + INDEX_TYPES:
        raise VerificationFailed(f"{ascii(media_type)[:200]} is no manifest", rule="media-type")
    document = strictjson.parse(data, most_bytes=MANIFEST_BYTES)
    if document.integer("schemaVersion") != VERSION:
        raise VerificationFailed("schemaVersion is not 2", rule="schema-version")
    if "mediaType" in document and document.text("mediaType") != media_type:
        raise VerificationFailed(f"a {media_type} that calls itself otherwise", rule="media-type")
    is_index = media_type in INDEX_TYPES
    for name in ("config", "layers", "fsLayers") if is_index else ("manifests", "fsLayers"):
        if name in document:
            raise VerificationFailed(f"{name} in a {media_type}", rule="media-type-confusion")
    described = [*document.children("manifests" if is_index else "layers")]
    if not is_index:
        described.append(document.child("config"))
    return Document(tuple(_here(described)), _referrer(document))


def _here(described: list[JsonObject]) -> Iterator[Digest]:
    for descriptor in described:
        digest = descriptor.digest("digest")
        if not any(word in descriptor.text("mediaType") for word in FOREIGN_WORDS):
            yield digest


def _referrer(document: JsonObject) -> Referrer | None:
    if not document.given("subject"):
        return None
    kind = document.text("artifactType") if document.given("artifactType") else ""
    if not kind and "config" in document:
        kind = document.child("config").text("mediaType")
    annotations = document.texts("annotations") if document.given("annotations") else {}
    return Referrer(document.child("subject").digest("digest"), kind, annotations)

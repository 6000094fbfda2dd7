"""Base images as documents: what was resolved, of which parts it consists, what it brings along."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from builder.bases import BaseImage
from policies.facts import BuildFacts, DockerfileFacts
from policies.reference import Digest, ImageReference
from runner.errors import RunnerError, VerificationFailed
from runner.gateway.upstream import Upstream
from runner.hashed import hashed_chunks
from runner.registry.image import (
    CONFIG_BYTES,
    Config,
    Descriptor,
    Manifest,
    Platform,
    parse_base,
    parse_config,
    parse_document,
    parse_manifest,
)
from runner.request import StartsFrom
from runner.stores.blobs import BlobSource
from runner.verify import VerifiedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseParts:
    """One resolved image for one platform.

    Attributes:
        image: Whose repository has to deliver the blobs.
        root: What the name was resolved to: the manifest, or the index that lists it.
        manifest: Of the platform's image.
        documents: Bytes of both.
    """

    image: ImageReference
    root: Descriptor
    manifest: Descriptor
    parsed: Manifest
    documents: Mapping[Digest, bytes]

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """The configuration, and the layers from the lowest."""
        return (self.parsed.config, *self.parsed.layers)


def parts(image: ImageReference, upstream: Upstream, platform: Platform) -> list[BaseParts]:
    """The images that a builder for ``platform`` may take; one, but for strange indexes.

    Raises:
        RunnerError: The image cannot be resolved, or its documents are not sound.
    """
    descriptor, data = upstream.resolve(image)
    document = parse_document(data, descriptor.media_type)
    if isinstance(document, Manifest):
        return [
            BaseParts(
                image=image,
                root=descriptor,
                manifest=descriptor,
                parsed=document,
                documents={descriptor.digest: data},
            )
        ]
    # An entry that names no platform is taken where no other suits.
    entries = [
        entry.descriptor
        for entry in document.manifests
        if entry.platform is None or entry.platform.agrees_with(platform)
    ]
    return [_entry(image, descriptor, data, entry, upstream) for entry in entries]


def _entry(
    image: ImageReference, root: Descriptor, index: bytes, entry: Descriptor, upstream: Upstream
) -> BaseParts:
    own = image.at(entry.digest)
    _, data = upstream.resolve(own)
    return BaseParts(
        image=own,
        root=root,
        manifest=entry,
        parsed=parse_manifest(data, entry.media_type),
        documents={root.digest: index, entry.digest: data},
    )


def read_config(found: BaseParts, upstream: Upstream) -> Config:
    """The image's configuration. Raises RunnerError where it is none."""
    return parse_config(_bytes(found.parsed.config, upstream))


def _bytes(descriptor: Descriptor, upstream: Upstream) -> bytes:
    stream, _ = upstream.open_blob(descriptor.digest)
    with stream:
        return stream.read(CONFIG_BYTES + 1)


def started_from(dockerfile: DockerfileFacts, target: str | None) -> ImageReference | None:
    """The image that the stage which is built begins with, by whatever stages in between.

    None for ``scratch``, and where nobody can tell.
    """
    if not dockerfile.stages or any("stages" in unknown.facts for unknown in dockerfile.unknown):
        return None
    named = {stage.name: number for number, stage in enumerate(dockerfile.stages) if stage.name}
    number = len(dockerfile.stages) - 1
    if target is not None:
        number = named.get(target.lower(), int(target) if target.isdigit() else number)
    while 0 <= number < len(dockerfile.stages):
        stage = dockerfile.stages[number]
        if stage.image is not None:
            return stage.image
        before = {name: n for name, n in named.items() if n < number}
        number = before.get(stage.base.lower(), -1)
    return None


def begins_with(
    image: VerifiedImage, base: ImageReference, upstream: Upstream, platform: Platform
) -> StartsFrom | None:
    """The statement that all layers of ``base`` are the lowest ones of ``image``, if they are.

    Raises:
        RunnerError: The base image cannot be resolved any more.
    """
    for found in parts(base.pulled(), upstream, platform):
        lowest = tuple(layer.digest for layer in found.parsed.layers)
        if image.begins_with(lowest):
            return StartsFrom(image=str(base), digest=found.root.digest, layers=len(lowest))
    return None


class WithDocuments:
    """The manifests of a base image, and all blobs of where they were fetched, as one source."""

    def __init__(self, base: BaseParts, blobs: BlobSource) -> None:
        self._documents = base.documents
        self._blobs = blobs

    def size(self, digest: Digest) -> int | None:
        document = self._documents.get(digest)
        return len(document) if document is not None else self._blobs.size(digest)

    def open(self, digest: Digest) -> BinaryIO:
        document = self._documents.get(digest)
        return io.BytesIO(document) if document is not None else self._blobs.open(digest)


def is_sound(blob: Descriptor, source: BlobSource) -> bool:
    """Whether the blob has the bytes that its digest stands for."""
    try:
        for _ in hashed_chunks(source, blob):
            pass
    except VerificationFailed:
        return False
    return True


# -- what they bring along ---------------------------------------------------------------------


def read_bases(facts: BuildFacts, upstream: Upstream) -> dict[ImageReference, BaseImage | None]:
    """What every stage's base image, all resolved by now, brings along; None where nobody can tell.

    A registry may answer what it likes: whatever cannot be read soundly is not known.
    """
    platform = Platform.parse(facts.request.platform)
    images = dict.fromkeys(s.image for s in facts.dockerfile.stages if s.image is not None)
    return {image: _base_image(image, upstream, platform) for image in images}


def _base_image(image: ImageReference, upstream: Upstream, platform: Platform) -> BaseImage | None:
    try:
        found = [
            parse_base(_bytes(each.parsed.config, upstream))
            for each in parts(image.pulled(), upstream, platform)
        ]
    except RunnerError:
        return None
    # Where several entries suit, the builder's choice is not known before it chooses.
    return found[0] if len(set(_comparable(found))) == 1 else None


def _comparable(bases: list[BaseImage]) -> Iterator[tuple[object, ...]]:
    return ((tuple(base.environment.items()), base.triggers) for base in bases)

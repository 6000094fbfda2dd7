"""Puts a verified image where it was asked for. The tag moves last, or not at all.

Everything is named by digest until the last step, so a run that was cut off leaves nothing that
anybody finds by tag, and the next run uploads only what is still missing.
"""

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import InitVar, dataclass
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Final

from policies.errors import InvalidReference, PolicyDenied
from policies.reference import Digest, ImageReference
from runner.errors import (
    Cancelled,
    ImageNotFound,
    ReadBackDiffers,
    RegistryProtocol,
    VerificationFailed,
)
from runner.registry.client import RegistryClient
from runner.registry.image import Descriptor

if TYPE_CHECKING:
    from runner.verify import VerifiedImage

_SIDE_BY_SIDE = 4
_SIGNATURE_TAG = re.compile(r"sha(?:256|512)-.*", re.IGNORECASE | re.DOTALL)
"""cosign's signatures, attestations and SBOMs, and the referrers tag of OCI distribution 1.1."""
_BY_PUBLISH: Final = object()


@dataclass(frozen=True, slots=True)
class BlobProgress:
    """A blob is there as far as ``sent_bytes``; ``present`` where nothing had to be sent."""

    digest: Digest
    sent_bytes: int
    size_bytes: int
    present: bool = False


@dataclass(frozen=True, slots=True)
class ManifestPushed:
    """A manifest or index is at the destination under its digest."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class TagMoved:
    """The destination's tag names the image."""

    destination: ImageReference
    digest: Digest


PublishEvent = BlobProgress | ManifestPushed | TagMoved


@dataclass(frozen=True, slots=True)
class PublishedImage:
    """An image that was read back from its destination. Only ``publish`` makes one.

    Attributes:
        destination: As asked for, with its tag.
        digest: Of the manifest or index there.
        size_bytes: Of all documents and blobs together.
    """

    destination: ImageReference
    digest: Digest
    size_bytes: int
    made_by: InitVar[object]

    def __post_init__(self, made_by: object) -> None:
        if made_by is not _BY_PUBLISH:
            raise TypeError("only publish() makes a PublishedImage")


def check_destination(destination: ImageReference) -> None:
    """Whether anything may be published under this name; known before anything is built.

    Raises:
        InvalidReference: It has neither tag nor digest.
        PolicyDenied: Its tag is where clients look for signatures and attestations.
    """
    if destination.tag is None and destination.digest is None:
        raise InvalidReference(f"destination {destination} has no tag")
    if destination.tag is not None and _SIGNATURE_TAG.fullmatch(destination.tag):
        raise PolicyDenied(
            f"destination looks like a signature or attestation: {destination}",
            advice="Tags that start with sha256- or sha512- are kept for signatures.",
        )


def publish(
    image: "VerifiedImage",
    destination: ImageReference,
    client: RegistryClient,
    *,
    report: Callable[[PublishEvent], None] = lambda _: None,
) -> PublishedImage:
    """Uploads what is missing, reads everything back, and then moves the tag.

    Args:
        image: What to publish.
        destination: Where; a digest in it must be the image's.
        client: With a login that may push there.
        report: Told of every step, by one thread at a time. What it raises ends the publishing.

    Raises:
        PolicyDenied: See ``check_destination``.
        VerificationFailed: The destination names another digest, or a blob changed on disk.
        ReadBackDiffers: The registry does not give back what was pushed.
        RegistryError: The registry fails otherwise. The tag is where it was.
    """
    check_destination(destination)
    root = image.root
    if destination.digest not in {None, root.digest}:
        raise VerificationFailed(
            f"{destination} is asked for, but the image is {root.digest}", rule="destination-digest"
        )
    _push_blobs(image, destination, client, _one_at_a_time(report))
    for digest in _children_first(image.documents):
        data, media_type = image.documents[digest], image.media_types[digest]
        client.put_manifest(destination.at(digest), media_type, data)
        _check_document(client, destination.at(digest), media_type, data)
        report(ManifestPushed(digest))
    for blob in image.blobs_needed:
        if client.has_blob(destination, blob.digest) != blob.size:
            raise ReadBackDiffers(f"{destination.name} does not have {blob.digest} as pushed")
    if destination.tag is not None:
        tagged = ImageReference(destination.host, destination.repository, destination.tag)
        _move_tag(client, tagged, image)
        report(TagMoved(tagged, root.digest))
    return PublishedImage(destination, root.digest, image.size_bytes, _BY_PUBLISH)


def _push_blobs(
    image: "VerifiedImage",
    destination: ImageReference,
    client: RegistryClient,
    report: Callable[[PublishEvent], None],
) -> None:
    stop = threading.Event()

    def push(blob: Descriptor) -> None:
        def progress(sent: int) -> None:
            if stop.is_set():
                raise Cancelled("another upload failed")
            report(BlobProgress(blob.digest, sent, blob.size))

        if stop.is_set():
            return
        if client.has_blob(destination, blob.digest) == blob.size:
            report(BlobProgress(blob.digest, blob.size, blob.size, present=True))
            return
        client.push_blob(
            destination, blob.digest, blob.size, lambda: image.source.open(blob.digest), progress
        )

    with ThreadPoolExecutor(_SIDE_BY_SIDE, thread_name_prefix="publish") as threads:
        try:
            pushes = [threads.submit(push, blob) for blob in image.blobs_needed]
            done, _ = wait(pushes, return_when=FIRST_EXCEPTION)
        finally:
            # Uploads that still run, after a failure or Ctrl-C, see this at their next piece.
            stop.set()
    for push_done in done:
        push_done.result()


def _children_first(documents: Mapping[Digest, bytes]) -> tuple[Digest, ...]:
    """The documents, each after those that it names: registries refuse an index before them."""
    names = {
        digest: {other for other in documents if other != digest and other.encode() in data}
        for digest, data in documents.items()
    }
    return tuple(TopologicalSorter(names).static_order())


def _check_document(
    client: RegistryClient, reference: ImageReference, media_type: str, data: bytes
) -> None:
    try:
        descriptor, found = client.manifest_at_origin(reference)
    except (ImageNotFound, RegistryProtocol) as error:
        raise ReadBackDiffers(f"{reference} cannot be read back: {error.message}") from error
    if found != data or descriptor.media_type != media_type:
        raise ReadBackDiffers(f"{reference} is not what was pushed")


def _move_tag(client: RegistryClient, tagged: ImageReference, image: "VerifiedImage") -> None:
    root = image.root
    client.put_manifest(tagged, root.media_type, image.documents[root.digest])
    found, _ = client.manifest_at_origin(tagged)
    if found.digest != root.digest:
        raise ReadBackDiffers(
            f"{tagged} was moved to {root.digest} and names {found.digest} now",
            advice=f"Somebody else pushed at the same moment; {tagged.at(root.digest)} is ours.",
        )


def _one_at_a_time(report: Callable[[PublishEvent], None]) -> Callable[[PublishEvent], None]:
    lock = threading.Lock()

    def locked(event: PublishEvent) -> None:
        with lock:
            report(event)

    return locked

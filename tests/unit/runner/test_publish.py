import dataclasses
import io
import json
import threading
from collections.abc import Callable
from typing import BinaryIO, cast

import pytest

from policies.reference import Digest, ImageReference
from runner import verify
from runner.errors import (
    ImageNotFound,
    InvalidReference,
    PolicyDenied,
    ReadBackDiffers,
    RegistryProtocol,
    RegistryUnreachable,
    RunnerError,
    VerificationFailed,
)
from runner.layers import Special
from runner.publish import (
    BlobProgress,
    ManifestPushed,
    PublishedImage,
    PublishEvent,
    TagMoved,
    check_destination,
    publish,
)
from runner.registry.client import RegistryClient
from runner.registry.image import OCI_INDEX, OCI_MANIFEST, Descriptor
from runner.verify import VerifiedImage

DESTINATION = ImageReference("r.example", "acme/app", "1")
BLOBS = tuple(f"blob {number}".encode() * 100 for number in range(6))


class Blobs:
    def size(self, digest: Digest) -> int | None:
        return next((len(b) for b in BLOBS if Digest.of(b) == digest), None)

    def open(self, digest: Digest) -> BinaryIO:
        return io.BytesIO(next(b for b in BLOBS if Digest.of(b) == digest))


def image_of(*children: bytes) -> VerifiedImage:
    """An index over ``children``, each a manifest; the bytes of blobs are not looked at here."""
    root = json.dumps({"manifests": [str(Digest.of(child)) for child in children]}).encode()
    documents = {Digest.of(data): data for data in (root, *children)}
    types = dict.fromkeys(documents, OCI_MANIFEST) | {Digest.of(root): OCI_INDEX}
    return VerifiedImage(
        root=Descriptor(OCI_INDEX, Digest.of(root), len(root)),
        documents=documents,
        media_types=types,
        blobs_needed=tuple(Descriptor("x/y", Digest.of(b), len(b)) for b in BLOBS),
        source=Blobs(),
        platforms=(),
        special=Special.NOTHING,
        key=verify._KEY,
    )


IMAGE = image_of(b'{"a": 1}', b'{"b": 2}')


class FakeRegistry:
    """Keeps what it gets, and a log of it. Faults are set by overriding a method's result."""

    def __init__(self) -> None:
        self.blobs: dict[Digest, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.log: list[str] = []
        self.pushing = 0
        self.most_pushing = 0
        self.before_push: Callable[[Digest], None] = lambda _: None
        self.lock = threading.Lock()

    @property
    def client(self) -> RegistryClient:
        return cast("RegistryClient", self)

    def has_blob(self, reference: ImageReference, digest: Digest) -> int | None:
        found = self.blobs.get(digest)
        return None if found is None else len(found)

    def push_blob(
        self,
        reference: ImageReference,
        digest: Digest,
        size: int,
        open_blob: Callable[[], BinaryIO],
        progress: Callable[[int], None],
    ) -> None:
        with self.lock:
            self.log.append(f"blob {digest}")
            self.pushing += 1
            self.most_pushing = max(self.most_pushing, self.pushing)
        try:
            self.before_push(digest)
            with open_blob() as stream:
                data = stream.read()
            progress(size // 2)
            progress(size)
        finally:
            with self.lock:
                self.pushing -= 1
        self.blobs[digest] = data

    def put_manifest(self, reference: ImageReference, media_type: str, data: bytes) -> None:
        name = str(reference.digest or reference.tag)
        self.log.append(f"manifest {name}")
        self.manifests[name] = media_type, data

    def manifest_at_origin(self, reference: ImageReference) -> tuple[Descriptor, bytes]:
        name = str(reference.digest or reference.tag)
        if name not in self.manifests:
            raise ImageNotFound(name)
        media_type, data = self.manifests[name]
        return Descriptor(media_type, Digest.of(data), len(data)), data


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


def test_everything_arrives_and_the_tag_moves_last(registry: FakeRegistry) -> None:
    published = publish(IMAGE, DESTINATION, registry.client)
    assert set(registry.blobs.values()) == set(BLOBS)
    first, second = (d for d in IMAGE.documents if d != IMAGE.root.digest)
    assert set(registry.log[6:8]) == {f"manifest {first}", f"manifest {second}"}
    assert registry.log[8:] == [f"manifest {IMAGE.root.digest}", "manifest 1"]
    assert registry.manifests["1"] == (OCI_INDEX, IMAGE.documents[IMAGE.root.digest])
    size = sum(map(len, BLOBS)) + sum(map(len, IMAGE.documents.values()))
    assert (published.destination, published.digest, published.size_bytes) == (
        DESTINATION,
        IMAGE.root.digest,
        size,
    )


def test_publishing_again_sends_no_blob(registry: FakeRegistry) -> None:
    publish(IMAGE, DESTINATION, registry.client)
    registry.log.clear()
    events: list[PublishEvent] = []
    publish(IMAGE, DESTINATION, registry.client, report=events.append)
    assert not [line for line in registry.log if line.startswith("blob")]
    blobs = [event for event in events if isinstance(event, BlobProgress)]
    assert all(event.present and event.sent_bytes == event.size_bytes for event in blobs)
    assert len(blobs) == len(BLOBS)


def test_every_step_is_reported(registry: FakeRegistry) -> None:
    events: list[PublishEvent] = []
    publish(IMAGE, DESTINATION, registry.client, report=events.append)
    assert events[-2:] == [
        ManifestPushed(IMAGE.root.digest),
        TagMoved(DESTINATION, IMAGE.root.digest),
    ]
    finished = {
        event.digest
        for event in events
        if isinstance(event, BlobProgress) and event.sent_bytes == event.size_bytes
    }
    assert finished == {Digest.of(b) for b in BLOBS}


def test_blobs_go_side_by_side(registry: FakeRegistry) -> None:
    together = threading.Barrier(3, timeout=5)
    registry.before_push = lambda _: (together.wait(), None)[1]
    publish(IMAGE, DESTINATION, registry.client)
    assert 3 <= registry.most_pushing <= 4


def test_a_destination_by_digest_needs_no_tag(registry: FakeRegistry) -> None:
    published = publish(IMAGE, DESTINATION.at(IMAGE.root.digest), registry.client)
    assert published.destination.tag is None
    assert registry.log[-1] == f"manifest {IMAGE.root.digest}"


def test_a_destination_of_another_digest_is_refused(registry: FakeRegistry) -> None:
    with pytest.raises(VerificationFailed, match="destination-digest"):
        publish(IMAGE, DESTINATION.at(Digest.of(b"other")), registry.client)
    assert not registry.log


def test_one_failed_blob_ends_the_others_and_leaves_the_tag(registry: FakeRegistry) -> None:
    bad = IMAGE.blobs_needed[0].digest
    failed = threading.Event()

    def fail_one(digest: Digest) -> None:
        if digest == bad:
            failed.set()
            raise RegistryUnreachable("gone")
        failed.wait(5)

    registry.before_push = fail_one
    with pytest.raises(RegistryUnreachable):
        publish(IMAGE, DESTINATION, registry.client)
    assert not registry.manifests
    assert registry.pushing == 0


def test_uploads_that_run_are_ended_when_another_fails(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = IMAGE.blobs_needed[0].digest
    original, endless = registry.push_blob, threading.Event()

    def push(
        reference: ImageReference,
        digest: Digest,
        size: int,
        open_blob: Callable[[], BinaryIO],
        progress: Callable[[int], None],
    ) -> None:
        if digest == bad:
            raise RegistryUnreachable("gone")
        for _ in range(5000):
            progress(1)
            endless.wait(0.001)
        original(reference, digest, size, open_blob, progress)

    monkeypatch.setattr(registry, "push_blob", push)
    with pytest.raises(RegistryUnreachable):
        publish(IMAGE, DESTINATION, registry.client)
    assert not registry.blobs


def test_what_report_raises_ends_the_publishing(registry: FakeRegistry) -> None:
    def report(_: PublishEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(IMAGE, DESTINATION, registry.client, report=report)
    assert not registry.manifests


def test_the_tag_does_not_move_when_a_blob_is_missing(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "push_blob", lambda *_: None)
    with pytest.raises(ReadBackDiffers, match="does not have"):
        publish(IMAGE, DESTINATION, registry.client)
    assert "1" not in registry.manifests


def test_a_blob_of_another_size_is_sent_again(registry: FakeRegistry) -> None:
    registry.blobs[IMAGE.blobs_needed[2].digest] = b"half"
    publish(IMAGE, DESTINATION, registry.client)
    assert set(registry.blobs.values()) == set(BLOBS)


def liar(error: RunnerError | None, data: bytes, media_type: str) -> Callable[..., object]:
    def answer(reference: ImageReference) -> tuple[Descriptor, bytes]:
        if error:
            raise error
        return Descriptor(media_type, Digest.of(data), len(data)), data

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        liar(ImageNotFound("x"), b"", ""),
        liar(RegistryProtocol("x"), b"", ""),
        liar(None, b"other", OCI_MANIFEST),
        liar(None, b'{"a": 1}', OCI_INDEX),
    ],
)
def test_the_tag_does_not_move_when_a_manifest_reads_back_differently(
    answer: Callable[..., object], registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "manifest_at_origin", answer)
    with pytest.raises(ReadBackDiffers):
        publish(image_of(b'{"a": 1}'), DESTINATION, registry.client)
    assert "1" not in registry.manifests


def test_a_tag_that_somebody_else_moved_is_noticed(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = registry.put_manifest

    def race(reference: ImageReference, media_type: str, data: bytes) -> None:
        original(reference, media_type, data if reference.digest else b"theirs")

    monkeypatch.setattr(registry, "put_manifest", race)
    with pytest.raises(ReadBackDiffers, match="was moved") as caught:
        publish(IMAGE, DESTINATION, registry.client)
    assert str(IMAGE.root.digest) in caught.value.advice


HEX = "a" * 64


@pytest.mark.parametrize(
    "tag",
    [
        f"sha256-{HEX}",
        f"sha256-{HEX}.sig",
        f"sha256-{HEX}.att",
        f"sha256-{HEX}.sbom",
        f"sha512-{HEX}.anything",
        "sha256-",
        "sha256-short",
        f"SHA256-{HEX}.sig",
    ],
)
def test_tags_of_signatures_are_refused(tag: str, registry: FakeRegistry) -> None:
    destination = dataclasses.replace(DESTINATION, tag=tag)
    with pytest.raises(PolicyDenied, match="looks like a signature"):
        check_destination(destination)
    with pytest.raises(PolicyDenied):
        publish(IMAGE, destination, registry.client)
    assert not registry.log


@pytest.mark.parametrize("tag", ["1", "latest", "sha256", "sha-256", "v1-sha256-x", "sha2560-x"])
def test_other_tags_are_not(tag: str) -> None:
    check_destination(dataclasses.replace(DESTINATION, tag=tag))


def test_a_destination_without_tag_and_digest_is_refused() -> None:
    with pytest.raises(InvalidReference, match="no tag"):
        check_destination(dataclasses.replace(DESTINATION, tag=None))


def test_only_publish_makes_a_published_image(registry: FakeRegistry) -> None:
    with pytest.raises(TypeError):
        PublishedImage(DESTINATION, IMAGE.root.digest, 1, object())
    published = publish(IMAGE, DESTINATION, registry.client)
    with pytest.raises(TypeError):
        dataclasses.replace(published, digest=Digest.of(b"other"), made_by=None)

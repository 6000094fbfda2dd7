"""An OCI layout in the place of a registry."""

import json
from pathlib import Path

import pytest

from policies.reference import Digest, ImageReference
from runner.errors import ImageNotFound, LayoutInvalid
from runner.registry.image import OCI_INDEX, OCI_MANIFEST
from runner.registry.layout import NAME, LayoutClient, LayoutDirectory
from runner.stores.blobs import BlobStore

IMAGE = ImageReference("layout.invalid", "builder", "latest")
MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST}).encode()


def layout(directory: Path, *manifests: bytes) -> LayoutClient:
    store = BlobStore(directory)
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": store.add(data), "size": len(data)}
        for data in manifests
    ]
    index = {"schemaVersion": 2, "manifests": entries}
    (directory / "index.json").write_text(json.dumps(index))
    return LayoutClient(LayoutDirectory(directory))


def test_the_only_image_is_found_by_any_name(tmp_path: Path) -> None:
    descriptor, data = layout(tmp_path, MANIFEST).manifest(IMAGE)
    assert (descriptor.media_type, descriptor.digest, data) == (
        OCI_MANIFEST,
        Digest.of(MANIFEST),
        MANIFEST,
    )


def test_a_manifest_is_found_by_digest_also_below_an_index(tmp_path: Path) -> None:
    client = layout(tmp_path, b'{"mediaType": "other"}')
    digest = BlobStore(tmp_path).add(MANIFEST)
    descriptor, data = client.manifest(IMAGE.at(digest))
    assert (descriptor.media_type, data) == (OCI_MANIFEST, MANIFEST)


@pytest.mark.parametrize(
    ("document", "media_type"), [({"config": {}}, OCI_MANIFEST), ({"manifests": []}, OCI_INDEX)]
)
def test_what_says_nothing_of_itself_is_taken_for_ocis(
    tmp_path: Path, document: dict[str, object], media_type: str
) -> None:
    client = layout(tmp_path, MANIFEST)
    digest = BlobStore(tmp_path).add(json.dumps(document).encode())
    assert client.manifest(IMAGE.at(digest))[0].media_type == media_type


def test_several_images_are_not_guessed_from(tmp_path: Path) -> None:
    with pytest.raises(ImageNotFound, match="2 images"):
        layout(tmp_path, MANIFEST, MANIFEST + b" ").manifest(IMAGE)


def test_blobs_come_in_pieces(tmp_path: Path) -> None:
    client = layout(tmp_path, MANIFEST)
    with client.read_blob(IMAGE, Digest.of(MANIFEST), None) as pieces:
        assert b"".join(pieces) == MANIFEST


@pytest.mark.parametrize("broken", [None, b"not JSON", b'{"manifests": [{"digest": "../x"}]}'])
def test_what_is_no_layout_is_refused(tmp_path: Path, broken: bytes | None) -> None:
    if broken is not None:
        (tmp_path / "index.json").write_bytes(broken)
    with pytest.raises((ImageNotFound, LayoutInvalid)):
        LayoutClient(LayoutDirectory(tmp_path)).manifest(IMAGE)


def test_a_missing_blob_is_said_to_be_missing(tmp_path: Path) -> None:
    client = layout(tmp_path, MANIFEST)
    with (
        pytest.raises(ImageNotFound),
        client.read_blob(IMAGE, Digest.of(b"other"), None) as pieces,
    ):
        next(pieces)


# -- one of several ------------------------------------------------------------------------------


def named(directory: Path, *names: str) -> Path:
    """A layout with an image for each name; two with the same name are two images."""
    store = BlobStore(directory)
    entries = []
    for number, name in enumerate(names):
        data = MANIFEST + b" " * number
        entry = {"mediaType": OCI_MANIFEST, "digest": store.add(data), "size": len(data)}
        entries.append({**entry, "annotations": {NAME: name}} if name else entry)
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    return directory


def test_an_image_is_found_by_what_the_index_calls_it(tmp_path: Path) -> None:
    files = LayoutDirectory(named(tmp_path, "11", "", "12"))
    descriptor, data = LayoutClient(files, "12").manifest(IMAGE)
    assert (descriptor.digest, data) == (Digest.of(data), MANIFEST + b"  ")


def test_a_name_that_none_or_two_have_is_refused_with_those_there_are(tmp_path: Path) -> None:
    files = LayoutDirectory(named(tmp_path, "11", "", "12", "12"))
    for name, count in (("13", 0), ("12", 2)):
        with pytest.raises(ImageNotFound, match=f"holds {count} images called {name}") as caught:
            LayoutClient(files, name).manifest(IMAGE)
        assert "(11, 12)" in caught.value.advice


@pytest.mark.parametrize("by_digest", [True, False])
def test_other_bytes_under_a_manifests_digest_are_noticed(tmp_path: Path, by_digest: bool) -> None:
    client = layout(tmp_path, MANIFEST)
    digest = Digest.of(MANIFEST)
    BlobStore(tmp_path).path(digest).chmod(0o644)
    BlobStore(tmp_path).path(digest).write_bytes(MANIFEST + b" ")
    with pytest.raises(LayoutInvalid, match="other bytes"):
        client.manifest(IMAGE.at(digest) if by_digest else IMAGE)

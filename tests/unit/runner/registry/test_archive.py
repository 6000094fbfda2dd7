"""A tar of an OCI layout is read where it lies, and holds one layout or is refused."""

import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from policies.reference import Digest, ImageReference
from runner.errors import ImageNotFound, LayoutInvalid
from runner.registry import archive
from runner.registry.archive import LayoutArchive
from runner.registry.image import OCI_MANIFEST
from runner.registry.layout import LayoutClient
from tests.support.images import entry, tar_of

IMAGE = ImageReference("r.example", "base", "1")
LAYOUT = ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST}).encode()
LAYER = bytes(range(256)) * 9001


def blob(data: bytes, before: str = "") -> tuple[str, bytes]:
    return f"{before}blobs/sha256/{Digest.of(data).hex}", data


DESCRIBED = {"mediaType": OCI_MANIFEST, "digest": Digest.of(MANIFEST), "size": len(MANIFEST)}
INDEX = ("index.json", json.dumps({"schemaVersion": 2, "manifests": [DESCRIBED]}).encode())
SOUND = (LAYOUT, INDEX, blob(MANIFEST), blob(LAYER))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image.tar"


@pytest.fixture
def client(path: Path) -> Iterator[LayoutClient]:
    path.write_bytes(tar_of(*SOUND))
    with closing(LayoutClient(LayoutArchive(path))) as client:
        yield client


def refused(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    with pytest.raises(LayoutInvalid, match=match):
        LayoutArchive(path)


def test_an_image_is_read_out_of_its_tar(client: LayoutClient) -> None:
    descriptor, data = client.manifest(IMAGE)
    assert (descriptor.digest, data) == (Digest.of(MANIFEST), MANIFEST)
    with client.read_blob(IMAGE, Digest.of(LAYER), None) as pieces:
        assert b"".join(pieces) == LAYER


def test_directories_and_a_leading_dot_belong_to_a_layout(path: Path) -> None:
    directories = ("./", "./blobs/", "blobs/sha256", "blobs/sha512/")
    data = tar_of(
        *(entry(name, tarfile.DIRTYPE) for name in directories),
        ("./oci-layout", LAYOUT[1]), ("./index.json", INDEX[1]), blob(MANIFEST, "./"),
    )  # fmt: skip
    path.write_bytes(data)
    with closing(LayoutClient(LayoutArchive(path))) as client:
        assert client.manifest(IMAGE)[1] == MANIFEST


def test_blobs_are_read_side_by_side_and_after_the_archive_was_closed(
    client: LayoutClient,
) -> None:
    found: list[bytes] = []

    def read() -> None:
        with client.read_blob(IMAGE, Digest.of(LAYER), None) as pieces:
            began.wait(10)
            found.append(b"".join(pieces))

    began = threading.Barrier(4)
    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    began.wait(10)
    client.close()
    for thread in threads:
        thread.join(10)
    assert found == [LAYER] * 3


@pytest.mark.parametrize(
    ("member", "match"),
    [
        (entry("blobs/sha256/" + "0" * 64, tarfile.SYMTYPE, "/etc/shadow"), "of type b'2'"),
        (entry("blobs/sha256/" + "0" * 64, tarfile.LNKTYPE, "index.json"), "of type b'1'"),
        (entry("blobs/sha256/" + "0" * 64, tarfile.FIFOTYPE), "of type b'6'"),
        (entry("blobs/sha256/" + "0" * 64, tarfile.CHRTYPE), "of type b'3'"),
        (entry("blobs/sha256/" + "0" * 64, tarfile.DIRTYPE), "of type b'5'"),
        (entry("blobs/sha256/" + "0" * 64, tarfile.CONTTYPE), "of type b'7'"),
        (entry("blobs", tarfile.SYMTYPE, "/etc"), "of type b'2'"),
        (entry("oci-layout/", tarfile.DIRTYPE), "of type b'5'"),
        (("blobs/sha256/" + "0" * 63, b""), "an entry b'blobs"),
        (("blobs/sha256/" + "A" * 64, b""), "an entry b'blobs"),
        (("blobs/md5/" + "0" * 32, b""), "an entry b'blobs"),
        (("blobs/sha256/../../index.json", b""), "entry-escape"),
        (("/index.json", b""), "entry-escape"),
        (("../index.json", b""), "entry-escape"),
        (("manifest.json", b"[]"), "an entry b'manifest.json'"),
        (("\x1b[31m\n", b""), r"an entry b'\\x1b\[31m\\n'"),
        (("index.json\n", b""), "an entry b'index.json"),
        (INDEX, "two entries index.json"),
        (("./index.json", b""), "two entries index.json"),
        (blob(LAYER), "two entries blobs/sha256/"),
        (("x" * 300, b""), "entry-path-length"),
    ],
)
def test_what_is_no_file_of_a_layout_is_refused(
    path: Path, member: tarfile.TarInfo | tuple[str, bytes], match: str
) -> None:
    refused(path, tar_of(*SOUND, member), match)


@pytest.mark.parametrize("missing", [LAYOUT, INDEX])
def test_a_tar_without_its_two_files_is_no_layout(path: Path, missing: tuple[str, bytes]) -> None:
    members = [member for member in SOUND if member is not missing]
    refused(path, tar_of(*members), f"no {missing[0]}")


def test_sparse_entries_are_refused(path: Path) -> None:
    info = tarfile.TarInfo(blob(b"")[0])
    info.type = tarfile.GNUTYPE_SPARSE
    refused(path, tar_of(*SOUND, info, tar_format=tarfile.GNU_FORMAT), "sparse")
    pax = tarfile.TarInfo(blob(b"")[0])
    pax.pax_headers = {"GNU.sparse.major": "1"}
    refused(path, tar_of(*SOUND, pax), "sparse")


def test_what_is_no_whole_tar_is_refused(path: Path) -> None:
    sound = tar_of(*SOUND)
    end = sound.rindex(LAYER[-256:]) + 256
    for data, match in (
        (b"", "no oci-layout"),
        (b"\x1f\x8b" + bytes(600), "tar-header"),
        (sound[: end - 700], "tar-truncated"),
        (sound[:700], "tar-truncated"),
        (sound + b"more", "tar-trailing"),
    ):
        refused(path, data, match)


def test_a_size_that_no_file_can_have_is_refused(path: Path) -> None:
    info = tarfile.TarInfo(blob(LAYER)[0])
    info.size = 1 << 62
    header = info.tobuf(tarfile.GNU_FORMAT)
    refused(path, tar_of(LAYOUT, INDEX)[:2048] + header, "tar-truncated")


def test_the_number_of_entries_and_bytes_is_bounded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "ENTRIES", len(SOUND))
    refused(path, tar_of(*SOUND, entry("blobs/", tarfile.DIRTYPE)), "entry-count")
    monkeypatch.setattr(archive, "BYTES", 1000)
    refused(path, tar_of(*SOUND), "more than 1000 bytes")


def test_an_archive_that_is_no_file_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", Path("/dev/zero")):
        with pytest.raises(ImageNotFound):
            LayoutArchive(path)


def test_a_blob_that_is_not_there_is_missing(client: LayoutClient) -> None:
    with (
        pytest.raises(ImageNotFound, match="has no blobs/sha256/"),
        client.read_blob(IMAGE, Digest.of(b"other"), None),
    ):
        pass


def test_a_blob_ends_where_its_entry_ends(path: Path) -> None:
    path.write_bytes(tar_of(*SOUND))
    with closing(LayoutArchive(path)) as files:
        assert files.open("oci-layout").read() == LAYOUT[1]
        with files.open("index.json") as stream:
            assert stream.read(10) + stream.read() == INDEX[1]
            assert stream.read() == b""


def test_a_tar_that_shrinks_later_gives_fewer_bytes(path: Path) -> None:
    path.write_bytes(tar_of(*SOUND))
    with closing(LayoutArchive(path)) as files, files.open(blob(LAYER)[0]) as stream:
        with path.open("r+b") as file:
            file.truncate(8192)
        assert len(stream.read()) < len(LAYER)

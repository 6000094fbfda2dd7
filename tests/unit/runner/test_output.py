"""Outputs are whole, deterministic, and never overwrite anything."""

import errno
import json
import os
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest

from policies.model import Limits
from policies.reference import Digest, ImageReference
from runner.errors import DiskExceeded, OutputInvalid, RunnerError, VerificationFailed
from runner.output import Output, write_output
from runner.registry.archive import LayoutArchive
from runner.registry.layout import LayoutClient
from runner.verify import StagedImage, VerifiedImage, verify
from tests.support.images import MemoryBlobs, make_image, make_index

REFERENCE = ImageReference.parse("localhost:5000/acme/app:1.2")


def verified(staged: StagedImage) -> VerifiedImage:
    return verify(staged, limits=Limits(), platform=None, claimed=None)


def read_layout(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        return {name: file.read() for name, file in files.items() if file}


@pytest.mark.parametrize("docker", [False, True])
def test_a_layout_has_every_blob_under_its_digest(tmp_path: Path, docker: bool) -> None:
    image = verified(make_index(("linux", "amd64", None), ("linux", "arm64", "v8"), docker=docker))
    write_output(image, Output.parse(f"oci:{tmp_path}/out"), REFERENCE)
    files = read_layout(tmp_path / "out")
    assert json.loads(files.pop("oci-layout")) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads(files.pop("index.json"))["manifests"]
    assert entry == {
        "mediaType": image.root.media_type,
        "digest": str(image.root.digest),
        "size": image.root.size,
        "annotations": {
            "org.opencontainers.image.ref.name": "1.2",
            "io.containerd.image.name": "localhost:5000/acme/app:1.2",
        },
    }
    assert set(files) == {
        f"blobs/sha256/{digest.hex}"
        for digest in (*image.documents, *(d.digest for d in image.blobs_needed))
    }
    assert all(name.endswith(Digest.of(data).hex) for name, data in files.items())


def test_a_tar_is_the_layout_with_dockers_manifest(tmp_path: Path) -> None:
    image = verified(make_image())
    write_output(image, Output.parse(f"oci:{tmp_path}/out"), REFERENCE)
    write_output(image, Output.parse(f"tar:{tmp_path}/out.tar"), REFERENCE)
    files = read_tar(tmp_path / "out.tar")
    (entry,) = json.loads(files.pop("manifest.json"))
    assert files == read_layout(tmp_path / "out")
    config, *layers = (f"blobs/sha256/{d.digest.hex}" for d in image.blobs_needed)
    assert entry == {
        "Config": config,
        "Layers": layers,
        "RepoTags": ["localhost:5000/acme/app:1.2"],
    }


@pytest.mark.parametrize("reference", [None, ImageReference.parse("localhost:5000/acme/app")])
def test_without_a_tag_none_is_written(tmp_path: Path, reference: ImageReference | None) -> None:
    write_output(verified(make_image()), Output.parse(f"tar:{tmp_path}/out.tar"), reference)
    files = read_tar(tmp_path / "out.tar")
    assert json.loads(files["manifest.json"])[0]["RepoTags"] is None
    assert b"ref.name" not in files["index.json"]


def test_the_same_image_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_output(verified(make_image()), Output.parse(f"tar:{tmp_path}/{name}"), REFERENCE)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_an_empty_directory_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_output(verified(make_image()), Output.parse(f"oci:{tmp_path}/out"), None)
    assert (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("text", ["", "oci", "oci:", "tar:", "docker:x", "/tmp/x", "tar:a\0b"])
def test_an_output_is_a_kind_and_a_path(text: str) -> None:
    with pytest.raises(OutputInvalid):
        Output.parse(text)


def _full_directory(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("mine")


def _file(path: Path) -> None:
    path.write_text("mine")


def _link_to_a_directory(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to("elsewhere")


def _dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


IN_THE_WAY = [
    ("oci", _full_directory),
    ("oci", _file),
    ("oci", _link_to_a_directory),
    ("oci", _dangling_link),
    ("tar", _file),
    ("tar", _full_directory),
    ("tar", Path.mkdir),
    ("tar", _dangling_link),
    ("tar", _fifo),
]


@pytest.mark.parametrize(("kind", "put"), IN_THE_WAY)
def test_what_is_there_stays_there(tmp_path: Path, kind: str, put: Any) -> None:
    put(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputInvalid):
        Output.parse(f"{kind}:{tmp_path}/out")
    with pytest.raises(OutputInvalid):
        write_output(verified(make_image()), Output(kind, tmp_path / "out"), None)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "put"), [row for row in IN_THE_WAY if row[1] is not _link_to_a_directory]
)
def test_what_comes_while_it_is_written_stays_there_too(
    tmp_path: Path, kind: str, put: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Output, "check", lambda self: None)
    with pytest.raises(OutputInvalid, match="exists already"):
        write_output(verified(make_image()), Output(kind, tmp_path / "out"), None)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["oci", "tar"])
def test_the_directory_around_it_must_be_there(tmp_path: Path, kind: str) -> None:
    with pytest.raises(OutputInvalid, match="no directory"):
        Output.parse(f"{kind}:{tmp_path}/missing/out")


def test_the_directory_around_it_must_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OutputInvalid, match="not writable"):
        Output.parse(f"tar:{tmp_path}/out")


@pytest.mark.parametrize("kind", ["oci", "tar"])
@pytest.mark.parametrize(
    ("number", "kind_of_error"),
    [
        (errno.ENOSPC, DiskExceeded),
        (errno.EDQUOT, DiskExceeded),
        (errno.EFBIG, DiskExceeded),
        (errno.EIO, OutputInvalid),
    ],
)
def test_a_failing_disk_leaves_nothing(
    tmp_path: Path,
    kind: str,
    number: int,
    kind_of_error: type[RunnerError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: int) -> NoReturn:
        raise OSError(number, os.strerror(number))

    image = verified(make_image())
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind_of_error):
        write_output(image, Output.parse(f"{kind}:{tmp_path}/out"), None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["oci", "tar"])
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda data: bytes(len(data)), "blob-digest"),
        (lambda data: data + b"x", "blob-size"),
        (lambda data: data[1:], "blob-size"),
    ],
)
def test_a_blob_that_changed_meanwhile_is_not_written(
    tmp_path: Path, kind: str, change: Any, rule: str
) -> None:
    blobs = MemoryBlobs()
    image = verified(make_image(blobs=blobs))
    digest = image.blobs_needed[-1].digest
    blobs.blobs[digest] = change(blobs.blobs[digest])
    with pytest.raises(VerificationFailed) as caught:
        write_output(image, Output.parse(f"{kind}:{tmp_path}/out"), None)
    assert caught.value.rule == rule
    assert not list(tmp_path.iterdir())


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        image = verified(make_image())
        write_output(image, Output.parse(f"oci:{tmp_path}/out"), None)
        write_output(image, Output.parse(f"tar:{tmp_path}/out.tar"), None)
    finally:
        os.umask(umask)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out", tmp_path / "out.tar")}
    assert modes == {"out": 0o755, "out.tar": 0o644}


def test_an_archive_of_a_layout_is_one_that_we_read_ourselves(tmp_path: Path) -> None:
    image = verified(make_image())
    write_output(image, Output.parse(f"oci-archive:{tmp_path}/out.tar"), None)
    with closing(LayoutClient(LayoutArchive(tmp_path / "out.tar"))) as client:
        found, _ = client.manifest(ImageReference("layout.invalid", "image", "1"))
    assert found.digest == image.root.digest


def test_an_output_reads_as_it_was_written(tmp_path: Path) -> None:
    assert str(Output.parse(f"tar:{tmp_path}/x")) == f"tar:{tmp_path}/x"

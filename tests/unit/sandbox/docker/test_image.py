"""A root filesystem as an engine's image: the same bytes whoever made it, and when."""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.docker.containers import DIGEST_LABEL
from sandbox.docker.image import builder_image, image_name, write_tree
from sandbox.errors import SandboxFailed
from sandbox.model import SandboxSpec
from tests.support.spoken import Asked, SpokenEngine, speaking

LABELS = {"whose": "ours"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("z/deep", "a", "m"):
        (root / name).mkdir(parents=True)
    (root / "z/deep/file").write_bytes(b"deep")
    (root / "a/run").write_bytes(b"#!/bin/sh\n")
    (root / "a/run").chmod(0o4755)
    (root / "a/again").hardlink_to(root / "a/run")
    (root / "m/link").symlink_to("/nowhere")
    (root / "m/ümlaut").touch()
    return root


@pytest.fixture
def spoken(tmp_path: Path) -> Iterator[SpokenEngine]:
    with speaking(tmp_path / "docker.sock") as engine:
        yield engine


@pytest.fixture
def planted(spec: SandboxSpec, root: Path) -> SandboxSpec:
    return replace(spec, root=root)


def written(root: Path) -> bytes:
    tar = io.BytesIO()
    write_tree(root, tar)
    return tar.getvalue()


def members(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmembers()


# -- the tar ---------------------------------------------------------------------------------------


def test_it_is_sorted_and_everything_is_roots_and_of_1970(root: Path) -> None:
    found = members(written(root))
    names = [member.name for member in found]
    assert names == [
        ".", "./a", "./a/again", "./a/run", "./m", "./m/link", "./m/ümlaut", "./z", "./z/deep",
        "./z/deep/file",
    ]  # fmt: skip
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in found} == {(0, 0, "", "", 0)}


def test_modes_links_and_contents_stay(root: Path) -> None:
    data = written(root)
    found = {member.name: member for member in members(data)}
    assert found["./a/again"].mode == 0o4755
    assert (found["./a/run"].islnk(), found["./a/run"].linkname) == (True, "./a/again")
    assert (found["./m/link"].issym(), found["./m/link"].linkname) == (True, "/nowhere")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        file = archive.extractfile("./z/deep/file")
        assert file is not None
        assert file.read() == b"deep"


def test_two_tars_are_the_same_bytes_whatever_the_clock_and_the_owner(root: Path) -> None:
    before = written(root)
    for path in root.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (12345.5, 67890.5))
        if os.geteuid() == 0:
            mode = path.lstat().st_mode & 0o7777
            os.chown(path, 1234, 5678, follow_symlinks=False)
            if not path.is_symlink():
                path.chmod(mode)  # the kernel takes setuid with the owner
    assert written(root) == before


# -- the image -------------------------------------------------------------------------------------


def test_an_image_is_named_by_its_digest() -> None:
    assert image_name(f"sha256:{'5' * 64}") == f"untrusted-runner/builder:{'5' * 64}"


def imported(spoken: SpokenEngine, spec: SandboxSpec) -> list[Asked]:
    """What arrived, where the image was asked for."""
    with spoken.client() as client:
        assert builder_image(client, spec, LABELS, spec.root.parent) == image_name(spec.root_digest)
    return spoken.saw("POST /images/create")


def test_an_image_that_is_not_there_is_imported_with_its_digest(
    spoken: SpokenEngine, planted: SandboxSpec
) -> None:
    spoken.says("POST /images/create")
    (asked,) = imported(spoken, planted)
    assert asked.body == written(planted.root)
    assert asked.query["tag"] == ["5" * 64]
    assert asked.query["changes"] == [
        'LABEL whose="ours"', f'LABEL {DIGEST_LABEL}="{planted.root_digest}"',
    ]  # fmt: skip


def known(spoken: SpokenEngine, spec: SandboxSpec, labels: dict[str, str]) -> None:
    path = f"GET /images/{image_name(spec.root_digest)}/json"
    spoken.says(path, {"Config": {"Labels": labels}})


def test_an_image_that_is_there_is_taken(spoken: SpokenEngine, spec: SandboxSpec) -> None:
    known(spoken, spec, {DIGEST_LABEL: spec.root_digest})
    assert imported(spoken, spec) == []


@pytest.mark.parametrize("labels", [{}, {DIGEST_LABEL: "sha256:6"}])
def test_an_image_of_that_name_with_another_digest_is_replaced(
    spoken: SpokenEngine, planted: SandboxSpec, labels: dict[str, str]
) -> None:
    known(spoken, planted, labels)
    spoken.says("POST /images/create")
    assert len(imported(spoken, planted)) == 1


def test_an_engine_that_takes_no_image_says_why(spoken: SpokenEngine, planted: SandboxSpec) -> None:
    spoken.says("POST /images/create", {"error": "no space left on device"})
    with pytest.raises(SandboxFailed, match="no space left"):
        imported(spoken, planted)

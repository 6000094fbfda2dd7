"""Laying out a layer: inside the root, or not at all."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.errors import BuilderInstallFailed
from runner.stores.plant import plant

Member = tuple[str, bytes, str | bytes]


def layer(*members: Member) -> Iterator[bytes]:
    """A tar of (name, type, link target or content)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind, value in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.mode = 0o4755
            if isinstance(value, bytes):
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))
            else:
                info.linkname = value
                archive.addfile(info)
    return iter([stream.getvalue()])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    made.mkdir()
    (tmp_path / "outside").mkdir()
    return made


def test_files_directories_and_links_are_laid_out(root: Path) -> None:
    plant(
        layer(
            ("./usr/bin/", tarfile.DIRTYPE, ""),
            ("usr/bin/one", tarfile.REGTYPE, b"content"),
            ("usr/bin/two", tarfile.LNKTYPE, "usr/bin/one"),
            ("bin", tarfile.SYMTYPE, "usr/bin"),
            ("missing/parent/file", tarfile.REGTYPE, b""),
        ),
        root,
    )
    assert (root / "usr/bin/one").read_bytes() == b"content"
    assert (root / "usr/bin/two").stat().st_ino == (root / "usr/bin/one").stat().st_ino
    assert (root / "bin").readlink() == Path("usr/bin")
    assert (root / "missing/parent/file").is_file()


def test_nothing_that_gains_privilege_is_laid_out(root: Path) -> None:
    plant(layer(("su", tarfile.REGTYPE, b"x"), ("null", tarfile.CHRTYPE, "")), root)
    assert os.listdir(root) == ["su"]
    assert (root / "su").stat().st_mode & 0o7777 == 0o755


OUTSIDE: dict[str, Callable[[Path], tuple[Member, ...]]] = {
    "a name with ..": lambda _: (("../outside/file", tarfile.REGTYPE, b"x"),),
    "a directory that is a link": lambda out: (
        ("step", tarfile.SYMTYPE, str(out)),
        ("step/file", tarfile.REGTYPE, b"x"),
    ),
    "a directory made over a link": lambda out: (
        ("step", tarfile.SYMTYPE, str(out)),
        ("step", tarfile.DIRTYPE, ""),
        ("step/file", tarfile.REGTYPE, b"x"),
    ),
    "a file written through a link": lambda out: (
        ("step", tarfile.SYMTYPE, str(out / "file")),
        ("step", tarfile.REGTYPE, b"x"),
    ),
    "a hard link through a link": lambda out: (
        ("step", tarfile.SYMTYPE, str(out)),
        ("copy", tarfile.LNKTYPE, "step/secret"),
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_is_touched(name: str, root: Path) -> None:
    outside = root.parent / "outside"
    (outside / "secret").write_text("secret")
    with pytest.raises(BuilderInstallFailed):
        plant(layer(*OUTSIDE[name](outside)), root)
    assert os.listdir(outside) == ["secret"]
    assert (outside / "secret").stat().st_nlink == 1


def test_what_is_no_layer_is_refused(root: Path) -> None:
    with pytest.raises(BuilderInstallFailed):
        plant(iter([b"not a tar"]), root)

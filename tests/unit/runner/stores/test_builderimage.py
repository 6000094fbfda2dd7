"""A builder as one file: the same tree gives the same bytes, and nothing else is taken in."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.buildah import Buildah
from builder.rootfs import Recipe
from policies.model import Limits
from policies.reference import Digest
from runner.errors import BuilderInstallFailed, LayoutInvalid, RunnerError
from runner.output import Output, write_output
from runner.stores import builderimage
from runner.stores.builderimage import BUILDER, TREE, VERSION
from runner.stores.rootfs import Installed, RootfsStore
from runner.verify import StagedImage, verify
from tests.support.images import entry, make_image, make_index

RECIPE = Recipe(
    suite="trixie",
    packages=(),
    leave_out=(),
    files={"etc/passwd": b"root\n"},
    directories=("/tmp",),
    needs=("tool",),
    version_package="tool",
)


class Tool(Buildah):
    name = "tool"
    recipe = RECIPE


def make(root: Path) -> str:
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/tool").write_bytes(b"#!tool" * 20_000)
    (root / "usr/bin/tool").chmod(0o755)
    (root / "usr/bin/same").hardlink_to(root / "usr/bin/tool")
    (root / "usr/bin-").symlink_to("/usr/bin")
    (root / ("long-" * 45)).write_bytes(b"")
    (root / "ümläut").write_bytes(b"x")
    (root / os.fsdecode(b"\xff\xfe")).symlink_to(os.fsdecode(b"\xfd"))
    return "1.0-2+b1"


@pytest.fixture
def store(tmp_path: Path) -> RootfsStore:
    return RootfsStore(tmp_path / "builders")


@pytest.fixture
def installed(store: RootfsStore) -> Installed:
    return store.install("tool", RECIPE, "here", make)


@pytest.fixture
def other(tmp_path: Path) -> RootfsStore:
    return RootfsStore(tmp_path / "other")


def exported(installed: Installed, path: Path) -> Digest:
    return builderimage.export(RECIPE, installed, Output("oci-archive", path))


def imported(store: RootfsStore, path: Path, digest: Digest | None = None) -> Installed:
    with builderimage.opened(path, digest) as found:
        return builderimage.install(store, Tool(), found, f"oci-archive:{path.name}")


def test_the_very_tree_arrives_and_is_exported_to_the_same_bytes(
    installed: Installed, other: RootfsStore, tmp_path: Path
) -> None:
    umask = os.umask(0o077)
    try:
        digest = exported(installed, tmp_path / "one.tar")
        arrived = imported(other, tmp_path / "one.tar", digest)
    finally:
        os.umask(umask)
    assert (arrived.digest, arrived.version) == (installed.digest, installed.version)
    assert arrived.source == f"oci-archive:one.tar@{digest}"
    assert other.verified("tool", every_byte=True) == arrived
    assert exported(arrived, tmp_path / "two.tar") == digest
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_neither_times_nor_links_between_files_show(
    installed: Installed, other: RootfsStore, tmp_path: Path
) -> None:
    def later(root: Path) -> str:
        version = make(root)
        (root / "usr/bin/same").unlink()
        (root / "usr/bin/same").write_bytes(b"#!tool" * 20_000)
        (root / "usr/bin/same").chmod(0o755)
        os.utime(root / "usr/bin/tool", (1, 1))
        return version

    again = other.install("tool", RECIPE, "there", later)
    assert exported(again, tmp_path / "a") == exported(installed, tmp_path / "b")


def test_an_export_never_replaces_a_file(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(RunnerError, match="exists already"):
        exported(installed, tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "kept"


def test_a_tree_that_changes_meanwhile_is_not_exported(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(*arguments: Any, **named: Any) -> Any:
        (installed.root / "usr/bin/tool").write_bytes(b"#!more" * 20_000)
        return verify(*arguments, **named)

    monkeypatch.setattr(builderimage, "verify", grow)
    with pytest.raises(RunnerError, match="blob-digest"):
        exported(installed, tmp_path / "file")
    assert not (tmp_path / "file").exists()


# -- hostile archives ------------------------------------------------------------------------


def directory(name: str) -> tarfile.TarInfo:
    info = entry(name, tarfile.DIRTYPE)
    info.mode = 0o755
    return info


def owned(uid: int, gid: int) -> tarfile.TarInfo:
    info = entry("file")
    info.uid, info.gid = uid, gid
    return info


def moded(info: tarfile.TarInfo, mode: int) -> tarfile.TarInfo:
    info.mode = mode
    return info


def with_attribute(name: str) -> tarfile.TarInfo:
    info = entry("file")
    info.pax_headers = {f"SCHILY.xattr.{name}": "x"}
    return info


def tar(*members: tarfile.TarInfo) -> bytes:
    """A sound root filesystem, and ``members`` after it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        tool = moded(entry("usr/bin/tool"), 0o755)
        tool.size = 4
        archive.addfile(tool, io.BytesIO(b"tool"))
        for member in members:
            archive.addfile(member)
    return buffer.getvalue()


LABELS = {BUILDER: "tool", VERSION: "1"}


def written(image: StagedImage, path: Path) -> Path:
    sound = verify(image, limits=Limits(), platform=None, claimed=None)
    write_output(sound, Output("oci-archive", path), None)
    return path


def archive(
    path: Path,
    *members: tarfile.TarInfo,
    labels: dict[str, Any] | None = None,
    compression: str = "",
    platform: tuple[str, str, str | None] = ("linux", "amd64", None),
    layers: int = 1,
) -> Path:
    def edit(config: dict[str, Any]) -> None:
        config["config"]["Labels"] = LABELS if labels is None else labels

    image = make_image(
        tars=(tar(*members), tar())[:layers],
        compression=compression,
        platform=platform,
        edit_config=edit,
    )
    return written(image, path)


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_another_tool_may_make_the_image(
    compression: str, store: RootfsStore, tmp_path: Path
) -> None:
    members = (
        directory("./usr/share/"),
        moded(entry("boot", tarfile.DIRTYPE), 0o40755),
        entry("usr/share/copy", tarfile.LNKTYPE, "usr/bin/tool"),
        entry("bin", tarfile.SYMTYPE, "/usr/bin"),
    )
    arrived = imported(store, archive(tmp_path / "file", *members, compression=compression))
    assert (arrived.root / "usr/share/copy").read_bytes() == b"tool"
    assert (arrived.root / "bin").readlink() == Path("/usr/bin")
    assert (arrived.root / "etc/passwd").read_bytes() == b"root\n"


NOT_PLAIN = {
    "a device": entry("null", tarfile.CHRTYPE),
    "a FIFO": entry("fifo", tarfile.FIFOTYPE),
    "setuid": moded(entry("su"), 0o4755),
    "setgid": moded(entry("su"), 0o2755),
    "a directory for all": moded(entry("tmp", tarfile.DIRTYPE), 0o1777),
    "a file for all": moded(entry("file"), 0o666),
    "another owner": owned(1000, 0),
    "another group": owned(0, 42),
    "an extended attribute": with_attribute("user.note"),
    "a capability": with_attribute("security.capability"),
    "a whiteout": entry("usr/.wh.bin"),
    "an opaque directory": entry("usr/.wh..wh..opq"),
    "a name twice": entry("usr/bin/tool"),
    "a name twice, spelled differently": entry("./usr//bin/tool"),
    "a link over a file": entry("usr/bin/tool", tarfile.SYMTYPE, "/etc/shadow"),
    "a file in a file": entry("usr/bin/tool/file"),
    "a hard link to nothing": entry("copy", tarfile.LNKTYPE, "usr/bin/none"),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_is_refused(name: str, installed: Installed, tmp_path: Path) -> None:
    store = RootfsStore(installed.root.parent.parent.parent)
    with pytest.raises((BuilderInstallFailed, LayoutInvalid)):
        imported(store, archive(tmp_path / "file", NOT_PLAIN[name]))
    assert store.verified("tool", every_byte=True) == installed
    assert not list(installed.root.parent.parent.glob("arriving-*"))


def test_a_link_never_leads_outside(store: RootfsStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for members in (
        (entry("step", tarfile.SYMTYPE, str(outside)), entry("step/file")),
        (entry("step", tarfile.SYMTYPE, str(outside)), directory("step/below")),
        (entry("etc", tarfile.SYMTYPE, str(outside)),),
        (entry("tmp", tarfile.SYMTYPE, str(outside)),),
    ):
        with pytest.raises(BuilderInstallFailed):
            imported(store, archive(tmp_path / f"{members[0].name}-{len(members)}", *members))
        assert not list(outside.iterdir())
        (tmp_path / f"{members[0].name}-{len(members)}").unlink()


SPOILED: dict[str, Callable[[Path], Path]] = {
    "no labels": lambda path: archive(path, labels={}),
    "no version": lambda path: archive(path, labels={BUILDER: "tool"}),
    "a version that clears the screen": lambda path: archive(
        path, labels={**LABELS, VERSION: "\x1b[2J"}
    ),
    "a tree that is no digest": lambda path: archive(path, labels={**LABELS, TREE: "../.."}),
    "two layers": lambda path: archive(path, layers=2),
    "another platform": lambda path: archive(path, platform=("linux", "arm64", None)),
    "an index": lambda path: written(make_index(("linux", "amd64", None)), path),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_no_builder_is_refused(name: str, store: RootfsStore, tmp_path: Path) -> None:
    with pytest.raises(LayoutInvalid, match=r"file: "):
        imported(store, SPOILED[name](tmp_path / "file"))


@pytest.mark.parametrize("offset", [3000, 70_000, -3000])
def test_one_changed_byte_is_found(
    offset: int, installed: Installed, other: RootfsStore, tmp_path: Path
) -> None:
    exported(installed, tmp_path / "file")
    data = bytearray((tmp_path / "file").read_bytes())
    data[offset] ^= 1
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(LayoutInvalid):
        imported(other, tmp_path / "file")
    assert other.installed("tool") is None


def test_bytes_that_change_after_they_were_verified_are_not_installed(
    installed: Installed, other: RootfsStore, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    exported(installed, path)

    class Replacing(RootfsStore):
        def install(self, *arguments: Any, **named: Any) -> Installed:
            with path.open("r+b") as file:
                file.seek(path.read_bytes().index(b"#!tool"))
                file.write(b"#!evil")
            return super().install(*arguments, **named)

    with pytest.raises(LayoutInvalid, match="blob-digest"):
        imported(Replacing(tmp_path / "other"), path)
    assert other.installed("tool") is None


def test_another_image_than_the_one_vouched_for_is_refused(
    installed: Installed, other: RootfsStore, tmp_path: Path
) -> None:
    exported(installed, tmp_path / "file")
    with pytest.raises(LayoutInvalid, match="was asked for"):
        imported(other, tmp_path / "file", Digest.of(b"another"))


def test_a_tree_that_is_not_what_its_label_says_is_refused(
    store: RootfsStore, tmp_path: Path
) -> None:
    lying = archive(tmp_path / "file", labels={**LABELS, TREE: Digest.of(b"another tree")})
    with pytest.raises(BuilderInstallFailed, match="it should be"):
        imported(store, lying)
    assert store.installed("tool") is None


def test_a_recipe_has_a_digest_of_its_own() -> None:
    assert RECIPE.digest == Tool.recipe.digest != Buildah.recipe.digest

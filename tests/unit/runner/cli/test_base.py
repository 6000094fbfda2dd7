"""``runner base`` on a store whose images need no sandbox: they are never mounted here."""

import json
import os
from pathlib import Path

import pytest

from policies.errors import InvalidReference
from policies.model import Limits
from policies.reference import Digest, ImageReference
from runner import cli
from runner.errors import UsageError
from runner.files import Home
from runner.gateway.kept import Kept
from runner.pull import LayoutSource
from runner.registry.image import OCI_MANIFEST, Descriptor
from runner.stores.blobs import BlobStore
from runner.stores.unpacked import Checked, Identity, Unpacked, UnpackedStore
from sandbox.local.backend import LocalBackend
from sandbox.local.probe import _base_images
from sandbox.rows import Verdict
from tests.support.erofs import erofs

DEBIAN = "docker.io/library/debian:12"
ALPINE = "docker.io/library/alpine:latest"
BUILDER = Digest.of(b"builder")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setattr("runner.files.Home._require_safe", lambda _: None)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "config.toml").touch()
    monkeypatch.setenv("RUNNER_CONFIG", str(tmp_path / "config.toml"))
    home = Home.find()
    home.prepare()
    return home


@pytest.fixture
def store(home: Home) -> UnpackedStore:
    return UnpackedStore(home.unpacked)


def add(
    store: UnpackedStore, name: str, packed: bytes = b"", *, attributes: bool = False
) -> Unpacked:
    """An image whose manifest's digest is that of its name."""
    identity = Identity(image=Digest.of(name.encode()), platform="linux/amd64", builder=BUILDER)
    held = store.hold()
    with store.arriving() as writer:
        writer.write(erofs(packed or name.encode()))
        made = store.add(
            identity,
            writer,
            held,
            name=name,
            attributes=attributes,
            checked=Checked.under(Limits()),
        )
    held.release()
    return made


def blob(home: Home, unpacked: Unpacked) -> Path:
    return BlobStore(home.unpacked).path(unpacked.packed)


def spoil(path: Path) -> None:
    """Another byte, and the same size and times."""
    status = path.stat()
    path.chmod(0o600)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def names(store: UnpackedStore) -> list[str]:
    return [unpacked.name for unpacked in store.all()]


# -- list ----------------------------------------------------------------------------------------


def test_the_list_says_what_there_is(
    home: Home, store: UnpackedStore, capsys: pytest.CaptureFixture[str]
) -> None:
    add(store, DEBIAN)
    odd = add(store, ALPINE, attributes=True)
    os.utime(blob(home, odd), ns=(86_400_000_000_000, blob(home, odd).stat().st_mtime_ns))
    assert cli.main(["base", "list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [shown[0], shown[3]] == [ALPINE, DEBIAN]
    assert shown[1].strip() == Digest.of(ALPINE.encode())
    assert "has extended attributes: copied" in shown[2]
    assert shown[2].endswith(f"builder {BUILDER.hex[:12]}, last used 1970-01-02T00:00:00Z")
    assert "mountable" in shown[5]


def test_the_list_for_machines_has_all_of_it(
    store: UnpackedStore, capsys: pytest.CaptureFixture[str]
) -> None:
    made = add(store, DEBIAN)
    assert cli.main(["base", "list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    used = row.pop("last_used")
    assert used.startswith("2")
    assert used.endswith("Z")
    assert row == {
        "name": DEBIAN, "digest": made.identity.image, "platform": "linux/amd64",
        "size_bytes": 8192, "builder": BUILDER, "mountable": True, "attributes": False,
        "packed": made.packed,
    }  # fmt: skip


def test_nothing_is_listed_where_nothing_is(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["base", "list"]) == 0
    assert cli.main(["base", "list", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["verify"]])
def test_no_name_moves_a_terminal(
    store: UnpackedStore, hostile: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    add(store, hostile)
    assert cli.main(["base", *command]) == 0
    captured = capsys.readouterr()
    shown = (captured.out + captured.err).replace("\n", "")
    assert shown
    assert shown.isprintable()


# -- verify --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [None, DEBIAN, "debian:12", str(Digest.of(DEBIAN.encode()))])
def test_one_other_byte_is_found_and_nothing_is_removed(
    home: Home,
    store: UnpackedStore,
    wanted: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = add(store, DEBIAN)
    command = ["base", "verify", *([wanted] if wanted else [])]
    assert cli.main(command) == 0
    spoil(blob(home, made))
    add(store, ALPINE)
    assert cli.main(command) == 5
    said = capsys.readouterr().err
    assert f"corrupt    {DEBIAN} {made.identity.image}" in said
    assert "base-image-corrupt (exit status 5)" in said
    assert "runner base remove DIGEST, then runner base pull IMAGE" in said
    assert names(store) == [ALPINE, DEBIAN]


def test_another_image_is_not_verified(home: Home, store: UnpackedStore) -> None:
    spoil(blob(home, add(store, DEBIAN)))
    add(store, ALPINE)
    assert cli.main(["base", "verify", "alpine"]) == 0


def test_to_verify_is_not_to_use(home: Home, store: UnpackedStore) -> None:
    path = blob(home, add(store, DEBIAN))
    os.utime(path, ns=(0, path.stat().st_mtime_ns))
    assert cli.main(["base", "verify"]) == 0
    assert path.stat().st_atime_ns == 0


@pytest.mark.parametrize("action", ["verify", "remove"])
@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        ("debian:13", "base-image-unknown"),
        ("debian", "base-image-unknown"),
        (str(Digest.of(b"other")), "base-image-unknown"),
        (f"debian@{Digest.of(b'other')}", "base-image-unknown"),
        ("sha256:12", "base-image-unknown"),
        ("sha256:\x1b[31m", "invalid-reference"),
        ("../x", "invalid-reference"),
    ],
)
def test_an_image_that_is_not_there_is_unknown(
    store: UnpackedStore,
    action: str,
    wanted: str,
    code: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add(store, DEBIAN)
    assert cli.main(["base", action, wanted]) == 2
    assert f"code       {code} " in capsys.readouterr().err
    assert names(store) == [DEBIAN]


# -- remove --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted",
    ["debian:12", DEBIAN, str(Digest.of(DEBIAN.encode())), f"x@{Digest.of(DEBIAN.encode())}"],
)
def test_an_image_goes_by_name_and_by_digest(home: Home, store: UnpackedStore, wanted: str) -> None:
    made = add(store, DEBIAN)
    add(store, ALPINE)
    assert cli.main(["base", "remove", wanted]) == 0
    assert names(store) == [ALPINE]
    assert not blob(home, made).exists()


def test_whoever_uses_an_image_keeps_it_when_it_is_removed(store: UnpackedStore) -> None:
    made = add(store, DEBIAN)
    held = store.hold()
    assert store.find(made.identity, held) == made
    assert cli.main(["base", "remove", "debian:12"]) == 0
    assert held.path(made.packed).read_bytes() == erofs(DEBIAN.encode())
    assert store.find(made.identity, store.hold()) is None


def test_equal_bytes_stay_for_the_other_image(home: Home, store: UnpackedStore) -> None:
    made = add(store, DEBIAN, b"same")
    add(store, ALPINE, b"same")
    assert cli.main(["base", "remove", "debian:12"]) == 0
    assert blob(home, made).exists()
    assert cli.main(["base", "remove", "alpine"]) == 0
    assert not blob(home, made).exists()


def test_no_tag_leads_to_an_image_that_was_removed(home: Home, store: UnpackedStore) -> None:
    made = add(store, DEBIAN)
    cache = BlobStore(home.base_images)
    kept, held = Kept(cache), cache.hold()
    other = b"other"
    for name, data in ((DEBIAN, DEBIAN.encode()), (ALPINE, other)):
        found = Descriptor(OCI_MANIFEST, Digest.of(data), len(data))
        kept.add(ImageReference.parse(name), found, data, held)
    held.release()
    assert cli.main(["base", "remove", str(made.identity.image)]) == 0
    tags = [kept.tagged(ImageReference.parse(name)) for name in (DEBIAN, ALPINE)]
    assert tags == [None, Digest.of(other)]
    assert cache.size(made.identity.image) is None


# -- gc ------------------------------------------------------------------------------------------


def test_gc_keeps_to_the_configured_size_now(
    home: Home, store: UnpackedStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate((DEBIAN, ALPINE)):
        path = blob(home, add(store, name, bytes([number]) * 1000))
        os.utime(path, ns=(number, path.stat().st_mtime_ns))
    (tmp_path / "config.toml").write_text("unpacked_bytes = 9000\n")
    assert cli.main(["base", "gc"]) == 0
    assert names(store) == [ALPINE]
    said = capsys.readouterr().err
    assert f"removed    unpacked base image {DEBIAN} sha256:" in said
    assert "gc         1 removed" in said


def test_gc_removes_what_killed_runs_left_and_nothing_else(
    home: Home, store: UnpackedStore, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = add(store, ALPINE)
    orphan = add(store, DEBIAN)
    (home.unpacked / "records" / f"{orphan.identity.key}.json").unlink()
    (home.unpacked / "arriving" / "half").touch()
    (home.unpacked / "turns" / "dead").touch()
    (home.base_images / "arriving").mkdir(parents=True, exist_ok=True)
    (home.base_images / "arriving" / "half-a-blob").touch()
    with store.turn(kept.identity, lambda: None), store.arriving() as writer:
        writer.write(b"on its way")
        assert cli.main(["base", "gc"]) == 0
        assert [path.name for path in (home.unpacked / "turns").iterdir()] == [kept.identity.key]
        assert writer.path.exists()
    said = capsys.readouterr().err
    assert "gc         4 removed" in said
    assert not blob(home, orphan).exists()
    assert names(store) == [ALPINE]


def test_an_image_that_is_just_being_added_is_no_leftover(home: Home, store: UnpackedStore) -> None:
    held = store.hold()
    with store.arriving() as writer:
        writer.write(b"whole")
        held.adopt(writer.digest, writer)
        digest = writer.commit()  # and its record comes next
    assert store.collect() == []
    assert BlobStore(home.unpacked).size(digest) is not None


# -- what is given -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("oci:layout", LayoutSource("oci", Path("layout"), None)),
        ("oci:/a/b:12", LayoutSource("oci", Path("/a/b"), "12")),
        ("oci:a:docker.io/library/debian:12",
         LayoutSource("oci", Path("a"), "docker.io/library/debian:12")),
        ("oci-archive:x.tar", LayoutSource("oci-archive", Path("x.tar"), None)),
        ("oci-archive:x.tar:12", LayoutSource("oci-archive", Path("x.tar"), "12")),
    ],
)  # fmt: skip
def test_a_layout_is_named_as_skopeo_names_it(text: str, source: LayoutSource) -> None:
    assert LayoutSource.parse(text) == source


@pytest.mark.parametrize("text", ["", "oci", "oci:", "oci::12", "docker://x", "zip:x", "oci:a\0b"])
def test_what_names_no_layout_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a layout"):
        LayoutSource.parse(text)


def test_a_strange_image_is_refused_before_anything_is_asked(home: Home) -> None:
    with pytest.raises(InvalidReference):
        ImageReference.parse("UP per")
    assert cli.main(["base", "pull", "UP per"]) == 2


# -- doctor --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("20240729", Verdict.WARN), ("20260126", Verdict.OK), ("20200101", Verdict.WARN)],
)
def test_the_doctor_says_whether_base_images_can_be_mounted(
    tmp_path: Path, version: str, verdict: Verdict
) -> None:
    runsc = tmp_path / "runsc"
    runsc.write_text(f"#!/bin/sh\necho runsc version release-{version}.0\n")
    runsc.chmod(0o755)
    row = _base_images(LocalBackend(tmp_path, runsc_name=str(runsc), uids=range(1)))
    assert (row.name, row.verdict) == ("base images", verdict)
    assert bool(row.mend) is (verdict is Verdict.WARN)

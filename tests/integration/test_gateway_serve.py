"""``runner gateway serve`` with clients that know nothing of it."""

import json
import shutil
import signal
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from policies.model import plain
from policies.reference import Digest, ImageReference
from runner.registry.auth import Anonymous
from runner.registry.client import RegistryClient
from runner.settings import RegistrySettings, Settings
from runner.verify import StagedImage, verify
from tests.support.doors import Client, basic
from tests.support.gateway import PUSH, connect, decision
from tests.support.images import MemoryBlobs, make_image
from tests.support.served import Served, certificate, served

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

ONE, TWO = "conformance/repo1", "conformance/repo2"


@pytest.fixture
def layout(tmp_path: Path) -> tuple[Path, Digest]:
    """An OCI layout with one small sound image."""
    blobs = MemoryBlobs()
    root = make_image(blobs=blobs).root
    directory = tmp_path / "layout"
    (directory / "blobs/sha256").mkdir(parents=True)
    for digest, data in blobs.blobs.items():
        (directory / "blobs/sha256" / digest.hex).write_bytes(data)
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    described = {"mediaType": root.media_type, "digest": root.digest, "size": root.size}
    index = {"schemaVersion": 2, "manifests": [described]}
    (directory / "index.json").write_text(json.dumps(index))
    return directory, root.digest


def skopeo(*words: str | Path) -> str:
    program = shutil.which("skopeo")
    if program is None:
        pytest.skip("skopeo is not installed: deploy/debian/install-host-tools.sh")
    command = [program, "--insecure-policy", *map(str, words)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture
def home() -> Iterator[Path]:
    """As root's home has to be: everybody may pass through it."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


# -- standing alone ------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, "--standalone") as running:
        yield running


def test_skopeo_pushes_lists_copies_pulls_and_deletes(
    alone: Served, layout: tuple[Path, Digest], tmp_path: Path
) -> None:
    directory, digest = layout
    place = f"docker://{alone.host}/{ONE}"
    insecure = ("--dest-tls-verify=false", "--src-tls-verify=false")
    for tag in ("one", "two"):
        skopeo("copy", "--dest-tls-verify=false", f"oci:{directory}", f"{place}:{tag}")
    listed = json.loads(skopeo("list-tags", "--tls-verify=false", place))
    assert listed["Tags"] == ["one", "two"]
    raw = skopeo("inspect", "--tls-verify=false", "--raw", f"{place}:one")
    assert Digest.of(raw.encode()) == digest
    other = f"docker://{alone.host}/{TWO}:copied"
    skopeo("copy", *insecure, f"{place}@{digest}", other)
    skopeo("copy", "--src-tls-verify=false", other, f"oci:{tmp_path / 'pulled'}")
    assert (tmp_path / "pulled/blobs/sha256" / digest.hex).exists()
    skopeo("delete", "--tls-verify=false", f"{place}:one")
    listed = json.loads(skopeo("list-tags", "--tls-verify=false", place))
    assert listed["Tags"] == []  # it deletes the manifest that the tag names


def test_our_own_client_pushes_and_reads_back(alone: Served) -> None:
    here = RegistrySettings(plain_http=True, private_address=True)
    reference = ImageReference(alone.host, ONE, "1")
    blobs = MemoryBlobs()
    root = make_image(blobs=blobs).root
    with RegistryClient(Settings(registries={alone.host: here}), Anonymous()) as client:
        for digest, data in blobs.blobs.items():
            opened = lambda digest=digest: blobs.open(digest)  # noqa: E731 - binds it now
            client.push_blob(reference, digest, len(data), opened)
            assert client.has_blob(reference, digest) == len(data)
        client.put_manifest(reference, root.media_type, blobs.blobs[root.digest])
        assert client.manifest_at_origin(reference)[0].digest == root.digest


def test_other_repositories_and_a_login(tmp_path: Path) -> None:
    (tmp_path / "login").write_text("me:secret\n")
    cert, key = certificate(tmp_path)
    options = ("--standalone", "--repository", "a/b", "--login", tmp_path / "login")
    with served(tmp_path, *options, "--certificate", cert, "--key", key) as running:
        client = Client(running.address, {}, ssl.create_default_context(cafile=cert))
        assert client.ask("GET", "/v2/").status == 401
        mine = basic("me:secret")
        assert client.ask("GET", "/v2/a/b/tags/list", headers=mine).status == 200
        assert client.ask("GET", f"/v2/{ONE}/tags/list", headers=mine).status == 404


@pytest.mark.parametrize(
    "options",
    [
        ("--listen", "0.0.0.0:0"),
        ("--standalone", "--listen", "0.0.0.0:0"),
        ("--listen", "127.0.0.1"),
        ("--listen", "127.0.0.1:99999"),
        ("--listen", "gateway.example:8443"),
        ("--certificate", "/nonexistent"),
        ("--certificate", "/nonexistent", "--key", "/nonexistent"),
        ("--standalone", "--repository", "Upper/Case"),
        ("--standalone", "--login", "/nonexistent"),
        ("--control", "/nonexistent/at/all.sock"),
    ],
)
def test_what_cannot_be_served_is_said(
    options: tuple[str, ...], home: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from runner.cli import main

    for name in ("DATA", "STATE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(home / name))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        assert main(["gateway", "serve", *options]) == 2
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert "usage" in capsys.readouterr().err


# -- sessions ------------------------------------------------------------------------------------


class Builds:
    """Whoever opens sessions."""

    def __init__(self, control: Path, directory: Path) -> None:
        self._peer = connect(control)
        self._lines = self._peer.makefile("rwb")
        self._directory = directory

    def close(self) -> None:
        self._lines.close()
        self._peer.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        self._lines.write(json.dumps(request).encode() + b"\n")
        self._lines.flush()
        answer = json.loads(self._lines.readline())
        assert "ok" in answer, answer
        ok: dict[str, Any] = answer["ok"]
        return ok

    def open(self, name: str, hosts: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
        directory = self._directory / name
        directory.mkdir()
        document = plain(decision(**fields))
        return self.ask(do="open", decision=document, hosts=hosts, directory=str(directory))


def test_skopeo_pushes_into_a_session_over_tls_and_the_image_verifies(
    layout: tuple[Path, Digest], home: Path, tmp_path: Path
) -> None:
    directory, digest = layout
    (home / "certs").mkdir()
    cert, key = certificate(home / "certs")
    options = ("--certificate", cert, "--key", key, "--ca", cert)
    with served(home, *options, "--control", home / "control.sock") as running:
        builds = Builds(running.control, tmp_path)
        opened = builds.open("build")
        assert opened["ca"] == cert.read_text()
        assert opened["address"] == running.host
        (tmp_path / "trusted").mkdir()
        (tmp_path / "trusted/ca.crt").write_text(opened["ca"])
        skopeo(
            "copy", "--dest-cert-dir", tmp_path / "trusted", "--dest-creds",
            f"session:{opened['token']}", f"oci:{directory}",
            f"docker://{opened['address']}/staged/image:latest",
        )  # fmt: skip
        sealed = builds.ask(do="seal", session=opened["session"])
        assert sealed["root"]["digest"] == digest
        builds.close()
    from runner.registry.image import Descriptor
    from runner.stores.blobs import BlobStore

    root = Descriptor(sealed["root"]["mediaType"], digest, sealed["root"]["size"])
    image = StagedImage(root, BlobStore(tmp_path / "build/staged"))
    limits = decision().limits
    verified = verify(image, limits=limits, platform="linux/amd64", claimed=digest)
    assert verified.root.digest == digest


@pytest.mark.registry
def test_sessions_pull_through_one_cache_and_have_nothing_else_in_common(
    registry: "RealRegistry", layout: tuple[Path, Digest], home: Path, tmp_path: Path
) -> None:
    directory, digest = layout
    base = f"{registry.host}/serve/base"
    skopeo("copy", "--dest-tls-verify=false", f"oci:{directory}", f"docker://{base}:1")
    (home / "config/runner").mkdir(parents=True)
    (home / "config/runner/config.toml").write_text(
        f'[registries."{registry.host}"]\nplain_http = true\nprivate_address = true\n'
    )
    with served(home, "--control", home / "control.sock") as running:
        builds = Builds(running.control, tmp_path)
        allowed = {"base_images": ((f"{registry.host}/serve/*",),)}
        one = builds.open("one", (registry.host,), **allowed)
        two = builds.open("two", (registry.host,), base_images=(("other.example/**",),))
        alias = one["aliases"][registry.host]
        skopeo(
            "copy", "--src-tls-verify=false", "--src-creds", f"session:{one['token']}",
            f"docker://{running.host}/{alias}/serve/base:1", f"oci:{tmp_path / 'pulled'}",
        )  # fmt: skip
        assert (tmp_path / "pulled/blobs/sha256" / digest.hex).exists()
        thief = Client(running.address, basic(f"session:{two['token']}"))
        layer = json.loads((directory / "blobs/sha256" / digest.hex).read_text())["layers"][0]
        for target in (
            f"/v2/{alias}/serve/base/manifests/1",
            f"/v2/{alias}/serve/base/blobs/{layer['digest']}",
            f"{PUSH}/blobs/{layer['digest']}",
        ):
            assert thief.ask("GET", target).status == 404
        builds.close()


def test_a_killed_service_leaves_a_socket_that_the_next_one_takes(
    home: Path, tmp_path: Path
) -> None:
    control = home / "control.sock"
    with served(home, "--control", control) as running:
        Builds(running.control, tmp_path).close()
        running.process.kill()
        running.process.wait()
    assert control.exists()
    with served(home, "--control", control) as running:
        builds = Builds(running.control, tmp_path)
        assert builds.open("build")["token"]
        builds.close()
    assert not control.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_every_session(number: int, home: Path, tmp_path: Path) -> None:
    with served(home, "--control", home / "control.sock") as running:
        builds = Builds(running.control, tmp_path)
        token = builds.open("build")["token"]
        client = Client(running.address, basic(f"session:{token}"))
        with client.connect() as peer:
            target = f"{PUSH}/blobs/uploads/?digest={Digest.of(b'')}"
            peer.sendall(client.head("POST", target, "Content-Length: 9") + b"x")
            running.process.send_signal(number)
            assert b" 20" not in peer.recv(1000)
        assert running.process.wait(20) == 0
        builds.close()
    assert list((home / "data/runner/base/held").iterdir()) == []

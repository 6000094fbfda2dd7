"""``runner gateway serve`` with clients that know nothing of it."""

import json
import shutil
import signal
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from policies.reference import Digest, ImageReference
from runner.registry.auth import Anonymous
from runner.registry.client import RegistryClient
from runner.settings import RegistrySettings, Settings
from runner.verify import verify
from sandbox.doors import Key
from tests.support.doors import Client, basic
from tests.support.gateway import PUSH, Gate, Gates, decision, statuses
from tests.support.images import MemoryBlobs, make_image
from tests.support.port import Pods, everything, forwarding, is_over
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
        ("--standalone", "--listen", "0.0.0.0:0"),
        ("--listen", "127.0.0.1"),
        ("--listen", "127.0.0.1:99999"),
        ("--listen", "192.0.2.1:8443"),
        ("--standalone", "--listen", "gateway.example:8443"),
        ("--certificate", "/nonexistent"),
        ("--certificate", "/nonexistent", "--key", "/nonexistent"),
        ("--standalone", "--repository", "Upper/Case"),
        ("--standalone", "--login", "/nonexistent"),
        ("--standalone", "--certificate", "/nonexistent", "--key", "/nonexistent"),
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


# -- leading to doors ----------------------------------------------------------------------------


@pytest.fixture
def gates(home: Path) -> Iterator[Gates]:
    """Sessions of a runner that is not the port's process."""
    with Gates(home / "builds") as made:
        yield made


def pods(running: Served) -> Pods:
    """What they are given to know the port by."""
    return Pods(running.address, running.home / "state/runner/gateway/certificate.pem")


def key_to(gate: Gate, running: Served) -> Key:
    return Key.to(gate.path.parent, running.home / "state/runner/gateway/doors")


def ask(gate: Gate, key: Key, running: Served, method: str, target: str) -> bytes:
    """One request of a builder in a pod; all of the answer."""
    head = gate.head(method, target, "Connection: close")
    with pods(running).come(key.secret, more=head) as pod:
        return everything(pod)


def test_skopeo_in_a_pod_pushes_into_a_session_and_the_image_verifies(
    layout: tuple[Path, Digest], home: Path, gates: Gates
) -> None:
    directory, digest = layout
    gate = gates.open()
    with served(home) as running:
        key = key_to(gate, running)
        with forwarding(pods(running), key.secret) as (host, port):
            skopeo(
                "copy", "--dest-tls-verify=false", "--dest-creds", f"session:{gate.session.token}",
                f"oci:{directory}", f"docker://{host}:{port}/staged/image:latest",
            )  # fmt: skip
            image = gate.session.seal()
    limits = decision().limits
    verified = verify(image, limits=limits, platform="linux/amd64", claimed=digest)
    assert verified.root.digest == digest


def test_a_session_that_is_sealed_hears_nothing_more_through_the_port(
    home: Path, gates: Gates
) -> None:
    gate = gates.open()
    with served(home) as running:
        key = key_to(gate, running)
        assert statuses(ask(gate, key, running, "GET", "/v2/")) == [200]
        with pods(running).come(key.secret) as pod:
            pod.sendall(gate.head("POST", f"{PUSH}/blobs/uploads/?digest={Digest.of(b'')}"))
            assert statuses(pod.recv(1000)) == [201]
            gate.session.close()
            assert is_over(pod)
        with pods(running).come(key.secret) as pod:
            assert is_over(pod)


def test_builds_do_not_reach_each_other_through_one_port(home: Path, gates: Gates) -> None:
    one, two = gates.open(), gates.open()
    with served(home) as running:
        key = key_to(one, running)
        assert statuses(ask(one, key, running, "GET", "/v2/")) == [200]
        assert statuses(ask(two, key, running, "GET", "/v2/")) == [401]
        for name in ("../1/door/gateway", "host", "files", "outlet"):
            with pods(running).come(key.secret, name) as pod:
                assert is_over(pod)


@pytest.mark.registry
def test_pods_pull_through_one_cache_and_have_nothing_else_in_common(
    registry: "RealRegistry", layout: tuple[Path, Digest], home: Path, tmp_path: Path, gates: Gates
) -> None:
    directory, digest = layout
    base = f"{registry.host}/serve/base"
    skopeo("copy", "--dest-tls-verify=false", f"oci:{directory}", f"docker://{base}:1")
    here = RegistrySettings(plain_http=True, private_address=True)
    loaded = Settings(registries={registry.host: here})
    patterns = ((f"{registry.host}/serve/*",), ("other.example/**",))
    one, two = (
        gates.open(fake=False, settings=loaded, hosts=(registry.host,), base_images=(allowed,))
        for allowed in patterns
    )
    alias = one.session.aliases[registry.host]
    with served(home) as running:
        with forwarding(pods(running), key_to(one, running).secret) as (host, port):
            skopeo(
                "copy", "--src-tls-verify=false", "--src-creds", f"session:{one.session.token}",
                f"docker://{host}:{port}/{alias}/serve/base:1", f"oci:{tmp_path / 'pulled'}",
            )  # fmt: skip
        assert (tmp_path / "pulled/blobs/sha256" / digest.hex).exists()
        layer = json.loads((directory / "blobs/sha256" / digest.hex).read_text())["layers"][0]
        thief = key_to(two, running)
        for target in (
            f"/v2/{alias}/serve/base/manifests/1",
            f"/v2/{alias}/serve/base/blobs/{layer['digest']}",
            f"{PUSH}/blobs/{layer['digest']}",
        ):
            assert statuses(ask(two, thief, running, "GET", target)) == [404]


def test_a_port_that_was_killed_comes_back_as_the_same_and_ends_no_build(
    home: Path, gates: Gates
) -> None:
    gate = gates.open()
    location = gate.start()
    with served(home) as running:
        key = key_to(gate, running)
        known = pods(running).certificate.read_bytes()
        with pods(running).come(key.secret, more=gate.head("GET", "/v2/")) as pod:
            assert statuses(pod.recv(1000)) == [200]
            running.process.kill()
            running.process.wait()
            assert is_over(pod)
    with served(home) as running:
        assert pods(running).certificate.read_bytes() == known
        assert statuses(ask(gate, key, running, "GET", location)) == [204]


def test_ports_that_start_at_once_are_the_same_to_pods(home: Path, gates: Gates) -> None:
    gate = gates.open()
    with served(home) as one, served(home, log_path=home / "other.log") as two:
        for running in (one, two):
            key = key_to(gate, running)
            assert statuses(ask(gate, key, running, "GET", "/v2/")) == [200]


def test_the_operators_own_certificate_is_shown(home: Path, gates: Gates) -> None:
    gate = gates.open()
    (home / "certs").mkdir()
    cert, key = certificate(home / "certs")
    with served(home, "--certificate", cert, "--key", key) as running:
        assert pods(running).certificate.read_bytes() == cert.read_bytes()
        opening = key_to(gate, running)
        assert statuses(ask(gate, opening, running, "GET", "/v2/")) == [200]


def test_another_certificate_is_not_taken_for_the_ports(home: Path) -> None:
    (home / "certs").mkdir()
    cert, _ = certificate(home / "certs")
    with served(home) as running, pytest.raises(ssl.SSLCertVerificationError):
        Pods(running.address, cert).greet()


def test_the_ports_state_is_for_its_own_user_alone(home: Path) -> None:
    with served(home):
        state = home / "state/runner/gateway"
        modes = {path: path.stat().st_mode & 0o777 for path in (state, *state.rglob("*"))}
        opened = {path.name: mode for path, mode in modes.items() if mode & 0o077}
    assert opened == {"certificate.pem": 0o644}
    assert modes[state] == 0o700


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_every_connection_and_no_session(
    number: int, home: Path, gates: Gates
) -> None:
    gate = gates.open()
    with served(home) as running:
        key = key_to(gate, running)
        with pods(running).come(key.secret) as pod:
            target = f"{PUSH}/blobs/uploads/?digest={Digest.of(b'')}"
            pod.sendall(gate.head("POST", target, "Content-Length: 9") + b"x")
            running.process.send_signal(number)
            assert is_over(pod)
        assert running.process.wait(20) == 0
    assert gate.ask("GET", "/v2/").status == 200

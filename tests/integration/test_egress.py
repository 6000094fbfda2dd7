"""RUN steps reach through the proxy what policy allows, with the tools that people use."""

import contextlib
import functools
import gzip
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from policies import loader
from policies.reference import ImageReference
from runner.cancel import Cancellation
from runner.errors import BuildFailed, PolicyDenied
from runner.events import Event
from runner.gateway.ledger import Chain
from runner.pipeline import submit
from runner.registry.auth import Anonymous
from runner.registry.client import RegistryClient
from runner.registry.image import Manifest, parse_document
from runner.request import BuildRequest
from runner.stores import debian
from tests.support import egress as support
from tests.support.egress import HOST, Names
from tests.support.hosts import Built, Person, output_of, write_context

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]

PACKAGES = "ca-certificates,curl,python3-pip"


@pytest.fixture(scope="session")
def net_base(cache: Path, registry: "RealRegistry") -> str:
    """Reference of a Debian image with apt, curl and pip, in the registry."""
    for program in ("skopeo", "mmdebstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: deploy/debian/install-host-tools.sh")
    layout = cache / "debian-12-net"
    copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
    if not layout.exists():
        with tempfile.TemporaryDirectory(prefix="arriving-", dir=cache) as arriving:
            tar, made = Path(arriving, "base.tar"), Path(arriving, "layout")
            mode = "root" if os.geteuid() == 0 else "fakechroot"
            source = f"deb [signed-by={debian.KEYRING}] {debian.host_mirror()} bookworm main"
            subprocess.run(
                ["mmdebstrap", f"--mode={mode}", "--variant=minbase", "--quiet",
                 f"--include={PACKAGES}", "bookworm", tar, source],
                check=True, timeout=600,
            )  # fmt: skip
            subprocess.run([*copy, f"tarball:{tar}", f"oci:{made}:12"], check=True, timeout=300)
            made.rename(layout)
    reference = f"{registry.host}/library/net:12"
    subprocess.run([*copy, f"oci:{layout}:12", f"docker://{reference}"], check=True, timeout=300)
    return reference


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return support.only_names(monkeypatch)


@dataclass(frozen=True)
class Sites:
    """One directory, served in clear and over TLS."""

    directory: Path
    http: int
    https: int
    certificate: str


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    directory = tmp_path / "served"
    directory.mkdir()
    cert, key = support.certificate(tmp_path, HOST)

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Clients may go."""

    handler = functools.partial(Handler, directory=str(directory))
    with contextlib.ExitStack() as stack:
        ports = []
        for context in (None, support.server_side(cert, key)):
            server = stack.enter_context(Server(("127.0.0.1", 0), handler))
            if context is not None:
                server.socket = context.wrap_socket(server.socket, server_side=True)
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            ports.append(server.server_address[1])
        clear, tls = ports
        yield Sites(directory, clear, tls, cert.read_text(encoding="ascii"))


@dataclass(frozen=True)
class Builds:
    """Somebody whose operator's policy lets RUN steps reach the sites, and nothing else."""

    person: Person
    place: Path
    sites: Sites

    def policy(self, network: str) -> Path:
        opened = {
            "hosts": [HOST],
            "ports": [self.sites.http, self.sites.https],
            "private_ranges": ["127.0.0.0/8"],
        }
        default = {
            "backends": ["local"],
            "builders": ["buildah"],
            "capabilities": ["*"],
            "base_images": ["**"],
            "destinations": ["**"],
            "network": network,
            "egress": [opened],
        }
        document = {"apiVersion": "runner/v1alpha1", "name": "operator", "default": default}
        path = self.place / f"{network}.yaml"
        path.write_text(json.dumps(document), encoding="utf-8")
        return path

    def build(
        self,
        dockerfile: str,
        *,
        network: str = "egress",
        destination: str | None = None,
        script: str = "",
    ) -> Built:
        files = {"ca.pem": self.sites.certificate, "script.py": script}
        context = write_context(self.place / "context", dockerfile, **files)
        tools = replace(self.person.tools(), policies=[loader.read(self.policy(network))])
        request = BuildRequest(
            context=context,
            destinations=(ImageReference.parse(destination),) if destination else (),
            build_args={},
            target=None,
        )
        events: list[Event] = []
        try:
            return Built(submit(request, tools, events.append, Cancellation()), events)
        except BuildFailed:
            pytest.fail(output_of(events)[-3000:])

    def ledger(self) -> list[tuple[str, str, int, str, int]]:
        """What the latest build asked the proxy for."""
        latest = max(self.person.home.builds.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        chain = Chain()
        with (latest / "ledger.jsonl").open("rb") as stream:
            entries = [record.entry for record in chain.records(stream)]
        assert chain.end is not None
        return [
            (entry.kind, entry.host, entry.port, entry.decision, entry.status)
            for entry in entries
            if entry.kind != "registry"
        ]


@pytest.fixture
def builds(person: Person, place: Path, sites: Sites, names: Names) -> Builds:
    return Builds(person, place, sites)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of every session that is opened from now on."""
    made: list[str] = []
    really = secrets.token_urlsafe

    def token(size: int) -> str:
        made.append(really(size))
        return made[-1]

    monkeypatch.setattr(secrets, "token_urlsafe", token)
    return made


def image_bytes(reference: str, registry: "RealRegistry") -> tuple[bytes, bytes, list[bytes]]:
    """Manifest, configuration, and the layers on top of the base, unpacked."""
    image = ImageReference.parse(reference)
    with RegistryClient(registry.settings, Anonymous()) as client:
        descriptor, data = client.manifest(image)
        manifest = parse_document(data, descriptor.media_type)
        assert isinstance(manifest, Manifest)

        def blob(number: int) -> bytes:
            part = (manifest.config, *manifest.layers)[number]
            with client.read_blob(image, part.digest, part.size) as pieces:
                return b"".join(pieces)

        layers = [gzip.decompress(blob(n)) for n in range(2, len(manifest.layers) + 1)]
        return data, blob(0), layers


def test_run_steps_reach_what_policy_allows_and_the_image_knows_nothing_of_the_proxy(
    builds: Builds, net_base: str, registry: "RealRegistry", tokens: list[str]
) -> None:
    sites = builds.sites
    (sites.directory / "hello").write_text("hello from outside")
    destination = f"{registry.host}/egress/app:1"
    built = builds.build(
        f"FROM {net_base}\n"
        "COPY ca.pem /\n"
        "RUN set -e; "
        "for name in HTTP_PROXY HTTPS_PROXY http_proxy https_proxy; do "
        'eval test -n \\"\\$$name\\"; done; '
        'test "$NO_PROXY" = 127.0.0.1,localhost; test "$no_proxy" = "$NO_PROXY"; '
        f"curl -fsS http://{HOST}:{sites.http}/hello >/clear; "
        f"curl -fsS --cacert /ca.pem https://{HOST}:{sites.https}/hello >/tls; "
        "cat /clear /tls\n"
        # What is allowed is: hosts, and for TLS the name in it.
        f"RUN ! curl -sS -k https://evil.example:{sites.https}/; "
        f"! curl -sS -k --connect-to evil.example:{sites.https}:{HOST}:{sites.https} "
        f"https://evil.example:{sites.https}/; "
        f"! curl -fsS http://{HOST}:22/\n",
        destination=destination,
    )
    assert built.log.count("hello from outside") == 2
    asked = builds.ledger()
    clear, tls = ("http", HOST, sites.http), ("connect", HOST, sites.https)
    assert asked.count((*clear, "allowed", 200)) == 1
    assert asked.count((*tls, "allowed", 200)) == 1
    assert (*tls, "denied", 200) in asked, "the tunnel for another server name"
    assert ("connect", "evil.example", sites.https, "denied", 403) in asked
    assert ("http", HOST, 22, "denied", 403) in asked
    manifest, config, layers = image_bytes(destination, registry)
    assert len(layers) >= 1
    (token,) = tokens
    for traces in (manifest, config, *layers):
        for trace in (token.encode(), b"session:", b"127.0.0.1:5000"):
            assert trace not in traces
    assert "proxy" not in json.dumps(json.loads(config)["config"]).lower()
    builds.person.assert_nothing_left()


def test_the_person_hears_which_host_was_denied(builds: Builds, net_base: str) -> None:
    with pytest.raises(PolicyDenied) as denied:
        builds.build(f"FROM {net_base}\nRUN curl -fsS https://files.example.net/\n")
    assert denied.value.message == "egress to files.example.net:443 is not allowed by policy"
    assert "runner egress ID --suggest" in denied.value.advice


EVERYTHING = r"""
import os, socket, sys
def attempt(name, act):
    try:
        print("reached:", name, act())
    except OSError as error:
        print("no way:", name, error)
def tcp(host, port, data=b""):
    with socket.create_connection((host, port), 3) as peer:
        peer.sendall(data or b"\n")
        return peer.recv(100)
def udp(host, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.settimeout(2)
        peer.sendto(b"\0" * 40, (host, port))
        return peer.recv(100)
def icmp(host, kind):
    with socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP) as peer:
        peer.settimeout(2)
        peer.sendto(b"\x08\0\xf7\xff\0\0\0\0", (host, 0))
        return peer.recv(100)
assert not [name for name in os.environ if "proxy" in name.lower()], os.environ
site, tls = sys.argv[1:3]
for host in ["1.1.1.1", "8.8.8.8", "169.254.169.254", "10.0.0.1", "192.168.0.1", *sys.argv[3:]]:
    for port in (53, 80, 443, int(site)):
        attempt(f"tcp {host}:{port}", lambda: tcp(host, port))
    attempt(f"dns {host}", lambda: udp(host, 53))
    attempt(f"ntp {host}", lambda: udp(host, 123))
    attempt(f"ping {host}", lambda: icmp(host, socket.SOCK_DGRAM))
    attempt(f"raw ping {host}", lambda: icmp(host, socket.SOCK_RAW))
for port in (22, 53, 80, int(site), int(tls)):
    attempt(f"loopback {port}", lambda: tcp("127.0.0.1", port))
for name in ("files.example.org", "localhost.example.org"):
    attempt(f"name {name}", lambda: socket.getaddrinfo(name, 80))
for family, address in ((socket.AF_INET6, ("::1", int(site))), (socket.AF_INET6, ("fe80::1", 80))):
    with socket.socket(family) as peer:
        attempt(f"six {address}", lambda: peer.connect(address))
for target in ("GET http://files.example.org:%s/hello" % site, "GET http://169.254.169.254/",
               "CONNECT files.example.org:%s" % tls, "CONNECT 1.1.1.1:443"):
    head = f"{target} HTTP/1.1\r\nHost: a\r\nProxy-Authorization: Basic eDp5\r\n\r\n".encode()
    answer = tcp("127.0.0.1", 5000, head)
    print("proxy:", answer.split(b"\r\n")[0].decode())
print("tried everything")
"""


def test_without_egress_a_run_step_reaches_nothing_whatever_it_tries(
    builds: Builds, net_base: str, names: Names
) -> None:
    sites = builds.sites
    (sites.directory / "hello").write_text("hello from outside")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; tells the host's own address
        own = probe.getsockname()[0]
    built = builds.build(
        f"FROM {net_base}\nCOPY script.py /\n"
        f"RUN python3 /script.py {sites.http} {sites.https} {own}\n",
        network="registries",
        script=EVERYTHING,
    )
    assert "tried everything" in built.log
    assert [line for line in built.log.splitlines() if line.startswith("reached:")] == []
    refusals = [line for line in built.log.splitlines() if line.startswith("proxy:")]
    assert len(refusals) == 4
    assert all(line.startswith("proxy: HTTP/1.1 403 ") for line in refusals), refusals
    assert HOST not in names.asked
    assert {entry[3:] for entry in builds.ledger()} == {("denied", 403)}


# -- the tools that people use --------------------------------------------------------------------


def deb(directory: Path) -> None:
    """A flat archive of one small package, as apt takes it."""
    tree = directory / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr/share/greeting").mkdir(parents=True)
    (tree / "usr/share/greeting/text").write_text("hello from apt\n")
    control = "Package: greeting\nVersion: 1\nArchitecture: all\nMaintainer: t <t@example.com>\n"
    (tree / "DEBIAN/control").write_text(f"{control}Description: test\n")
    package = directory / "greeting.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", tree, package],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    shutil.rmtree(tree)
    data = package.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    entry = f"{control}Filename: ./greeting.deb\nSize: {len(data)}\nSHA256: {digest}\n"
    (directory / "Packages").write_text(f"{entry}Description: test\n")


def wheel(directory: Path) -> None:
    """A simple index of one small package, as pip takes it."""
    project = directory / "simple/greeting"
    project.mkdir(parents=True)
    name, info = "greeting-1-py3-none-any.whl", "greeting-1.dist-info"
    with zipfile.ZipFile(project / name, "w") as archive:
        archive.writestr("greeting.py", "print('hello from pip')\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (project / "index.html").write_text(f'<!DOCTYPE html><a href="{name}">{name}</a>')


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("make", [deb, wheel])
def test_apt_and_pip_install_through_the_proxy(
    make: Callable[[Path], None], scheme: str, builds: Builds, net_base: str
) -> None:
    make(builds.sites.directory)
    url = f"{scheme}://{HOST}:{getattr(builds.sites, scheme)}"
    steps: dict[Callable[[Path], None], str] = {
        deb: "rm -rf /etc/apt/sources.list*; "
        f"echo 'deb [trusted=yes] {url} ./' >/etc/apt/sources.list; "
        "echo 'Acquire::https::CaInfo \"/ca.pem\";' >/etc/apt/apt.conf.d/ca; "
        "apt-get update; apt-get install --yes greeting; cat /usr/share/greeting/text",
        wheel: f"pip install --break-system-packages --index-url {url}/simple "
        f"--trusted-host {HOST} --cert /ca.pem greeting; python3 -m greeting",
    }
    built = builds.build(f"FROM {net_base}\nCOPY ca.pem /\nRUN set -e; {steps[make]}\n")
    assert f"hello from {'apt' if make is deb else 'pip'}" in built.log
    kinds = {entry[0] for entry in builds.ledger() if entry[3] == "allowed"}
    assert kinds == {"http" if scheme == "http" else "connect"}

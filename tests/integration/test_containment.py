"""From inside there is the door, and nothing else. From outside, nothing inside is privileged."""

import base64
import json
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runner.events import Event, Output
from runner.verify import StagedImage
from sandbox import processes
from tests.support.hosts import Person, write_context
from tests.support.images import make_image
from tests.support.push import push
from tests.support.toolbox import install_as_buildah

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]

SUPPORT = Path(__file__).parent.parent / "support"
DOOR = "127.0.0.1:5000"
SOCKET = "/run/runner/door/gateway.sock"


def host_addresses() -> list[str]:
    """What this host is called from outside, as far as it knows."""
    shown = subprocess.run(
        ["hostname", "-I"], capture_output=True, text=True, check=False, timeout=10
    ).stdout
    return [address for address in shown.split() if ":" not in address]


@dataclass(frozen=True)
class Planted:
    """A word that is in everything of the host that must not be seen inside."""

    mark: str
    environ: dict[str, str]
    targets: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        return [self.mark[:9], self.mark[9:], *self.targets]


@contextmanager
def planted(place: Path, registry: str) -> Iterator[Planted]:
    """Plants it: environment, a login, a file's name and content, an argument, a socket's name."""
    mark = f"planted{secrets.token_hex(8)}"
    login = base64.b64encode(f"user:{mark}".encode()).decode()
    docker = place / f"docker-{mark}"
    docker.mkdir()
    auths = {registry: {"auth": login, "identitytoken": mark}}
    (docker / "config.json").write_text(json.dumps({"auths": auths, "note": mark}))
    (docker / "config.json").chmod(0o644)
    with (
        socket.socket(socket.AF_UNIX) as stream,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
        socket.create_server(("0.0.0.0", 0)) as listener,
        subprocess.Popen(["sleep", "600"], env={"SECRET": mark}) as process,
    ):
        for unix in (stream, datagram):
            unix.bind(f"\0{mark}")
        stream.listen()
        port = listener.getsockname()[1]
        targets = [f"{address}:{port}" for address in ("127.0.0.1", *host_addresses())]
        try:
            yield Planted(
                mark,
                {"DOCKER_CONFIG": str(docker), "SECRET": mark, f"NAME_{mark}": "1"},
                (
                    DOOR, registry, *targets, "169.254.169.254:80", "8.8.8.8:53", "1.1.1.1:443",
                    "127.0.0.1:22", "registry.example.com", "localhost.example.com",
                ),
            )  # fmt: skip
        finally:
            process.kill()


def seen(log: str) -> dict[str, list[str]]:
    """The probe's findings by kind."""
    found: dict[str, list[str]] = {}
    for line in log.splitlines():
        _, mark, finding = line.partition("seen: ")
        if mark:
            kind, _, what = finding.partition(" ")
            found.setdefault(kind, []).append(what)
    assert "end" in found, f"the probe did not get to its end:\n{log[-3000:]}"
    return found


def build_log(person: Person) -> str:
    """Of the latest build."""
    latest = max(person.home.builds.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return (latest / "build.log").read_text(errors="replace")


# -- seen from a RUN step -------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["person", "stranger"])
def test_a_run_step_sees_loopback_and_nothing_of_the_host(
    request: pytest.FixtureRequest,
    who: str,
    place: Path,
    tools_base: str,
    registry: "RealRegistry",
) -> None:
    somebody: Person = request.getfixturevalue(who)
    with planted(place, registry.host) as plant:
        context = write_context(
            place / "context",
            f"FROM {tools_base}\nCOPY probe.pl /\nRUN perl /probe.pl {' '.join(plant.arguments)}\n",
            **{"probe.pl": (SUPPORT / "probe.pl").read_text()},
        )
        ran = somebody.having(**plant.environ).run("submit", context)
        log = build_log(somebody)
    assert ran.status == 0, ran.stderr
    found = seen(log)
    assert found.pop("interface") == ["lo"]
    assert found.pop("connected") == [DOOR], "the door shows that connecting works at all"
    argv = found.pop("process")
    assert argv
    assert all(words.startswith(("perl /probe.pl", "/bin/sh -c perl")) for words in argv), argv
    assert found == {"end": [""]}
    assert plant.mark not in log


# -- seen from a builder image that is the attacker's ---------------------------------------------


def hostile(place: Path, person: Person, script: str, **files: str) -> Person:
    """The person, with a builder that runs ``script`` in place of buildah."""
    data = place / "data"
    install_as_buildah(data / "runner/builders", script, **files)
    return person.having(XDG_DATA_HOME=str(data))


def test_the_sandbox_that_unpacks_a_base_image_has_no_door(
    person: Person, place: Path, registry: "RealRegistry"
) -> None:
    """A way out for one file, its own image, and nothing that opens anything."""
    base = push(registry.settings, f"{registry.host}/contained/base:1", make_image())
    with planted(place, registry.host) as plant:
        script = f"perl /probe.pl {' '.join(plant.arguments)}; find /run/runner; env; exit 3"
        victim = hostile(
            place, person.having(**plant.environ), script,
            **{"probe.pl": (SUPPORT / "probe.pl").read_text()},
        )  # fmt: skip
        ran = victim.run("submit", write_context(place / "context", f"FROM {base}\n"))
        log = build_log(person)
    assert (ran.status, ran.code) == (5, "base-image-invalid"), ran.stderr
    found = seen(log)
    assert set(found.pop("interface")) == {"lo"}
    assert set(found.pop("socket")) == {"/run/runner/door/outlet.sock"}
    argv = found.pop("process")
    assert all(word.startswith(("/run/runner/init", "perl", "/bin/sh")) for word in argv), argv
    assert set(found) == {"end"}, found
    files = [line for line in log.splitlines() if line.startswith("/run/runner/door/base/")]
    assert len(files) == len(set(files)) == 4  # manifest, configuration, two layers
    assert not [word for word in ("auth.json", "TOKEN", "PROXY", "context") if word in log]
    victim.assert_nothing_left()


def test_a_hostile_builder_sees_the_door_and_nothing_of_the_host(
    person: Person, place: Path, registry: "RealRegistry"
) -> None:
    with planted(place, registry.host) as plant:
        script = f"exec perl /probe.pl {' '.join(plant.arguments)}"
        victim = hostile(
            place, person.having(**plant.environ), script,
            **{"probe.pl": (SUPPORT / "probe.pl").read_text()},
        )  # fmt: skip
        ran = victim.run("submit", write_context(place / "context", "FROM scratch\n"))
        log = build_log(person)
    assert (ran.status, ran.code) == (5, "nothing-staged"), ran.stderr
    found = seen(log)
    assert set(found.pop("interface")) == {"lo"}
    assert set(found.pop("connected")) == {DOOR}
    assert set(found.pop("socket")) == {SOCKET}
    argv = found.pop("process")
    assert all(word.startswith(("/run/runner/init", "perl", "/bin/sh")) for word in argv), argv
    assert set(found) == {"end"}, found


def test_the_sessions_token_opens_nothing_but_the_session(
    person: Person, place: Path, registry: "RealRegistry", tools_base: str
) -> None:
    secret = json.dumps({"config": "of another team"}).encode()
    digest = _push_secret(registry, secret)
    alias = registry.host.replace(":", "_")
    own, theirs = f"/v2/{alias}/library/toolbox", f"/v2/{alias}/secret/app"
    image = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest,
            "size": len(secret),
        },
        "layers": [],
    }
    staged = "/v2/staged/image"
    wanted = {
        # What the session is for.
        ("GET", "/v2/", ""): "200",
        ("GET", f"{own}/manifests/1", ""): "200",
        # Another repository of the same registry, by name and by digest.
        ("GET", f"{theirs}/manifests/1", ""): "404",
        ("HEAD", f"{theirs}/manifests/1", ""): "404",
        ("GET", f"{theirs}/blobs/{digest}", ""): "404",
        ("GET", f"{own}/blobs/{digest}", ""): "404",
        ("HEAD", f"{own}/blobs/{digest}", ""): "404",
        ("GET", f"{staged}/blobs/{digest}", ""): "404",
        ("GET", f"{own}/../../secret/app/manifests/1", ""): "404",
        ("GET", f"/v2/{alias}/library/%2e%2e/secret/app/manifests/1", ""): "404",
        ("GET", "/v2/registry.example.com/secret/app/manifests/1", ""): "404",
        # What no builder needs.
        ("GET", "/v2/_catalog", ""): "404",
        ("GET", f"{own}/tags/list", ""): "404",
        ("GET", "http://169.254.169.254/latest/meta-data/", ""): "403",
        ("POST", f"{own}/blobs/uploads/", ""): "403",
        ("PUT", f"{own}/manifests/2", json.dumps(image)): "403",
        ("DELETE", f"{own}/manifests/1", ""): "405",
        # Taking what it cannot see into its own image.
        ("POST", f"{staged}/blobs/uploads/?mount={digest}&from=secret/app", ""): "202",
        ("PUT", f"{staged}/manifests/latest", json.dumps(image)): "404",
    }
    policy = place / "policy.json"
    policy.write_text(
        json.dumps(
            {
                "apiVersion": "runner/v1alpha1",
                "name": "test",
                "default": {"base_images": [f"{registry.host}/library/*"]},
            }
        )
    )
    words = " ".join(f"'{word}'" for request in wanted for word in request)
    # Not where it unpacks the base image, in a sandbox that has no door at all.
    script = f'case "$0 $1" in *"buildah pull") ;; *buildah*) exec perl /x.pl {words};; esac'
    victim = hostile(
        place, person, script,
        **{"x.pl": (SUPPORT / "requests.pl").read_text()},
    )  # fmt: skip
    context = write_context(place / "context", f"FROM {tools_base}\n")
    ran = victim.run("submit", context, f"--policy={policy}")
    log = build_log(person).splitlines()
    assert "nobody: 401" in log, ran.stderr
    assert "stranger: 401" in log
    # The script is run for `buildah build` and for `buildah push`; the first answers count.
    answers: dict[str, str] = {}
    for line in log:
        label, _, rest = line.partition(": ")
        if label == "answer":
            status, _, request = rest.partition(" ")
            answers.setdefault(request, status)
    assert answers == {
        f"{method} {target}": status for (method, target, _), status in wanted.items()
    }
    assert ran.status != 0


def _push_secret(registry: "RealRegistry", config: bytes) -> str:
    from policies.reference import Digest, ImageReference
    from runner.registry.auth import Anonymous
    from runner.registry.client import RegistryClient
    from runner.registry.image import OCI_MANIFEST
    from tests.support.images import MemoryBlobs, make_image

    blobs = MemoryBlobs()
    staged: StagedImage = make_image(blobs=blobs)
    target = ImageReference(registry.host, "secret/app", "1")
    secret = blobs.add(config)
    with RegistryClient(registry.settings, Anonymous()) as client:
        for digest, data in blobs.blobs.items():
            client.push_blob(target, digest, len(data), lambda d=digest: blobs.open(d))  # type: ignore[misc] # mypy cannot infer a lambda with a default
        client.put_manifest(target, OCI_MANIFEST, blobs.blobs[staged.root.digest])
    return str(Digest(secret))


# -- seen from the host ---------------------------------------------------------------------------


def test_the_host_sees_no_privileged_process_and_no_inherited_descriptor(
    person: Person, place: Path, tools_base: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN echo here; sleep 1\n")
    (place / "planted").write_text("secret")
    held: dict[str, set[int]] = {}
    inodes: set[int] = set()

    def look(event: Event) -> None:
        if not isinstance(event, Output) or not event.data.startswith(b"here"):
            return
        for process in processes.descendants(os.getpid()):
            if not any(str(person.home.sandboxes) in word for word in process.argv):
                continue
            uids = {int(uid) for uid in process.status["Uid"].split()}
            gids = {int(gid) for gid in process.status["Gid"].split()}
            held.setdefault(process.argv[0], set()).update(uids | gids)
            for entry in Path(f"/proc/{process.pid}/fd").iterdir():
                try:
                    inodes.add(entry.stat().st_ino)
                except FileNotFoundError:
                    continue

    reading, writing = os.pipe()
    secret = os.open(place / "planted", os.O_RDONLY)
    try:
        for descriptor in (reading, writing, secret):
            os.set_inheritable(descriptor, True)
        own = {os.fstat(descriptor).st_ino for descriptor in (reading, writing, secret)}
        person.submit(context, listen=look)
    finally:
        for descriptor in (reading, writing, secret):
            os.close(descriptor)
    assert {"runsc-sandbox", "runsc-gofer"} <= set(held)
    if os.geteuid() == 0:
        local = person.settings.local
        uids = set(range(local.first_uid, local.first_uid + local.uids))
        assert all(ids <= uids for ids in held.values()), held
    assert not own & inodes
    person.assert_nothing_left()

"""What the reader says of a Dockerfile, and what the real buildah does with it.

Every file of the corpus is built in one sandbox, with the command of a real build. The door is a
registry that has every image, and nothing else can be reached: all that buildah asks for is seen.
"""

import hashlib
import http.server
import io
import json
import re
import shlex
import shutil
import socketserver
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from builder.buildah import Buildah
from builder.errors import DockerfileInvalid, StageUnknown
from builder.model import CONFIG, CONTEXT_NAME, CONTEXT_TAR, WORKSPACE, BuildInput, BuildPlan
from policies.facts import DockerfileFacts
from policies.model import Isolation, Limits
from policies.reference import DOCKER_HUB, ImageReference
from runner.cli.tools import local_backend
from runner.stores.rootfs import RootfsStore
from sandbox.model import GATEWAY_PORT, GATEWAY_SOCKET, SandboxSpec
from tests.dockerfiles.corpus import CASES, Case
from tests.support.hosts import Person

pytestmark = pytest.mark.sandbox

DOOR = f"127.0.0.1:{GATEWAY_PORT}"
HOSTS = (
    *(DOCKER_HUB, "ghcr.io", "quay.io", "registry.example.com"),
    "registry.fedoraproject.org",  # what Debian's package says that `FROM fedora` means
)

ALIASES = "--short-name-alias-conf=/tmp/short-names.conf"
"""Where buildah looks for what names without a host stand for; by itself in /var/cache, which is
read-only."""

# exit(0), as an ELF program of 132 bytes: what every RUN step of the corpus runs.
NOTHING = bytes.fromhex(
    "7f454c4602010100000000000000000002003e00010000007800400000000000"
    "4000000000000000000000000000000000000000400038000100000000000000"
    "0100000005000000000000000000000000004000000000000000400000000000"
    "8400000000000000840000000000000000100000000000006a3c5831ff0f0500"
    "00000000"
)


def programs(files: Mapping[str, bytes]) -> bytes:
    """A tar in which everything may be run."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.mode, info.size = 0o755, len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def image() -> tuple[bytes, dict[str, bytes]]:
    """A manifest and its blobs: two shells that do nothing, and files to copy."""
    layer = programs({"bin/sh": NOTHING, "bin/bash": NOTHING, "app": b"app"})
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _descriptor("application/vnd.oci.image.config.v1+json", config),
        "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar", layer)],
    }
    blobs = {_digest(data): data for data in (config, layer)}
    return json.dumps(manifest).encode(), blobs


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _descriptor(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(data), "size": len(data)}


MANIFEST, BLOBS = image()


class _Door(http.server.BaseHTTPRequestHandler):
    """A registry with every image, at ``/v2/CASE/HOST/REPOSITORY``."""

    protocol_version = "HTTP/1.1"
    asked: set[tuple[str, str]]

    def do_GET(self) -> None:
        path, _, last = self.path.rpartition("/")
        name, _, kind = path.removeprefix("/v2/").rpartition("/")
        found: bytes | None = b"{}"
        if kind == "manifests":
            case, _, image = name.partition("/")
            by_digest = ":" in last
            self.asked.add((case, f"{image}{'@' if by_digest else ':'}{last}"))
            found = None if by_digest and last != _digest(MANIFEST) else MANIFEST
        elif kind == "blobs":
            found = BLOBS.get(last)
        self._answer(404 if found is None else 200, found or b"{}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if body == MANIFEST:
            self.send_header("Content-Type", json.loads(MANIFEST)["mediaType"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Not on the terminal."""


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextmanager
def door(path: Path) -> Iterator[set[tuple[str, str]]]:
    """Yields what is asked: the case, and ``HOST/REPOSITORY:TAG`` or ``HOST/REPOSITORY@DIGEST``."""
    asked: set[tuple[str, str]] = set()
    handler = type("Door", (_Door,), {"asked": asked})
    with _Server(str(path), handler) as server:
        path.chmod(0o666)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


def plan_of(case: Case) -> BuildPlan:
    """As the pipeline has it, but with a registry that is the case's alone."""
    try:
        docker_only = bool(case.read().docker_only)
    except (DockerfileInvalid, StageUnknown):
        docker_only = False
    return Buildah().plan(
        BuildInput(
            dockerfile=case.dockerfile,
            ignored=(),
            build_args=case.build_args,
            target=case.target,
            platform="linux/amd64",
            isolation=Isolation.GVISOR,
            image_format="docker" if docker_only else "oci",
            registry=f"{DOOR}/{case.name}",
            repository="made",
            token="none",
            upstreams={host: host for host in HOSTS},
        )
    )


def script_of(case: Case, plan: BuildPlan, flags: tuple[str, ...]) -> str:
    own = f"{WORKSPACE}/cases/{case.name}"
    argv = [word.replace(CONFIG, own) for word in plan.commands[plan.build_command][:-1]]
    exports = [
        f"export {name}={value.replace(CONFIG, own)}" for name, value in plan.environment.items()
    ]
    return "\n".join([*exports, shlex.join([*argv, *flags, f"{WORKSPACE}/context"])])


LOOP = """\
build() {
    log=$(. "$1/script" 2>&1)
    printf '%s\\n' "=== ${1##*/} $?
$log" >"$1/log"
}
cd /workspace/cases
for case in $1; do build "$PWD/$case"; done &
for case in $2; do build "$PWD/$case"; done
wait
for case in $1 $2; do while IFS= read -r line; do printf '%s\\n' "$line"; done <"$case/log"; done
"""


def context_of(cases: list[Case], shell: Path, flags: tuple[str, ...]) -> bytes:
    """A tar of scripts, of the context that all cases share, and of a shell of this host's."""
    files = {"loop": LOOP.encode(), "context/app": b"app", "context/dir/file": b"file"}
    files |= {f"shell/{path.name}": path.read_bytes() for path in shell.iterdir()}
    for case in cases:
        plan, own = plan_of(case), f"cases/{case.name}"
        files[f"{own}/script"] = script_of(case, plan, flags).encode()
        files |= {f"{own}/{name}": data for name, data in plan.files.items()}
        # A store of its own: buildah takes a name for the id of an image that it has.
        store = plan.files["storage.conf"]
        for shared in (b"/var/lib", b"/run/containers"):
            store = store.replace(shared, f"{WORKSPACE}/{own}".encode())
        files[f"{own}/storage.conf"] = store
    return programs(files)


@dataclass(frozen=True)
class Ran:
    """What became of one case.

    Attributes:
        images: That buildah asked the door for.
        pulled: That it said it would pull.
        addresses: That ADD tried to fetch.
    """

    built: bool
    images: set[str]
    pulled: set[str]
    addresses: set[str]
    log: str


def host_shell(directory: Path) -> Path:
    """``sh`` with its libraries: the builder's root has none that could be told to loop."""
    directory.mkdir()
    program = Path(shutil.which("sh") or "/bin/sh").resolve()
    shown = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    libraries = [word for word in shown.split() if word.startswith("/")]
    for source in (program, *map(Path, libraries)):
        name = "sh" if source == program else "ld" if "ld-linux" in source.name else source.name
        shutil.copyfile(source.resolve(), directory / name)
    return directory


def build_all(
    cases: list[Case],
    person: Person,
    builders: Path,
    work: Path,
    flags: tuple[str, ...] = (ALIASES, "--retry=0"),
) -> dict[str, Ran]:
    """Builds ``cases`` in one sandbox, two at a time, with ``flags`` besides the plan's."""
    tools = local_backend(person.home, person.settings)
    context = work / "context.tar"
    context.write_bytes(context_of(cases, host_shell(work / "shell"), flags))
    base = plan_of(cases[0])
    halves = [" ".join(case.name for case in cases[start::2]) for start in (0, 1)]
    shell = f"{WORKSPACE}/shell"
    plan = BuildPlan(
        commands=(
            ("tar", "--extract", f"--file={CONTEXT_TAR}", f"--directory={WORKSPACE}"),
            (f"{shell}/ld", "--library-path", shell, f"{shell}/sh", f"{WORKSPACE}/loop", *halves),
        ),
        build_command=1,
        environment=base.environment,
        files={},
        writable=base.writable,
        uid=base.uid,
        capabilities=base.capabilities,
        claim=base.claim,
    )
    spec = SandboxSpec(
        isolation=Isolation.GVISOR,
        limits=Limits(wall_seconds=300),
        plan=plan,
        root=(installed := RootfsStore(builders).verified("buildah")).root,
        root_digest=installed.digest,
        inputs={CONTEXT_NAME: context},
    )
    output = bytearray()
    person.home.sandboxes.mkdir(parents=True, exist_ok=True)
    place = tools.reserve("dockerfile-corpus")
    try:
        with door(place.door / GATEWAY_SOCKET) as asked:
            tools.launch(place, spec, output.extend).wait()
    finally:
        place.release()
    return _results(output.decode("utf-8", "replace"), asked)


def _results(output: str, asked: set[tuple[str, str]]) -> dict[str, Ran]:
    found = {}
    for part in f"\n{output}".split("\n=== ")[1:]:
        head, _, log = part.partition("\n")
        name, status = head.split()
        found[name] = Ran(
            built=status == "0",
            images={image for case, image in asked if case == name},
            pulled={
                _full(image.removeprefix("docker://"))
                for image in re.findall(r"Trying to pull (\S+)\.\.\.", log)
            },
            addresses=set(re.findall(r'reading "(https?://[^"]+)"', log)),
            log=log[-3000:],
        )
    return found


def _full(text: str) -> str:
    """What is asked of a registry: the digest, or else the tag."""
    image = ImageReference.parse(text)
    return (
        f"{image.name}@{image.digest}" if image.digest else f"{image.name}:{image.tag or 'latest'}"
    )


def _facts(case: Case) -> DockerfileFacts | None:
    """What the reader makes of it; None where it refuses."""
    try:
        return case.read()
    except (DockerfileInvalid, StageUnknown):
        return None


@pytest.fixture(scope="module")
def ran(person: Person, builders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """All of the corpus, built once."""
    ran = build_all(CASES, person, builders, tmp_path_factory.mktemp("corpus"))
    assert ran.keys() == {case.name for case in CASES}
    return ran


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_buildah_reaches_for_nothing_that_the_reader_did_not_name(
    case: Case, ran: dict[str, Ran]
) -> None:
    facts, did = _facts(case), ran[case.name]
    assert did.pulled <= did.images, "nothing may be asked of a registry that the door is not"
    if facts is None:
        return  # and so nothing is built
    unknown = {fact for unknown in facts.unknown for fact in unknown.facts}
    if "images" not in unknown:
        assert did.images <= {_full(str(image)) for image in facts.images}, did.log
    if "remote_adds" not in unknown:
        assert did.addresses <= set(facts.remote_adds), did.log


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reader_refuses_what_buildah_builds_for_a_reason_alone(
    case: Case, ran: dict[str, Ran]
) -> None:
    did = ran[case.name]
    assert did.built == case.builds, did.log
    refused = _facts(case) is None
    assert (case.because is not None) == (refused and did.built)


@pytest.mark.parametrize("name", ["debian", "fedora"])
def test_a_name_without_a_host_is_an_image_at_docker_hub(
    name: str, person: Person, builders: Path, tmp_path: Path
) -> None:
    (case,) = (case for case in CASES if case.name == "scratch")
    case = replace(case, dockerfile=f"FROM {name}\n".encode())
    did = build_all([case], person, builders, tmp_path, flags=())[case.name]
    assert did.built, did.log
    assert did.images == {f"docker.io/library/{name}:latest"}

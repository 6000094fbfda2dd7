"""The docker backend with a real Engine: the same build, and every way in which it can end."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from policies import loader
from policies.model import Isolation, plain
from runner.cancel import Cancellation
from runner.errors import (
    BuildFailed,
    Cancelled,
    DiskExceeded,
    EngineLost,
    EngineUnavailable,
    IsolationMismatch,
    IsolationUnavailable,
    LogExceeded,
    MemoryExceeded,
    PidsExceeded,
    PolicyDenied,
    RunnerError,
    RuntimeUnknown,
    SandboxFailed,
    TimeExceeded,
)
from runner.events import Event, Observed, Output, StageStarted
from sandbox.docker.containers import NAME_LABEL
from sandbox.docker.image import image_name
from sandbox.docker.place import of_state
from tests.support.backends import on_host
from tests.support.engine import REMAPPED, RealEngine, remapping, running_engine
from tests.support.hosts import Built, Person, read_until, registry_lines, write_context
from tests.support.toolbox import toolbox_tar

if TYPE_CHECKING:
    from runner.settings import Settings

pytestmark = [pytest.mark.sandbox, pytest.mark.registry, pytest.mark.root]

SUPPORT = Path(__file__).parent.parent / "support"
POLICY = "apiVersion: runner/v1alpha1\nname: small\ndefault:\n  limits:\n"


def on(person: Person, engine: RealEngine, **docker: str | bool) -> Person:
    """The same person with other runtimes, when not on the command line."""
    return replace(person, settings=engine.settings(person.settings, **docker))


def small(place: Path, **limits: int) -> Path:
    """A policy that allows less."""
    path = place / "policy.yaml"
    lines = [f"    {name}: {most}\n" for name, most in {"pids": 4096, **limits}.items()]
    path.write_text(POLICY + "".join(lines))
    return path


def containers(person: Person, engine: RealEngine) -> list[dict[str, Any]]:
    """The engine's own word about every container of ``person``."""
    with engine.client() as client:
        found = client.labelled(of_state(person.home.sandboxes))
        return [client._client.inspect_container(each) for each, _ in found]


def networked(person: Person, engine: RealEngine, place: Path, base: str) -> Person:
    """The same person beside the engine, whose gVisor has a network; offline, with ``base``."""
    online, offline = place / "online.toml", place / "offline.toml"
    common = f'[docker]\nsocket = "{engine.socket}"\nrunsc = "runsc-networked"\n'
    common += "".join(registry_lines(*each) for each in person.settings.registries.items())
    common += '\n[base_images]\nlocal = ["**"]\n'
    online.write_text(common)
    offline.write_text(f"{common}offline = true\n")
    pulled = person.having(RUNNER_CONFIG=str(online)).run("base", "pull", base)
    assert pulled.status == 0, pulled.stderr
    return replace(person, before=engine.inside).having(RUNNER_CONFIG=str(offline))


def evidence(person: Person) -> dict[str, Any]:
    """Of the latest build."""
    latest = max(person.home.builds.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    found: dict[str, Any] = json.loads((latest / "evidence.json").read_text())
    return found


class WhileBuilding:
    """Does something once, when the build writes ``ready``."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._log = b""
        self.done = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, Output):
            self._log += event.data
        if not self.done and b"\nready\n" in self._log:
            self.done = True
            self._act()


WAITS = "RUN echo; echo ready; sleep 300\n"


def kill_a_build(person: Person, place: Path, base: str) -> None:
    """Leaves what a runner leaves that was killed while its build ran."""
    context = write_context(place / "context", f"FROM {base}\n{WAITS}")
    with person.start("submit", "--backend", "docker", "--json", context) as process:
        read_until(process, process.stdout, "echo ready")
        process.kill()


# -- the same build --------------------------------------------------------------------------------


def test_it_is_the_image_that_the_local_backend_makes_with_the_same_evidence(
    person: Person, docker_person: Person, place: Path, tools_base: str
) -> None:
    context = write_context(
        place / "context",
        f"FROM {tools_base}\nCOPY Dockerfile /srv/\n"
        "RUN echo made >/made && chown 7:8 /made && chmod 4750 /made\n",
    )
    local, docker = (
        each.submit(context, reproducible=True).result for each in (person, docker_person)
    )
    assert docker.digest == local.digest
    assert docker.builder == local.builder
    assert docker.starts_from == local.starts_from
    assert plain(docker.evidence).keys() == plain(local.evidence).keys()
    assert docker.evidence.kernel_release == local.evidence.kernel_release
    assert docker.evidence.interfaces == local.evidence.interfaces == ("lo",)
    assert docker.usage.memory_peak_bytes
    assert docker.usage.cpu_seconds
    docker_person.assert_nothing_left()


def test_the_engine_was_asked_for_what_it_should(
    docker_person: Person, engine: RealEngine, place: Path, tools_base: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\n{WAITS}")
    cancellation = Cancellation()
    seen: list[dict[str, Any]] = []

    def look() -> None:
        seen.extend(containers(docker_person, engine))
        cancellation.cancel()

    with pytest.raises(Cancelled):
        docker_person.submit(context, listen=WhileBuilding(look), cancellation=cancellation)
    (container,) = seen
    host, config = container["HostConfig"], container["Config"]
    assert (host["Runtime"], host["NetworkMode"]) == ("runsc", "none")
    assert host["ReadonlyRootfs"] is True
    assert (host["Privileged"], host["AutoRemove"], host["PublishAllPorts"]) == (False,) * 3
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges" in host["SecurityOpt"]
    assert not any("unconfined" in option for option in host["SecurityOpt"])
    assert host["Memory"] == host["MemorySwap"] > 0
    assert (host["CpuQuota"], host["CpuPeriod"], host["PidsLimit"]) == (200_000, 100_000, 4096)
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["LogConfig"]["Type"] == "none"
    assert not host["Binds"]
    assert not host["Devices"]
    (mount,) = host["Mounts"]
    assert (mount["Type"], mount["Target"], mount["ReadOnly"]) == ("volume", "/run/runner", True)
    assert all("size=" in options for options in host["Tmpfs"].values())
    assert config["Env"] == [each for each in config["Env"] if "PROXY" not in each.upper()]
    docker_person.assert_nothing_left()


def test_an_ordinary_user_needs_the_socket_and_nothing_else(
    stranger: Person, engine: RealEngine, place: Path, tools_base: str
) -> None:
    assert stranger.uid is not None
    own = place / "docker.toml"
    own.write_text(stranger.config.read_text() + f'[docker]\nsocket = "{engine.socket}"\n')
    own.chmod(0o644)
    somebody = stranger.having(RUNNER_CONFIG=str(own))
    context = write_context(place / "context", f"FROM {tools_base}\nRUN echo made >/made\n")
    refused = somebody.run("submit", "--backend", "docker", context)
    assert (refused.status, "engine-unavailable" in refused.stderr) == (4, True), refused.stderr
    os.chown(engine.socket, 0, stranger.uid)
    try:
        ran = somebody.run("submit", "--backend", "docker", context)
    finally:
        os.chown(engine.socket, 0, 0)
    assert ran.status == 0, ran.stderr
    somebody.assert_nothing_left()


# -- how it can end --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "limits", "error"),
    [
        ("exit 7", {}, BuildFailed),
        ("perl -e '$a = q(x) x 2e9'", {"memory_bytes": 600 << 20}, MemoryExceeded),
        ("cat /dev/zero >/large", {"disk_bytes": 192 << 20}, DiskExceeded),
        ("sleep 300", {"wall_seconds": 12}, TimeExceeded),
        ("perl -e 'print q(x) x 1e6 while 1'", {"log_bytes": 1 << 20}, LogExceeded),
        ("perl -e 'fork for 1..12; sleep 60'", {"pids": 300}, PidsExceeded),
    ],
    ids=["failed", "memory", "disk", "time", "log", "pids"],
)  # fmt: skip
def test_each_ending_is_told_apart(
    docker_person: Person,
    place: Path,
    tools_base: str,
    run: str,
    limits: dict[str, int],
    error: type[RunnerError],
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN {run}\n")
    docker_person.submit(write_context(place / "first", f"FROM {tools_base}\n"))  # unpacks it
    with pytest.raises(error) as raised:
        docker_person.submit(context, policies=(small(place, **limits),))
    assert type(raised.value) is error
    docker_person.assert_nothing_left()


# The SDK forgets the socket by which it could not connect.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_engine_that_goes_away_ends_the_build_and_gc_cleans_up_when_it_is_back(
    docker_person: Person, engine: RealEngine, place: Path, tools_base: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\n{WAITS}")
    try:
        with pytest.raises(EngineLost):
            docker_person.submit(context, listen=WhileBuilding(engine.kill))
    finally:
        engine.start()
    gc = docker_person.run("gc")
    assert gc.status == 0, gc.stderr
    docker_person.assert_nothing_left()
    docker_person.submit(write_context(place / "next", f"FROM {tools_base}\nRUN true\n"))


def test_gc_says_that_an_engine_is_down_and_removes_the_rest(
    docker_person: Person, engine: RealEngine, place: Path, tools_base: str
) -> None:
    kill_a_build(docker_person, place, tools_base)
    engine.stop()
    try:
        gc = docker_person.run("gc")
        assert (gc.status, "engine-unavailable" in gc.stderr) == (4, True), gc.stderr
    finally:
        engine.start()
    assert docker_person.run("gc").status == 0
    docker_person.assert_nothing_left()


def test_a_killed_runners_sandbox_ends_by_itself(
    docker_person: Person, engine: RealEngine, place: Path, tools_base: str
) -> None:
    kill_a_build(docker_person, place, tools_base)
    end = time.monotonic() + 15
    while any(each["State"]["Running"] for each in containers(docker_person, engine)):
        assert time.monotonic() < end, "the container goes on without its runner"
        time.sleep(0.1)
    assert docker_person.run("gc").status == 0
    docker_person.assert_nothing_left()


def test_somebody_who_removes_the_container_ends_the_build(
    docker_person: Person, engine: RealEngine, place: Path, tools_base: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\n{WAITS}")

    def remove() -> None:
        with engine.client() as client:
            for each in containers(docker_person, engine):
                client.remove(each["Id"])

    with pytest.raises(SandboxFailed):
        docker_person.submit(context, listen=WhileBuilding(remove))
    docker_person.assert_nothing_left()


def test_a_builder_image_that_is_gone_is_made_again(
    docker_person: Person, engine: RealEngine, place: Path, tools_base: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN true\n")
    digest = docker_person.submit(context).result.builder.digest
    with engine.client() as client:
        client.remove_image(image_name(digest))
        assert docker_person.submit(context).result.builder.digest == digest
        assert client.image(image_name(digest)) is not None


def test_an_image_of_another_root_under_the_name_of_ours_is_not_used(
    docker_person: Person, engine: RealEngine, place: Path, tools_base: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN true\n")
    digest = docker_person.submit(context).result.builder.digest
    (place / "root.tar").write_bytes(toolbox_tar())
    with (place / "root.tar").open("rb") as tar, engine.client() as client:
        client.import_image(tar, image_name(digest), {})
    assert docker_person.submit(context).result.builder.digest == digest


@pytest.mark.parametrize(
    ("runtime", "error"),
    [
        ("no-such-runtime", RuntimeUnknown),
        ("broken", SandboxFailed),
    ],
)
def test_a_runtime_that_is_not_there_or_does_not_start_is_said_to_be(
    docker_person: Person,
    engine: RealEngine,
    place: Path,
    runtime: str,
    error: type[RunnerError],
) -> None:
    context = write_context(place / "context", "FROM scratch\nCOPY Dockerfile /\n")
    with pytest.raises(error):
        on(docker_person, engine, runsc=runtime).submit(context)
    docker_person.assert_nothing_left()


def test_no_engine_is_said_before_anything_is_read(docker_person: Person, place: Path) -> None:
    nowhere = replace(
        docker_person,
        settings=docker_person.settings.model_copy(
            update={
                "docker": docker_person.settings.docker.model_copy(
                    update={"socket": str(place / "none.sock")}
                )
            }
        ),
    )
    events: list[Event] = []
    context = write_context(place / "context", "FROM scratch\n")
    with pytest.raises(EngineUnavailable):
        nowhere.submit(context, listen=events.append)
    assert [event.stage for event in events if isinstance(event, StageStarted)] == ["prepare"]


# -- what it must be -------------------------------------------------------------------------------


def test_a_runtime_that_is_not_what_its_name_says_gets_nothing(
    docker_person: Person, engine: RealEngine, place: Path
) -> None:
    """As a RuntimeClass whose handler is runc: what the kernel shows decides, not a name."""
    context = write_context(place / "context", "FROM scratch\nCOPY Dockerfile /\n")
    events: list[Event] = []
    with pytest.raises(IsolationMismatch, match="asked for gvisor"):
        on(docker_person, engine, runsc="not-gvisor").submit(context, listen=events.append)
    assert not any(isinstance(event, (Observed, Output)) for event in events)


KATA = "apiVersion: runner/v1alpha1\nname: kata\ndefault:\n  isolation: kata\n"


def test_kata_is_asked_for_by_the_shims_name_which_this_engine_does_not_know(
    docker_person: Person, engine: RealEngine, place: Path
) -> None:
    (place / "kata.yaml").write_text(KATA)
    context = write_context(place / "context", "FROM scratch\nCOPY Dockerfile /\n")
    with pytest.raises(IsolationUnavailable):
        docker_person.submit(context, policies=(place / "kata.yaml",))
    (place / "root.tar").write_bytes(toolbox_tar())
    config = {
        "Image": "tests/any:1",
        "Cmd": ["/x"],
        "HostConfig": {"Runtime": "io.containerd.kata.v2"},
    }
    with (place / "root.tar").open("rb") as tar, engine.client() as client:
        client.import_image(tar, "tests/any:1", {})
        with pytest.raises(RuntimeUnknown, match=r"io\.containerd\.kata\.v2"):
            client.create("kata", config)


@contextmanager
def watched(person: Person, engine: RealEngine) -> Iterator[list[dict[str, Any]]]:
    """Every container that ``person`` has while the block runs, as the engine had it last."""
    seen: dict[str, dict[str, Any]] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            try:
                seen.update({each["Id"]: each for each in containers(person, engine)})
            except Exception:  # noqa: BLE001 - it may be gone between two questions
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    found: list[dict[str, Any]] = []
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found.extend(seen.values())


def test_what_only_calls_itself_kata_gets_a_network_of_two_and_nothing_else(
    docker_person: Person, engine: RealEngine, place: Path
) -> None:
    """The engine is asked as it would be for a real one; the kernel inside gives it away."""
    (place / "kata.yaml").write_text(KATA)
    config = place / "kata.toml"
    config.write_text(f'[docker]\nsocket = "{engine.socket}"\nkata = "not-kata"\n')
    context = write_context(place / "context", "FROM scratch\nCOPY Dockerfile /\n")
    somebody = replace(docker_person, before=engine.inside).having(RUNNER_CONFIG=str(config))
    with watched(docker_person, engine) as seen:
        ran = somebody.run(
            "submit", "--backend", "docker", "--policy", place / "kata.yaml", context
        )
    assert (ran.status, "isolation-mismatch" in ran.stderr) == (4, True), ran.stderr
    asked = {each["HostConfig"]["Runtime"]: each for each in seen}
    kata, relay = asked["not-kata"], asked["runc"]
    limits = {each["Name"]: each["Hard"] for each in kata["HostConfig"]["Ulimits"]}
    assert limits["nproc"] == 4096, "Kata keeps no pids limit: the guest's kernel has to"
    assert kata["HostConfig"]["NetworkMode"] == relay["HostConfig"]["NetworkMode"] != "none"
    assert relay["HostConfig"]["CapDrop"] == ["ALL"]
    assert not relay["HostConfig"]["CapAdd"]
    docker_person.assert_nothing_left()


# -- who it is on the host -------------------------------------------------------------------------

ROOTLESS = "apiVersion: runner/v1alpha1\nname: strict\ndefault:\n  rootless: true\n"


def test_policy_may_ask_for_more_than_a_plain_engine_has(
    docker_person: Person, place: Path, tools_base: str
) -> None:
    (place / "rootless.yaml").write_text(ROOTLESS)
    context = write_context(place / "context", f"FROM {tools_base}\nRUN true\n")
    with pytest.raises(PolicyDenied, match="rootless"):
        docker_person.submit(context, policies=(place / "rootless.yaml",))
    seen = docker_person.submit(context).result.evidence
    assert {each.uid for each in on_host(seen)} == {0}
    assert not any(each.initial_user_namespace for each in on_host(seen))


@pytest.fixture(scope="module")
def remapped(
    playground: Path, builders: Path, settings: "Settings"
) -> Iterator[tuple[Person, RealEngine]]:
    """An engine with userns-remap, and somebody who builds with it."""
    directory = playground / "remapped"
    directory.mkdir()
    with running_engine(directory, remapping()) as engine:
        person = Person.move_in(playground / "remapped-me", engine.settings(settings), builders)
        yield replace(person, backend="docker"), engine
        person.move_out()


def assert_of_the_range(processes: list[dict[str, Any]]) -> None:
    assert {each["uid"] for each in processes} <= set(range(REMAPPED, REMAPPED + 65536))
    assert {each["role"] for each in processes} >= {"sandbox", "gofer"}


def test_with_userns_remap_nobody_of_the_sandbox_is_root(
    remapped: tuple[Person, RealEngine], place: Path, tools_base: str
) -> None:
    person, engine = remapped
    (place / "rootless.yaml").write_text(ROOTLESS)
    context = write_context(place / "context", f"FROM {tools_base}\nRUN chown 7:8 /etc\n")
    person.submit(context, policies=(place / "rootless.yaml",))
    assert_of_the_range(evidence(person)["outside"]["processes"])
    somebody = networked(person, engine, place, tools_base)
    ran = somebody.run(
        "submit", "--backend", "docker", "--policy", place / "rootless.yaml", context
    )
    assert ran.status == 0, ran.stderr
    assert set(evidence(person)["interfaces"]) == {"lo", "eth0"}
    assert_of_the_range(evidence(person)["outside"]["processes"])
    person.assert_nothing_left()


# -- isolation container ---------------------------------------------------------------------------

TRUSTING = """\
apiVersion: runner/v1alpha1
name: own
trusted: [{name: me, when: "identity.kind == 'unix' && identity.name == 'root'"}]
default:
  isolation: container
  backends: [docker]
  builders: [buildah]
  capabilities: ["*"]
  network: registries
  base_images: ["**"]
"""


def trusting(person: Person, context: Path, place: Path) -> Built:
    """A build that the operator's policy trusts with the host's own kernel."""
    (place / "own.yaml").write_text(TRUSTING)
    tools = replace(person.tools(), policies=[loader.read(place / "own.yaml")])
    return person.submit(context, tools=tools)


@pytest.mark.parametrize("mapped", [False, True], ids=["plain", "remapped"])
def test_a_trusted_build_may_have_a_container(
    request: pytest.FixtureRequest, place: Path, tools_base: str, mapped: bool
) -> None:
    person: Person = (
        request.getfixturevalue("remapped")[0]
        if mapped
        else request.getfixturevalue("docker_person")
    )
    context = write_context(
        place / "context",
        f"FROM {tools_base}\nRUN set -e; echo x >/dev/null; echo x >/dev/shm/x; chown 7:8 /etc\n",
    )
    result = trusting(person, context, place).result
    assert result.evidence.isolation is Isolation.CONTAINER
    assert result.evidence.interfaces == ("lo",)
    assert set(result.provided.values()) == {"pulled"}
    (process,) = on_host(result.evidence)
    assert (process.seccomp, process.no_new_privileges) == (2, True)
    assert process.initial_user_namespace is not mapped
    person.assert_nothing_left()


def test_an_untrusted_build_never_has_one(docker_person: Person, place: Path) -> None:
    (place / "loose.yaml").write_text(TRUSTING.replace("name == 'root'", "name == 'nobody'"))
    tools = replace(docker_person.tools(), policies=[loader.read(place / "loose.yaml")])
    context = write_context(place / "context", "FROM scratch\nCOPY Dockerfile /\n")
    assert docker_person.submit(context, tools=tools).result.evidence.isolation is Isolation.GVISOR


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["runsc", "runsc-networked"])
def test_doctor_starts_a_sandbox_and_tries_its_door(
    docker_person: Person, engine: RealEngine, place: Path, runtime: str
) -> None:
    config = place / "config.toml"
    config.write_text(f'[docker]\nsocket = "{engine.socket}"\nrunsc = "{runtime}"\n')
    somebody = replace(docker_person, before=engine.inside).having(RUNNER_CONFIG=str(config))
    ran = somebody.run("doctor", "--backend", "docker", "--json")
    rows = {row["name"]: row for row in json.loads(ran.stdout)}
    assert rows["sandbox"]["verdict"] == "ok", rows["sandbox"]
    assert rows["identity"]["verdict"] == "warn"
    opens = runtime == "runsc"
    assert rows["door"]["verdict"] == ("ok" if opens else "warn")
    if not opens:
        assert "--host-uds=open" in rows["door"]["mend"]
    docker_person.assert_nothing_left()


def test_what_the_engine_has_of_a_place_that_is_gone_is_removed(
    docker_person: Person, engine: RealEngine, place: Path, tools_base: str
) -> None:
    docker_person.submit(write_context(place / "context", f"FROM {tools_base}\nRUN true\n"))
    (reference,) = {image_name(f"sha256:{root.parent.name}")
                    for root in docker_person.home.builders.glob("*/*/root")}  # fmt: skip
    labels = {**of_state(docker_person.home.sandboxes), NAME_LABEL: "gone"}
    with engine.client() as client:
        client.create("orphan", {"Image": reference, "Cmd": ["/x"], "Labels": labels})
        client.create_network("orphan", {"labels": labels})
        ran = docker_person.run("gc")
        assert client.image(reference) is not None, "its root filesystem is installed"
    assert ran.status == 0, ran.stderr
    assert "container of sandbox gone" in ran.stdout + ran.stderr
    assert "network of sandbox gone" in ran.stdout + ran.stderr
    docker_person.assert_nothing_left()

"""The docker backend up to where a kernel would be needed, with an engine that is played."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.model import Isolation
from sandbox.cgroups import Group
from sandbox.docker import backend as docker
from sandbox.docker import machine as machines
from sandbox.docker.backend import DockerBackend, Registered, Runtimes
from sandbox.docker.containers import Container
from sandbox.docker.engine import Info, Runtime
from sandbox.docker.machine import DockerMachine
from sandbox.docker.place import DockerPlace
from sandbox.errors import (
    EngineLost,
    EngineUnavailable,
    IsolationMismatch,
    IsolationUnavailable,
    RuntimeUnknown,
    SandboxFailed,
)
from sandbox.model import Ending, Provided, SandboxSpec
from tests.support.spoken import HANG_UP, INFO, Answer, SpokenEngine, frame, speaking

NETWORKED = {"runc": {"path": "runc"}, "runsc": {"path": "/usr/bin/runsc"}}
READY = frame(b"runner-relay 1\n")
STATE = {"Pid": 0, "Running": False, "OOMKilled": False, "ExitCode": 0, "Error": ""}


@pytest.fixture
def spoken(tmp_path: Path) -> Iterator[SpokenEngine]:
    with speaking(tmp_path / "docker.sock") as engine:
        engine.says("POST /images/create")
        engine.says("POST /networks/create", {"Id": "n"}, status=201)
        engine.says("POST /containers/create", {"Id": "c"}, status=201)
        engine.says("POST /containers/c/start", status=204)
        engine.says("POST /containers/c/kill", status=204)
        engine.says("POST /containers/c/wait", {"StatusCode": 0})
        shows(engine)
        engine.pieces = (frame(b"x"),)
        yield engine


def shows(engine: SpokenEngine, address: str = "10.0.0.2", **state: Any) -> None:
    """How the container is."""
    networks = {"untrusted-runner-b": {"IPAddress": address}}
    engine.says(
        "GET /containers/c/json",
        {"State": {**STATE, **state}, "NetworkSettings": {"Networks": networks}},
    )


@pytest.fixture
def backend(spoken: SpokenEngine, tmp_path: Path) -> DockerBackend:
    return backend_of(spoken, Runtimes())


def backend_of(spoken: SpokenEngine, runtimes: Runtimes) -> DockerBackend:
    sandboxes = spoken.socket.parent / "sandboxes"
    return DockerBackend(sandboxes, socket=spoken.socket, runtimes=runtimes)


@pytest.fixture
def place(backend: DockerBackend) -> Iterator[DockerPlace]:
    place = backend.reserve("b")
    yield place
    place.release()


@pytest.fixture
def planted(spec: SandboxSpec, tmp_path: Path) -> SandboxSpec:
    (tmp_path / "root").mkdir()
    plan = replace(spec.plan, commands=(("true",),))
    return replace(spec, root=tmp_path / "root", plan=plan)


def info(**changed: Any) -> Info:
    return Info.model_validate({**INFO, **changed})


def asked(engine: SpokenEngine) -> list[dict[str, Any]]:
    """Every container that was asked for."""
    return [each.json for each in engine.saw("POST /containers/create")]


# -- runtimes --------------------------------------------------------------------------------------


def test_each_isolation_has_the_name_that_was_configured() -> None:
    names = Runtimes(container="crun", gvisor="gv", kata="kt")
    assert [names.of(each, info()) for each in Isolation] == ["crun", "gv", "kt"]


def test_what_the_engine_has_is_taken(backend: DockerBackend) -> None:
    offer = backend.offer()
    assert offer.isolations == {Isolation.GVISOR, Isolation.CONTAINER}
    assert isinstance(offer.refused[Isolation.KATA], RuntimeUnknown)
    assert offer.rootless is False
    assert backend.runtime(info(), Isolation.GVISOR).name == "runsc"


@pytest.mark.parametrize("isolation", [Isolation.GVISOR, Isolation.CONTAINER])
def test_what_the_engine_has_not_is_unknown_with_where_to_register_it(
    backend: DockerBackend, isolation: Isolation
) -> None:
    with pytest.raises(RuntimeUnknown, match=f"which {isolation} is configured") as raised:
        backend.runtime(info(Runtimes={}), isolation)
    assert "deploy/docker" in raised.value.advice


@pytest.mark.parametrize(
    ("version", "name", "known"),
    [
        ("22.0.6", "io.containerd.kata.v2", False),
        ("23.0.0", "io.containerd.kata.v2", True),
        ("28.1.1", "io.containerd.kata.v2", True),
        ("28.1.1", "kata", False),
    ],
)
def test_a_shim_goes_by_its_own_name_from_engine_23_on(
    spoken: SpokenEngine, monkeypatch: pytest.MonkeyPatch, version: str, name: str, known: bool
) -> None:
    monkeypatch.setattr(DockerBackend, "_kata_version", lambda *_: "3.31.0")
    backend = backend_of(spoken, Runtimes(kata=name))
    if known:
        assert backend.runtime(info(ServerVersion=version), Isolation.KATA).name == name
    else:
        with pytest.raises(RuntimeUnknown):
            backend.runtime(info(ServerVersion=version), Isolation.KATA)


def test_the_override_for_an_old_kata_shows(spoken: SpokenEngine) -> None:
    assert backend_of(spoken, Runtimes(kata_older=True)).kata_older
    assert not backend_of(spoken, Runtimes()).kata_older


@pytest.mark.parametrize(
    ("isolation", "arguments", "expected"),
    [
        (Isolation.CONTAINER, [], True),
        (Isolation.GVISOR, ["--host-uds=open"], True),
        (Isolation.GVISOR, ["-host-uds=all"], True),
        (Isolation.GVISOR, ["--host-uds=open", "--host-uds=none"], False),
        (Isolation.GVISOR, ["--host-uds=create"], False),
        (Isolation.GVISOR, None, False),
        (Isolation.KATA, ["--host-uds=open"], False),
    ],
)
def test_a_socket_is_the_door_where_the_runtime_lets_it_through(
    isolation: Isolation, arguments: list[str] | None, expected: bool
) -> None:
    entry = Runtime.model_validate({"path": "/x", "runtimeArgs": arguments})
    assert Registered("runsc", "1", entry).takes_sockets(isolation) is expected


@pytest.mark.parametrize("lost", ["MemoryLimit", "CpuCfsQuota", "PidsLimit"])
def test_an_engine_that_keeps_no_limits_offers_nothing(backend: DockerBackend, lost: str) -> None:
    for isolation in Isolation:
        with pytest.raises(IsolationUnavailable, match="cannot limit"):
            backend.runtime(info(**{lost: False}), isolation)


def test_a_rootless_engine_is_refused_by_its_name(backend: DockerBackend) -> None:
    with pytest.raises(IsolationUnavailable, match="rootless"):
        backend.runtime(info(SecurityOptions=["name=rootless"]), Isolation.GVISOR)


def test_a_runsc_that_is_too_old_is_refused(backend: DockerBackend, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho runsc version release-20221219.0\n")
    old.chmod(0o755)
    with pytest.raises(IsolationUnavailable, match="20221219"):
        backend.runtime(info(Runtimes={"runsc": {"path": str(old)}}), Isolation.GVISOR)


def test_a_kata_that_is_registered_by_a_path_is_asked_for_its_own_version(
    backend: DockerBackend, tmp_path: Path
) -> None:
    old = tmp_path / "kata-runtime"
    old.write_text("#!/bin/sh\necho 'Kata Containers containerd shim: version: 3.1.0'\n")
    old.chmod(0o755)
    with pytest.raises(IsolationUnavailable, match=r"3\.1\.0"):
        backend.runtime(info(Runtimes={"kata": {"path": str(old)}}), Isolation.KATA)


def test_base_images_are_copied_and_pulled_on_the_hosts_kernel(backend: DockerBackend) -> None:
    assert backend.provides(Isolation.GVISOR) is Provided.COPIED
    assert backend.provides(Isolation.CONTAINER) is Provided.PULLED


# -- places ----------------------------------------------------------------------------------------


def test_without_an_engine_there_is_no_place(tmp_path: Path) -> None:
    backend = DockerBackend(tmp_path, socket=tmp_path / "none.sock", runtimes=Runtimes())
    with pytest.raises(EngineUnavailable):
        backend.reserve("b")


def test_a_place_that_cannot_be_had_leaves_no_connection(
    backend: DockerBackend, spoken: SpokenEngine
) -> None:
    spoken.says("GET /info", {})
    with pytest.raises(EngineUnavailable):  # an open one would be a ResourceWarning
        backend.reserve("b")


# -- launching -------------------------------------------------------------------------------------


def launch(backend: DockerBackend, place: DockerPlace, spec: SandboxSpec) -> None:
    backend.launch(place, spec, lambda _: None, lambda _: None)


def test_rootless_is_not_had_from_an_engine_that_runs_containers_as_host_root(
    backend: DockerBackend, place: DockerPlace, planted: SandboxSpec, spoken: SpokenEngine
) -> None:
    with pytest.raises(IsolationUnavailable, match="rootless") as raised:
        launch(backend, place, replace(planted, rootless=True))
    assert "userns-remap" in raised.value.advice
    assert asked(spoken) == []


def test_a_sandbox_that_shows_no_canary_is_killed(
    backend: DockerBackend, place: DockerPlace, planted: SandboxSpec, spoken: SpokenEngine
) -> None:
    spoken.pieces = (frame(b"runsc: no such thing\n", 2),)
    with pytest.raises(SandboxFailed, match="no such thing"):
        launch(backend, place, planted)
    (container,) = asked(spoken)
    assert container["HostConfig"]["NetworkMode"] == "none"
    assert spoken.saw("POST /containers/c/kill")
    assert spoken.saw("POST /networks/create") == []


def test_a_runtime_that_does_not_start_it_is_told(
    backend: DockerBackend, place: DockerPlace, planted: SandboxSpec, spoken: SpokenEngine
) -> None:
    spoken.pieces = (b"",)
    spoken.says("POST /containers/c/start", {"message": "OCI runtime create failed"}, status=500)
    with pytest.raises(SandboxFailed, match="OCI runtime create failed"):
        launch(backend, place, planted)


def test_a_sandbox_whose_processes_the_host_does_not_show_is_refused(
    backend: DockerBackend,
    place: DockerPlace,
    planted: SandboxSpec,
    spoken: SpokenEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _: "abcd")
    log = b"Starting gVisor...\n".hex()
    canary = (
        f"runner-canary 1 nonce=abcd release={b'4.4.0'.hex()} version= boot_id= log={log} gvisor= "
    )
    canary += f"ids={b'0:0:0'.hex()} mounts= net_dev= reached=\n"
    spoken.pieces = (frame(canary.encode()),)
    with pytest.raises(IsolationMismatch, match="no sandbox process"):
        launch(backend, place, planted)
    assert b"release" not in spoken.written
    assert spoken.saw("POST /containers/c/kill")


# -- the network of two ----------------------------------------------------------------------------


def test_without_sockets_a_relay_comes_first_by_the_runtime_that_was_configured_for_containers(
    spoken: SpokenEngine, planted: SandboxSpec
) -> None:
    spoken.says("GET /info", {**INFO, "Runtimes": NETWORKED})
    spoken.pieces = (READY[:11], READY[11:])
    backend = backend_of(spoken, Runtimes(container="crun"))
    place = backend.reserve("b")
    with pytest.raises(SandboxFailed, match="did not start the sandbox"):  # it is no canary
        launch(backend, place, planted)
    relay, sandbox = asked(spoken)
    assert relay["HostConfig"]["Runtime"] == "crun"
    assert sandbox["HostConfig"]["Runtime"] == "runsc"
    assert relay["HostConfig"]["NetworkMode"] == sandbox["HostConfig"]["NetworkMode"]
    (network,) = spoken.saw("POST /networks/create")
    assert network.json["Name"] == sandbox["HostConfig"]["NetworkMode"] == "untrusted-runner-b"
    plan = (place.guest / "plan").read_bytes().split(b"\0")
    assert b"10.0.0.2:5000" in plan
    place.release()


@pytest.mark.parametrize(
    ("pieces", "says"),
    [((b"",), "no output"), ((frame(b"runner: init: bind\n"),), "init: bind")],
)
def test_a_relay_that_does_not_come_up_is_no_door(
    backend: DockerBackend,
    place: DockerPlace,
    planted: SandboxSpec,
    spoken: SpokenEngine,
    pieces: tuple[bytes, ...],
    says: str,
) -> None:
    spoken.says("GET /info", {**INFO, "Runtimes": NETWORKED})
    spoken.pieces = pieces
    with pytest.raises(SandboxFailed, match=f"the relay did not start.*{says}"):
        launch(backend, place, planted)
    assert len(asked(spoken)) == 1


# -- how it ended ----------------------------------------------------------------------------------


@pytest.fixture
def machine(place: DockerPlace, planted: SandboxSpec) -> Iterator[DockerMachine]:
    container = Container(
        image="i", runtime="runsc", guest=str(place.guest), network="none", labels={},
        apparmor=False,
    )  # fmt: skip
    machine = DockerMachine(place, planted, container, None)
    yield machine
    machine.close()


@pytest.mark.parametrize(("state", "ending"), [({}, None), ({"OOMKilled": True}, Ending.MEMORY)])
def test_the_engine_says_what_became_of_it(
    machine: DockerMachine, spoken: SpokenEngine, state: dict[str, Any], ending: Ending | None
) -> None:
    shows(spoken, **state)
    assert machine.sample() is None
    remains = machine.reap()
    assert (remains.status, remains.ending) == (0, ending)


def test_its_group_is_read_from_the_first_look_on_and_what_was_seen_stays(
    machine: DockerMachine,
    spoken: SpokenEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(2, (tmp_path / "group",))
    group.directories[0].mkdir()
    seen = {"memory.peak": "42", "cpu.stat": "usage_usec 1500000\n", "pids.events": "max 1\n"}
    for name, text in seen.items():
        (group.directories[0] / name).write_text(text)
    monkeypatch.setattr(Group, "of", lambda pid: group if pid == 7 else None)
    shows(spoken, Pid=7, Running=True)
    machine.processes()
    machine.processes()
    assert machine.sample() is None  # the kernel keeps them
    for name in seen:  # as the engine removes the group
        (group.directories[0] / name).unlink()
    remains = machine.reap()
    assert remains.ending is Ending.PIDS
    assert (remains.cpu_seconds, remains.memory_peak_bytes) == (1.5, 42)


def test_somebody_removed_it(machine: DockerMachine, spoken: SpokenEngine) -> None:
    spoken.says("GET /containers/c/json", {"message": "no such container"}, status=404)
    for ask in (machine.processes, machine.reap):
        with pytest.raises(SandboxFailed, match="somebody removed"):
            ask()


def test_killing_does_not_fail_where_the_engine_is_gone(
    machine: DockerMachine, spoken: SpokenEngine
) -> None:
    spoken.answers["POST /containers/c/kill"] = HANG_UP
    machine.kill()
    machine.kill()
    assert machine.read() == b""


def test_an_engine_that_went_away_while_it_ran_is_lost(
    spoken: SpokenEngine, place: DockerPlace, planted: SandboxSpec, request: pytest.FixtureRequest
) -> None:
    spoken.answers["POST /containers/c/wait"] = HANG_UP
    machine = request.getfixturevalue("machine")
    with pytest.raises(EngineLost):
        machine.reap()


def test_an_engine_that_does_not_say_how_it_ended_is_lost(
    spoken: SpokenEngine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "_REAP_SECONDS", 0.01)
    spoken.answers["POST /containers/c/wait"] = Answer(200, {"StatusCode": 0}, delay_seconds=0.5)
    machine = request.getfixturevalue("machine")
    with pytest.raises(EngineLost, match="does not say how"):
        machine.reap()
    machine._waiter.join()


@pytest.mark.parametrize("isolation", Isolation)
def test_every_limit_says_who_keeps_it(isolation: Isolation) -> None:
    found = machines._enforced(isolation)
    assert found.keys() == {"memory_bytes", "cpu_millis", "pids", "disk_bytes"}
    assert found["pids"].startswith("not enforced") is (isolation is Isolation.KATA)
    assert found["disk_bytes"].split()[0] == (
        "host" if isolation is Isolation.CONTAINER else "sandbox"
    )


@pytest.mark.parametrize("runtimes", [{}, {"runsc": {}}, {"runsc": {"path": "/no/such/runsc"}}])
def test_a_version_that_nobody_says_is_not_known(runtimes: dict[str, Any]) -> None:
    entry = Runtime.model_validate(runtimes.get("runsc", {}))
    assert docker._runsc_version(entry) == "not known"


def test_what_is_written_reaches_the_first_process(
    machine: DockerMachine, spoken: SpokenEngine
) -> None:
    assert machine.read() == b"x"
    machine.write(b"release\n")
    machine.close()
    machine.close()
    assert spoken.detached.wait(10)
    assert spoken.written == b"release\n"


def test_a_process_of_another_pid_namespace_is_no_evidence() -> None:
    assert machines._host_view(os.getpid(), "no-such-container") == []
    assert machines._host_view(2**22 + 1, "c") == []

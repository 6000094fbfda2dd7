"""The Docker backend: the same sandbox as an unprivileged container of an Engine on this host.

What the engine is asked for stands in ``sandbox.containers``, how it is asked in
``sandbox.engine``. The door is the local backend's wherever the runtime can have it: no network,
and one Unix socket in a read-only mount. Kata, and a ``runsc`` that was registered without
``--host-uds=open``, get a network of two instead, with a relay of ours as the only neighbour.
"""

import os
import secrets
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

from policies.errors import RunnerError
from policies.model import Isolation
from sandbox import containers, diagnostics, dockerplace, processes, runsc
from sandbox.builderimage import builder_image, image_name
from sandbox.canary import Expected, HostKernel, Observation, judge
from sandbox.cgroups import Group
from sandbox.containers import Container
from sandbox.dockerplace import DockerPlace
from sandbox.engine import Engine, Info, Runtime, State
from sandbox.errors import (
    EngineLost,
    EngineUnavailable,
    IsolationUnavailable,
    RuntimeUnknown,
    SandboxFailed,
)
from sandbox.model import (
    GATEWAY_PORT,
    Ending,
    Evidence,
    HostProcess,
    Offer,
    Place,
    Sandbox,
    SandboxSpec,
)
from sandbox.plan import SOCKETS, Ways
from sandbox.rows import Row
from sandbox.supervise import START_SECONDS, Remains, SupervisedSandbox

_SHIM_NAMES_SINCE = 23
"""First Engine that takes the name of a containerd shim for a runtime."""
KATA_SHIM = "io.containerd.kata.v2"
_RELAY_READY = b"runner-relay 1\n"
_REAP_SECONDS = 30.0
_UNKNOWN = "not known"
_REGISTER = "deploy/docker/README.md says how it is registered; runner doctor --backend docker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtimes:
    """What the engine calls the runtime of each isolation."""

    container: str = "runc"
    gvisor: str = "runsc"
    kata: str | None = None
    """None for what there is: an entry whose name begins with ``kata``, else KATA_SHIM."""
    kata_older: bool = False
    """Whether the operator allows a Kata before ``kata.OLDEST``; the evidence says so."""

    def of(self, isolation: Isolation, info: Info) -> str:
        """The one for ``isolation``, whether this engine has it or not."""
        if isolation is Isolation.CONTAINER:
            return self.container
        if isolation is Isolation.GVISOR:
            return self.gvisor
        registered = sorted(name for name in info.runtimes if name.startswith("kata"))
        return self.kata or (registered or [KATA_SHIM])[0]


@dataclass(frozen=True, slots=True)
class Registered:
    """A runtime that an engine has."""

    name: str
    version: str
    entry: Runtime

    def takes_sockets(self, isolation: Isolation) -> bool:
        """Whether a Unix socket in a mount can be the door."""
        if isolation is Isolation.GVISOR:
            return self.entry.opens_host_sockets
        return isolation is Isolation.CONTAINER


class DockerBackend:
    """See ``sandbox.model.Backend``."""

    name = "docker"

    def __init__(self, sandboxes: Path, *, socket: Path, runtimes: Runtimes) -> None:
        self._sandboxes = sandboxes
        self._socket = socket
        self._runtimes = runtimes

    @property
    def kata_older(self) -> bool:
        """As in ``Runtimes``."""
        return self._runtimes.kata_older

    def kata_configuration(self, info: Info) -> Path | None:
        """That the entry for kata names, where there is an entry and it names one."""
        name = self._runtimes.of(Isolation.KATA, info)
        return info.runtimes.get(name, Runtime()).configuration

    def info(self) -> Info:
        """What the engine says of itself. Raises EngineUnavailable."""
        with Engine.connect(self._socket) as engine:
            return engine.info()

    def offer(self) -> Offer:
        try:
            info = self.info()
            rootless = info.root_uid != 0
        except IsolationUnavailable as error:
            return Offer(refused=dict.fromkeys(Isolation, error), rootless=False)
        refused = {}
        for isolation in Isolation:
            try:
                self.runtime(info, isolation)
            except IsolationUnavailable as error:
                refused[isolation] = error
        return Offer(refused=refused, rootless=rootless)

    def runtime(self, info: Info, isolation: Isolation) -> "Registered":
        """What the engine has for ``isolation``.

        Raises:
            RuntimeUnknown: Nothing.
            IsolationUnavailable: Something too old, or the engine keeps no limits.
        """
        if lost := [name for name, kept in info.limits.items() if not kept]:
            raise IsolationUnavailable(
                f"the engine cannot limit {', '.join(lost)}",
                advice="Boot the host with control groups that can: runner doctor --backend docker",
            )
        if info.has("rootless"):
            raise IsolationUnavailable("a rootless engine is not supported", advice=_REGISTER)
        name = self._runtimes.of(isolation, info)
        is_shim = name.startswith("io.containerd.") and info.major >= _SHIM_NAMES_SINCE
        if name not in info.runtimes and not is_shim:
            raise RuntimeUnknown(
                f"the engine has no runtime {name!r}, which {isolation} is configured to use",
                advice=_REGISTER,
            )
        entry = info.runtimes.get(name, Runtime())
        versions = {Isolation.GVISOR: _runsc_version, Isolation.KATA: self._kata_version}
        version = versions[isolation](entry) if isolation in versions else _UNKNOWN
        return Registered(name, version, entry)

    def _kata_version(self, entry: Runtime) -> str:
        """Raises IsolationUnavailable where there is none, or one with known holes."""
        from sandbox import kata, kata_host  # noqa: PLC0415 - only who wants it needs it

        host = kata_host.ThisHost()
        shim = kata.ask(host, Path(entry.path)) if entry.path else kata.find_shim(host)
        return kata.require_version(shim, allow_older=self._runtimes.kata_older)

    def reserve(self, build_id: str) -> DockerPlace:
        engine = Engine.connect(self._socket)
        try:
            # Of the gofer, which connects for the Sentry; of a container's own root; of the relay.
            peer_uid = engine.info().root_uid
            return dockerplace.reserve(
                self._sandboxes, build_id, engine=engine, socket=self._socket, peer_uid=peer_uid
            )
        except BaseException:
            engine.close()
            raise

    def forget_image(self, root_digest: str) -> None:
        """Removes the engine's image of a root filesystem; the next launch makes it anew."""
        with Engine.connect(self._socket) as engine:
            engine.remove_image(image_name(root_digest))

    def mounts_images(self) -> bool:
        return False  # the engine knows no such mount

    def probe(self, isolation: Isolation) -> Iterator[Row]:
        from sandbox import dockerprobe  # noqa: PLC0415 - for doctor alone

        return dockerprobe.probe(self, isolation)

    def clean(self, directory: Path) -> None:
        dockerplace.clean(directory)

    def sweep(self, roots: Collection[str]) -> Iterator[str]:
        if not os.access(self._socket, os.W_OK):
            return
        with suppress(EngineUnavailable):  # nobody said that it runs
            yield from dockerplace.sweep(self._socket, self._sandboxes, roots)

    def launch(
        self,
        place: Place,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Callable[[memoryview], None] | None = None,
    ) -> Sandbox:
        assert isinstance(place, DockerPlace), "from this backend's reserve"
        info = place.engine.info()
        if spec.rootless and not info.root_uid:
            raise IsolationUnavailable(
                "policy asks for rootless, and this engine's containers are host root's",
                advice="userns-remap in the engine's daemon.json (deploy/docker/README.md).",
            )
        runtime = self.runtime(info, spec.isolation)
        container = Container(
            image=builder_image(
                place.engine, spec, dockerplace.of_state(self._sandboxes), place.directory
            ),
            runtime=runtime.name,
            guest=place.title,
            network="none",
            labels=place.labels,
            apparmor=info.has("apparmor"),
        )
        nonce = secrets.token_hex(16)
        place.furnish(spec)
        place.engine.create_volume(place.title, containers.volume(str(place.guest), place.labels))
        with ExitStack() as undo:
            relay, ways = None, SOCKETS
            if not runtime.takes_sockets(spec.isolation):
                neighbour = replace(container, runtime=self._runtimes.container)
                relay = undo.enter_context(Relay(place, neighbour))
                container, ways = replace(container, network=relay.network), relay.ways
            place.write_plan(spec, nonce, ways)
            outlet = None
            if collect is not None:
                outlet = place.outlet(collect, spec.limits)
                undo.callback(outlet.close)
            machine = DockerMachine(place, spec, container, relay)
            undo.pop_all()  # the sandbox's from here on
        return SupervisedSandbox(
            machine,
            spec.limits,
            nonce=nonce,
            accept=partial(_accept, info, runtime, spec, machine),
            hand_in=partial(place.hand_in_all, spec.inputs),
            log=log,
            outlet=outlet,
        )


def _accept(
    info: Info,
    runtime: Registered,
    spec: SandboxSpec,
    machine: "DockerMachine",
    observation: Observation,
) -> Evidence:
    on_network = not runtime.takes_sockets(spec.isolation)
    return judge(
        observation,
        _host_view(machine.look().pid, machine.id),
        Expected(
            isolation=spec.isolation,
            uid=spec.plan.uid,
            host=HostKernel.here(),
            rootless=spec.rootless,
            interfaces=frozenset({"eth0"} if on_network else ()),
        ),
        runtime=f"Docker Engine {info.version}, {runtime.name}",
        runtime_version=runtime.version,
    )


class Relay:
    """A network of two, and the neighbour in it: a forwarder to this sandbox's sockets."""

    def __init__(self, place: DockerPlace, container: Container) -> None:
        """Raises SandboxFailed where it does not come up; what there is of it has its labels."""
        engine, name = place.engine, place.title
        self.network = name
        engine.create_network(name, containers.network(name, place.labels))
        container = replace(container, network=name)
        relay = engine.create(f"{name}-relay", containers.relay(container))
        self._streams = engine.attach(relay)
        try:
            engine.start(relay)
            self._await()
            address = engine.address(relay, name)
        except BaseException:
            self._streams.close()
            raise
        self.ways = Ways(
            gateway=f"{address}:{GATEWAY_PORT}",
            outlet=f"{address}:{containers.OUTLET_PORT}",
        )

    def _await(self) -> None:
        timer = threading.Timer(START_SECONDS, self._streams.close)
        timer.start()
        seen = b""
        try:
            while _RELAY_READY not in seen:
                data = self._streams.read()
                seen += data
                if not data:
                    shown = seen[-500:].decode("utf-8", "backslashreplace").strip()
                    raise SandboxFailed(f"the relay did not start: {shown or 'no output'}")
        finally:
            timer.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """It ends by that."""
        self._streams.close()


class DockerMachine:
    """See ``sandbox.supervise.Machine``. A thread waits for the container's end."""

    poll_seconds = 0.04
    """A Sentry that may start no more tasks dies without a word, and 0.11 s later (measured) the
    engine has removed the group that knows why."""

    def __init__(
        self, place: DockerPlace, spec: SandboxSpec, container: Container, relay: Relay | None
    ) -> None:
        """Starts it. Raises SandboxFailed; what there is of it has the place's labels."""
        self._engine = place.engine
        self._relay = relay
        self.enforced = _enforced(spec.isolation)
        config = containers.sandbox(spec, container)
        diagnostics.debug("sandbox", container=config)
        self.id = self._engine.create(place.title, config)
        self._streams = self._engine.attach(self.id)
        try:
            self._engine.start(self.id)
        except RunnerError:
            self._streams.close()
            raise
        self._group: Group | None = None
        self._killed_by_kernel: Ending | None = None
        self._cpu_seconds = 0.0
        self._peak_bytes = 0
        self._status: int | None = None
        self._lost: Exception | None = None
        self._waiter = threading.Thread(target=self._await_end, name="sandbox-end", daemon=True)
        self._waiter.start()

    def look(self) -> State:
        """How it is now; from then on its cgroup is read too."""
        state = self._engine.state(self.id)
        if state is None:
            raise SandboxFailed("somebody removed the sandbox's container")
        if state.pid and self._group is None:
            self._group = Group.of(state.pid)
        return state

    def _await_end(self) -> None:
        try:
            self._status = self._engine.wait(self.id)
        except Exception as error:  # noqa: BLE001 - a thread's last resort; reap() raises it
            self._lost = error

    def read(self) -> bytes:
        return self._streams.read()

    def write(self, data: bytes) -> None:
        self._streams.write(data)

    def sample(self) -> Ending | None:
        if (group := self._group) is None:
            return None
        self._killed_by_kernel = group.ending() or self._killed_by_kernel
        self._cpu_seconds = max(self._cpu_seconds, group.cpu_seconds() or 0)
        self._peak_bytes = max(self._peak_bytes, group.memory_peak_bytes())
        return None

    def kill(self) -> None:
        # An engine whose output nobody takes does not get as far as killing. And where it is gone
        # itself, the end of standard input ends the first process.
        self._streams.close()
        with suppress(RunnerError):
            self._engine.kill(self.id)

    def reap(self) -> Remains:
        self.sample()  # the engine removes the group a moment after the end
        self._waiter.join(_REAP_SECONDS)
        if self._lost is not None:
            raise self._lost
        if self._waiter.is_alive():
            raise EngineLost("the sandbox ended, and the engine does not say how")
        state = self._engine.state(self.id)
        if state is None:
            raise SandboxFailed("somebody removed the sandbox's container")
        return Remains(
            status=self._status,
            ending=Ending.MEMORY if state.out_of_memory else self._killed_by_kernel,
            cpu_seconds=self._cpu_seconds,
            memory_peak_bytes=self._peak_bytes,
        )

    def close(self) -> None:
        self._streams.close()
        if self._relay is not None:
            self._relay.close()


def _enforced(isolation: Isolation) -> dict[str, str]:
    by_engine = dict.fromkeys(("memory_bytes", "cpu_millis", "pids"), "cgroup of the engine")
    if isolation is Isolation.KATA:
        from sandbox import kata  # noqa: PLC0415 - only who wants it needs it

        by_engine |= kata.NOT_ENFORCED
    has_kernel = isolation is not Isolation.CONTAINER
    return {**by_engine, "disk_bytes": "sandbox kernel" if has_kernel else "host kernel"}


def _runsc_version(entry: Runtime) -> str:
    """Where it says so to this user; a shim, and a path that only root may start, do not."""
    try:
        return runsc.find(entry.path).version if entry.path else _UNKNOWN
    except runsc.TooOld:
        raise
    except IsolationUnavailable:
        return _UNKNOWN


def _host_view(pid: int, container: str) -> list[HostProcess]:
    """The sandbox's processes, where this process shares the engine's view of the host."""
    first = processes.read(pid)
    shim = processes.read(first.parent) if first is not None else None
    # Numbers of another PID namespace are other processes here.
    if first is None or shim is None or container not in shim.argv:
        return []
    members = (each for each in processes.descendants(shim.pid) if each.pid != shim.pid)
    view = {processes.as_evidence(each, processes.role_of(each)) for each in members}
    return sorted(view, key=lambda each: each.role)

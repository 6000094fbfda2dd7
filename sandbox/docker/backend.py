"""The Docker backend: the same sandbox as an unprivileged container of an Engine on this host.

What the engine is asked for stands in ``sandbox.docker.containers``, how it is asked in
``sandbox.docker.engine``. The door is the local backend's wherever the runtime can have it: no
network, and one Unix socket in a read-only mount. Kata, and a ``runsc`` that was registered without
``--host-uds=open``, get a network of two instead, with a relay of ours as the only neighbour.
"""

import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from policies.model import Isolation
from sandbox import runsc
from sandbox.canary import Expected, HostKernel, Observation, judge
from sandbox.docker import containers
from sandbox.docker import place as dockerplace
from sandbox.docker.containers import Container
from sandbox.docker.engine import Engine, Info, Runtime
from sandbox.docker.image import builder_image, image_name
from sandbox.docker.machine import DockerMachine
from sandbox.docker.place import DockerPlace
from sandbox.docker.relay import Relay
from sandbox.errors import (
    EngineUnavailable,
    IsolationUnavailable,
    RuntimeTooOld,
    RuntimeUnknown,
)
from sandbox.model import Evidence, HostView, Offer, Place, Provided, Sandbox, SandboxSpec, unheard
from sandbox.plan import SOCKETS
from sandbox.rows import Row
from sandbox.supervise import SupervisedSandbox

_SHIM_NAMES_SINCE = 23
"""First Engine that takes the name of a containerd shim for a runtime."""
KATA_SHIM = "io.containerd.kata.v2"
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
    confined = False

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
        from sandbox.kata import host as kata_host  # noqa: PLC0415 - only who wants it needs it
        from sandbox.kata import preflight as kata  # noqa: PLC0415 - only who wants it needs it

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

    def provides(self, isolation: Isolation) -> Provided:
        # The engine knows no such mount. On the host's own kernel unpacking is fast, and in a user
        # namespace no device that is packed could be made.
        return Provided.PULLED if isolation is Isolation.CONTAINER else Provided.COPIED

    def probe(self, isolation: Isolation) -> Iterator[Row]:
        from sandbox.docker import probe as dockerprobe  # noqa: PLC0415 - for doctor alone

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
        waiting: Callable[[str], None] = unheard,
    ) -> Sandbox:
        del waiting  # it starts at once, or not at all
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
    machine: DockerMachine,
    observation: Observation,
) -> Evidence:
    on_network = not runtime.takes_sockets(spec.isolation)
    return judge(
        observation,
        HostView(tuple(machine.processes())),
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


def _runsc_version(entry: Runtime) -> str:
    """Where it says so to this user; a shim, and a path that only root may start, do not."""
    try:
        return runsc.find(entry.path).version if entry.path else _UNKNOWN
    except RuntimeTooOld:
        raise
    except IsolationUnavailable:
        return _UNKNOWN

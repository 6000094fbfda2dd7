"""A container that runs a sandbox, from its start to its end."""

import threading
from contextlib import suppress

from policies.errors import RunnerError
from policies.model import Isolation
from sandbox import diagnostics, processes
from sandbox.cgroups import Group
from sandbox.docker import containers
from sandbox.docker.containers import Container
from sandbox.docker.place import DockerPlace
from sandbox.docker.relay import Relay
from sandbox.errors import EngineLost, SandboxFailed
from sandbox.model import Ending, HostProcess, SandboxSpec
from sandbox.supervise import Remains

_REAP_SECONDS = 30.0


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

    def processes(self) -> list[HostProcess]:
        """As the host shows them; from then on their cgroup is read too."""
        state = self._engine.state(self.id)
        if state is None:
            raise SandboxFailed("somebody removed the sandbox's container")
        self._group = Group.of(state.pid)
        return _host_view(state.pid, self.id)

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
        from sandbox.kata import preflight as kata  # noqa: PLC0415 - only who wants it needs it

        by_engine |= kata.NOT_ENFORCED
    has_kernel = isolation is not Isolation.CONTAINER
    return {**by_engine, "disk_bytes": "sandbox kernel" if has_kernel else "host kernel"}


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

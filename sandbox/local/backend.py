"""The local backend: ``runsc`` directly, as an ordinary user, without a daemon.

Run as root, each build gets a host uid of its own, and everything of the sandbox, its launcher
included, runs as that uid: no process of it is ever host uid 0 or holds a capability in the
initial user namespace. docs/adr/0003 compares that with a mapped range.
"""

import os
import secrets
import subprocess
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from policies.model import Isolation, Limits
from sandbox import diagnostics, processes, runsc
from sandbox.canary import Expected, HostKernel, Observation, judge
from sandbox.cgroups import Group
from sandbox.errors import IsolationUnavailable, SandboxFailed
from sandbox.local import oci
from sandbox.local import place as localplace
from sandbox.local.place import LocalPlace
from sandbox.model import (
    Ending,
    Evidence,
    HostView,
    Offer,
    Place,
    Provided,
    Sandbox,
    SandboxSpec,
    unheard,
)
from sandbox.rows import Row
from sandbox.supervise import Remains, SupervisedSandbox

READ_BYTES = 64 << 10

_ENTER_GROUPS = 'while [ "$1" != -- ]; do echo $$ >"$1" || exit 125; shift; done; shift; exec "$@"'
"""A process enters a group before it becomes another, so nothing ever runs outside of it."""


class LocalBackend:
    """See ``sandbox.model.Backend``."""

    name = "local"
    confined = False

    def __init__(self, sandboxes: Path, *, runsc_name: str, uids: range) -> None:
        self._sandboxes = sandboxes
        self._runsc_name = runsc_name
        self._uids = uids

    def offer(self) -> Offer:
        refused = {}
        for isolation in Isolation:
            try:
                self._runtime(isolation)
            except IsolationUnavailable as error:
                refused[isolation] = error
        return Offer(refused=refused, rootless=True)

    def _runtime(self, isolation: Isolation) -> runsc.Runsc:
        if isolation is not Isolation.GVISOR:
            raise IsolationUnavailable(
                f"the local backend offers gvisor, not {isolation}",
                advice="Choose another backend, or a policy that asks for gvisor.",
            )
        found = runsc.find(self._runsc_name)
        if (refused := runsc.user_namespaces_refused()) is not None:
            raise IsolationUnavailable(
                f"gVisor needs a user namespace, and this host gives none: {refused}",
                advice="runner doctor names the setting and the command that changes it.",
            )
        return found

    def reserve(self, build_id: str) -> LocalPlace:
        return localplace.reserve(self._sandboxes, build_id, self._uids)

    def provides(self, isolation: Isolation) -> Provided:
        del isolation  # there is one
        mounts = runsc.find(self._runsc_name).mounts_erofs
        return Provided.MOUNTED if mounts else Provided.COPIED

    def probe(self, isolation: Isolation) -> Iterator[Row]:
        from sandbox.local import probe as localprobe  # noqa: PLC0415 - for doctor alone

        return localprobe.probe(self, self._runsc_name, isolation)

    def clean(self, directory: Path) -> None:
        localplace.clean(directory)

    def sweep(self, roots: Collection[str]) -> Iterator[str]:
        del roots
        yield from ()  # all that there is of a sandbox is in its place

    def launch(
        self,
        place: Place,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Callable[[memoryview], None] | None = None,
        waiting: Callable[[str], None] = unheard,
    ) -> Sandbox:
        del waiting  # it starts at once, or not at all
        assert isinstance(place, LocalPlace), "from this backend's reserve"
        runtime = self._runtime(spec.isolation)
        nonce = secrets.token_hex(16)
        _write_place(place, spec, nonce)
        with ExitStack() as undo:
            group = Group.make(place.name, spec.limits, announce=place.record_group)
            if group is not None:
                undo.callback(group.remove)
            outlet = None
            if collect is not None:
                outlet = place.outlet(collect, spec.limits)
                undo.callback(outlet.close)
            machine = LocalMachine(_start(runtime, place, group), group, spec.limits)
            undo.pop_all()  # the sandbox's from here on
        return SupervisedSandbox(
            machine,
            spec.limits,
            nonce=nonce,
            accept=partial(_accept, runtime, spec, machine),
            hand_in=partial(place.hand_in_all, spec.inputs),
            log=log,
            outlet=outlet,
        )


def _write_place(place: LocalPlace, spec: SandboxSpec, nonce: str) -> None:
    place.furnish(spec)
    place.write_plan(spec, nonce)
    # Newer runsc takes no path with a link in it.
    spec = replace(spec, root=spec.root.resolve())
    images = {}
    for number, (inside, image) in enumerate(spec.images.items()):
        images[inside] = str(place.images / str(number))
        place.hand_in(image, place.images / str(number))
    place.write(place.bundle / "config.json", oci.config_json(spec, str(place.guest), images))


def _start(runtime: runsc.Runsc, place: LocalPlace, group: Group | None) -> subprocess.Popen[bytes]:
    arguments = ("run", f"--bundle={place.bundle}", place.name)
    launch = runsc.command(runtime, place.runsc_state, *arguments)
    drop = ["setpriv", "--no-new-privs"]
    if os.geteuid() == 0:
        uid = str(place.peer_uid)
        drop += [f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all"]
    procs = group.procs if group is not None else []
    command = ["/bin/sh", "-c", _ENTER_GROUPS, "sh", *procs, "--", *drop, "--", *launch]
    diagnostics.debug("sandbox", command=command)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # one pipe, so the build's lines keep their order
            env={"PATH": os.defpath + ":/usr/sbin:/sbin"},  # nothing of ours is inherited
            cwd="/",
            bufsize=0,
            start_new_session=True,
        )
    except OSError as error:  # too many processes, or too many files
        raise SandboxFailed(f"runsc could not be started: {error.strerror}") from None


def _accept(
    runtime: runsc.Runsc, spec: SandboxSpec, machine: "LocalMachine", observation: Observation
) -> Evidence:
    if missing := set(spec.images) - observation.images:
        raise SandboxFailed(f"{runtime.path} did not mount an image at {min(missing)}")
    return judge(
        observation,
        HostView(tuple(processes.host_view(machine.pid, runtime.path))),
        Expected(
            isolation=Isolation.GVISOR,
            uid=spec.plan.uid,
            host=HostKernel.here(),
            rootless=True,  # always, whatever the policy asks for
        ),
        runtime=str(runtime.path),
        runtime_version=runtime.version,
    )


class LocalMachine:
    """See ``sandbox.supervise.Machine``."""

    poll_seconds = 0.2

    def __init__(
        self, process: subprocess.Popen[bytes], group: Group | None, limits: Limits
    ) -> None:
        self._process = process
        self._group = group
        self._limits = limits
        self._cpu_seconds = 0.0
        self._peak_bytes = 0
        name = group.name if group is not None else None
        self.enforced = {
            "memory_bytes": name or "supervisor",
            "cpu_millis": name or "not enforced",
            "pids": name or "not enforced",
            "disk_bytes": "sandbox kernel",
        }

    @property
    def pid(self) -> int:
        """Of the launcher."""
        return self._process.pid

    def read(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.read(READ_BYTES)

    def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)

    def sample(self) -> Ending | None:
        group = self._group
        if group is not None and group.cpu_seconds() is not None:
            return None
        members = processes.descendants(self._process.pid)
        self._cpu_seconds = max(self._cpu_seconds, processes.cpu_seconds(members))
        if group is not None:
            return None
        self._peak_bytes = max(self._peak_bytes, processes.memory_bytes(members))
        return Ending.MEMORY if self._peak_bytes > self._limits.memory_bytes else None

    def kill(self) -> None:
        members = processes.descendants(self._process.pid)
        members += self._group.members() if self._group is not None else []
        known = {(member.pid, member.started) for member in members}
        processes.kill_all(lambda p: (p.pid, p.started) in known)

    def reap(self) -> Remains:
        status = self._process.wait()
        self.kill()
        group = self._group
        if group is None:
            return Remains(
                status=status,
                ending=None,
                cpu_seconds=self._cpu_seconds,
                memory_peak_bytes=self._peak_bytes,
            )
        return Remains(
            status=status,
            ending=group.ending(),
            cpu_seconds=group.cpu_seconds() or self._cpu_seconds,
            memory_peak_bytes=group.memory_peak_bytes(),
        )

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        if self._group is not None:
            self._group.remove()

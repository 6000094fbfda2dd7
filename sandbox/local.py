"""The local backend: ``runsc`` directly, as an ordinary user, without a daemon.

Run as root, each build gets a host uid of its own, and everything of the sandbox, its launcher
included, runs as that uid: no process of it is ever host uid 0 or holds a capability in the
initial user namespace. docs/adr/0003 compares that with a mapped range.
"""

import os
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

from policies.model import Isolation
from sandbox import diagnostics, oci, place, processes, runsc
from sandbox.canary import Observation, judge
from sandbox.cgroups import Group
from sandbox.errors import IsolationMismatch, IsolationUnavailable, SandboxFailed
from sandbox.model import OUTLET_SOCKET, Ending, Evidence, Outcome, Place, SandboxSpec, Usage
from sandbox.outlet import Outlet
from sandbox.place import LocalPlace
from sandbox.report import CANARY_BYTES, ExitReport, OutputSplitter, ReportInvalid, parse_exit

START_SECONDS = 60.0
"""From the start of runsc to the canary; 0.2 s on a quiet machine."""
POLL_SECONDS = 0.2
READ_BYTES = 64 << 10

_CANARY_LINE = re.compile(rb"^(runner-canary [^\n]*)\n", re.MULTILINE)

_ENTER_GROUPS = 'while [ "$1" != -- ]; do echo $$ >"$1" || exit 125; shift; done; shift; exec "$@"'
"""A process enters a group before it becomes another, so nothing ever runs outside of it."""


class LocalBackend:
    """See ``sandbox.model.Backend``."""

    name = "local"

    def __init__(self, sandboxes: Path, *, runsc_name: str, uids: range) -> None:
        self._sandboxes = sandboxes
        self._runsc_name = runsc_name
        self._uids = uids

    def require(self, isolation: Isolation) -> None:
        if isolation is not Isolation.GVISOR:
            raise IsolationUnavailable(
                f"the local backend offers gvisor, not {isolation}",
                advice="Choose another backend, or a policy that asks for gvisor.",
            )
        runsc.find(self._runsc_name)
        if (refused := runsc.user_namespaces_refused()) is not None:
            raise IsolationUnavailable(
                f"gVisor needs a user namespace, and this host gives none: {refused}",
                advice="runner doctor names the setting and the command that changes it.",
            )

    def reserve(self, build_id: str) -> LocalPlace:
        return place.reserve(self._sandboxes, build_id, self._uids)

    def mounts_images(self) -> bool:
        return runsc.find(self._runsc_name).mounts_erofs

    def launch(
        self,
        place: Place,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Callable[[memoryview], None] | None = None,
    ) -> "LocalSandbox":
        assert isinstance(place, LocalPlace), "from this backend's reserve"
        self.require(spec.isolation)
        return LocalSandbox(runsc.find(self._runsc_name), place, spec, log, collect)


class LocalSandbox:
    """One sandbox: three threads of the host read it, watch it and wait for it."""

    def __init__(
        self,
        runtime: runsc.Runsc,
        place: LocalPlace,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Callable[[memoryview], None] | None,
    ) -> None:
        self._place = place
        self._spec = spec
        self._log = log
        self._nonce = secrets.token_hex(16)
        self._ending: Ending | None = None
        self._usage = Usage(wall_seconds=0, cpu_seconds=0, memory_peak_bytes=0)
        self._report: ExitReport | None = None
        self._error: Exception | None = None
        self._over = threading.Event()
        self._started = time.monotonic()
        _write_place(place, spec, self._nonce)
        self._group = Group.make(place.name, spec.limits, announce=place.record_group)
        self._outlet = _outlet(place, spec, collect)
        self._process = self._start(runtime)
        try:
            early, line = self._await_canary()
            self.evidence = self._judge(runtime, line)
            self._release()
        except BaseException:
            self._kill()
            self._process.wait()
            self._close()
            raise
        self._reader = threading.Thread(target=self._read, args=(early,), name="sandbox-output")
        self._watcher = threading.Thread(target=self._watch, name="sandbox-limits")
        self._reader.start()
        self._watcher.start()

    # -- start ---------------------------------------------------------------------------

    def _start(self, runtime: runsc.Runsc) -> subprocess.Popen[bytes]:
        arguments = ("run", f"--bundle={self._place.bundle}", self._place.name)
        launch = runsc.command(runtime, self._place.runsc_state, *arguments)
        drop = ["setpriv", "--no-new-privs"]
        if os.geteuid() == 0:
            uid = str(self._place.peer_uid)
            drop += [f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all"]
        procs = self._group.procs if self._group is not None else []
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
            self._close_ways()
            raise SandboxFailed(f"runsc could not be started: {error.strerror}") from None

    def _await_canary(self) -> tuple[bytes, bytes]:
        """What stood behind the canary's line, and the line itself."""
        timer = threading.Timer(START_SECONDS, self._kill)
        timer.start()
        assert self._process.stdout is not None
        received = b""
        try:
            while (line := _CANARY_LINE.search(received)) is None:
                data = self._process.stdout.read(READ_BYTES)
                received += data
                if not data or len(received) > CANARY_BYTES:
                    shown = received[-2000:].decode("utf-8", "backslashreplace").strip()
                    raise SandboxFailed(
                        f"runsc did not start the sandbox: {shown or 'no output'}",
                        advice="runner doctor; and runner base verify, where it names an image.",
                    )
        finally:
            timer.cancel()
        return received[line.end() :], line[1]

    def _judge(self, runtime: runsc.Runsc, line: bytes) -> Evidence:
        observation = Observation.parse(line, self._nonce)
        if missing := set(self._spec.images) - observation.images:
            raise SandboxFailed(f"{runtime.path} did not mount an image at {min(missing)}")
        return judge(
            observation,
            processes.host_view(self._process.pid, runtime.path),
            uid=self._spec.plan.uid,
            host_release=os.uname().release,
            runtime=str(runtime.path),
            runtime_version=runtime.version,
        )

    def _release(self) -> None:
        for name, path in self._spec.inputs.items():
            self._place.hand_in(path, self._place.door / name)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"release {self._nonce}\n".encode())
        except BrokenPipeError:
            raise IsolationMismatch("the sandbox ended before it was released") from None

    # -- while it runs -------------------------------------------------------------------

    def _read(self, early: bytes) -> None:
        try:
            self._read_to_the_end(early)
        except Exception as error:  # noqa: BLE001 - a thread's last resort; wait() raises it
            self._error = error
            self._end(Ending.CANCELLED)

    def _read_to_the_end(self, early: bytes) -> None:
        assert self._process.stdout is not None
        splitter, logged, data = OutputSplitter(), 0, early
        while True:
            output = splitter.feed(data)
            room = self._spec.limits.log_bytes - logged
            logged += len(output)
            if output and room > 0:
                self._log(output[:room])
            if logged > self._spec.limits.log_bytes:
                self._end(Ending.LOG)
            data = self._process.stdout.read(READ_BYTES)
            if not data:
                break
        rest, line = splitter.finish()
        if rest and logged < self._spec.limits.log_bytes:
            self._log(rest)
        if line is not None:
            try:
                self._report = parse_exit(line, self._nonce)
            except ReportInvalid:
                self._report = None

    def _watch(self) -> None:
        try:
            self._keep_limits()
        except Exception as error:  # noqa: BLE001 - nothing would keep the limits any more
            self._error = error
            self._end(Ending.CANCELLED)

    def _keep_limits(self) -> None:
        """Those that no cgroup keeps; and notes what was used."""
        limits, group = self._spec.limits, self._group
        counted = group.cpu_seconds() is not None if group is not None else False
        peak, cpu = 0, 0.0
        while not self._over.wait(POLL_SECONDS) and self._process.poll() is None:
            if time.monotonic() - self._started > limits.wall_seconds:
                self._end(Ending.TIME)
            if counted:
                continue
            members = processes.descendants(self._process.pid)
            cpu = max(cpu, processes.cpu_seconds(members))
            if group is None:
                peak = max(peak, processes.memory_bytes(members))
                if peak > limits.memory_bytes:
                    self._end(Ending.MEMORY)
        self._usage = Usage(
            wall_seconds=round(time.monotonic() - self._started, 3),
            cpu_seconds=round((group.cpu_seconds() if group is not None else None) or cpu, 2),
            memory_peak_bytes=group.memory_peak_bytes() if group is not None else peak,
        )

    def _end(self, ending: Ending) -> None:
        if self._ending is None:
            self._ending = ending
        self._kill()

    def _kill(self) -> None:
        """Ends every process of the sandbox, whatever state it is in."""
        members = processes.descendants(self._process.pid)
        members += self._group.members() if self._group is not None else []
        known = {(member.pid, member.started) for member in members}
        processes.kill_all(lambda p: (p.pid, p.started) in known)

    # -- the end -------------------------------------------------------------------------

    def cancel(self) -> None:
        self._end(Ending.CANCELLED)

    def wait(self) -> Outcome:
        self._reader.join()
        self._process.wait()
        self._kill()
        self._over.set()
        self._watcher.join()
        ending = self._ending or self._judge_ending()
        report = self._report or ExitReport(command=0, status=125, claim=None)
        enforced = self._enforced()
        self._close()
        if self._error is not None:
            raise self._error
        if self._outlet is not None and ending is Ending.EXITED:
            self._outlet.require_untroubled()
            if report.status == 0:
                self._outlet.require_whole()
        return Outcome(
            ending=ending,
            status=report.status,
            command=report.command,
            claim=report.claim,
            evidence=self.evidence,
            usage=self._usage,
            enforced=enforced,
        )

    def _judge_ending(self) -> Ending:
        if self._group is not None and self._group.out_of_memory():
            return Ending.MEMORY
        # The runtime saw how the first process ended: whoever killed it has another status.
        if self._report is not None and self._report.status == self._process.returncode:
            return Ending.EXITED
        if self._group is not None and self._group.out_of_pids():
            return Ending.PIDS
        return Ending.BROKEN

    def _enforced(self) -> dict[str, str]:
        group = self._group.name if self._group is not None else None
        return {
            "memory_bytes": group or "supervisor",
            "cpu_millis": group or "not enforced",
            "pids": group or "not enforced",
            "disk_bytes": "sandbox kernel",
            "wall_seconds": "supervisor",
            "log_bytes": "supervisor",
        }

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._close_ways()

    def _close_ways(self) -> None:
        if self._outlet is not None:
            self._outlet.close()
        if self._group is not None:
            self._group.remove()


def _outlet(
    place: LocalPlace, spec: SandboxSpec, collect: Callable[[memoryview], None] | None
) -> Outlet | None:
    if collect is None:
        return None
    return Outlet(
        place.door,
        OUTLET_SOCKET,
        collect,
        peer_uid=place.peer_uid,
        most_bytes=spec.limits.disk_bytes,
    )


def _write_place(place: LocalPlace, spec: SandboxSpec, nonce: str) -> None:
    init = resources.files("sandbox").joinpath("guest", "init")
    if not init.is_file():
        raise SandboxFailed(
            "the sandbox's first process is not part of this installation",
            advice="Install the wheel (pip install .): building it compiles sandbox/guest/init.c.",
        )
    # Newer runsc takes no path with a link in it.
    spec = replace(spec, root=spec.root.resolve())
    images = {}
    for number, (inside, image) in enumerate(spec.images.items()):
        images[inside] = str(place.images / str(number))
        place.hand_in(image, place.images / str(number))
    config = oci.config_json(spec, str(place.guest), images)
    written = [
        (place.guest / "init", init.read_bytes(), 0o550),
        (place.guest / "plan", oci.plan(spec, nonce), 0o440),
        (place.bundle / "config.json", config, 0o440),
    ]
    written += [
        (place.guest / "config" / name, data, 0o440) for name, data in spec.plan.files.items()
    ]
    for path, data, mode in written:
        path.write_bytes(data)
        place.give(path, mode)

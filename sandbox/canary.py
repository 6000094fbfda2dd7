"""Is the sandbox what it was asked to be? Judged before any untrusted byte is read. Pure.

Two views have to agree: what the kernel inside shows to our own static program, which no
builder image can replace, and what the host shows of the sandbox's processes.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from policies.model import Isolation
from sandbox.errors import IsolationMismatch
from sandbox.model import Evidence, HostProcess
from sandbox.processes import APPLICATION, UNREADABLE
from sandbox.report import ReportInvalid, text, words

_GVISOR_LOG = "Starting gVisor..."
"""First words of gVisor's kernel log, in every release so far."""
_LOG_STAMP = re.compile(r"<\d+>\[ *\d+\.\d+\] ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the first process saw inside."""

    release: str
    version: str
    boot_id: str
    log: str
    is_gvisor_file: str
    interfaces: tuple[str, ...]
    images: frozenset[str]
    uid: int

    @classmethod
    def parse(cls, line: bytes, nonce: str) -> Self:
        """Reads the canary's line.

        Raises:
            IsolationMismatch: Not the line of this sandbox's first process.
        """
        try:
            found = words(line, b"runner-canary")
            if found.get("nonce") != nonce.encode():
                raise ReportInvalid("the nonce is not the one that was given")
            uid, _, _ = text(found, "ids").partition(":")
            return cls(
                release=text(found, "release")[:256],
                version=text(found, "version")[:256],
                boot_id=text(found, "boot_id").strip()[:64],
                log=text(found, "log"),
                is_gvisor_file=text(found, "gvisor"),
                interfaces=_interfaces(text(found, "net_dev")),
                images=_images(text(found, "mounts")),
                uid=int(uid),
            )
        except ValueError as error:
            raise IsolationMismatch(f"the sandbox's canary is not sound: {error}") from None


def _images(mounts: str) -> frozenset[str]:
    """Where an EROFS image is mounted, by proc_pid_mounts(5)."""
    rows = (line.split(" ") for line in mounts.splitlines())
    return frozenset(row[1] for row in rows if row[2:3] == ["erofs"])


def _interfaces(net_dev: str) -> tuple[str, ...]:
    names = [line.partition(":")[0].strip() for line in net_dev.splitlines() if ":" in line]
    return tuple(name[:64] for name in names[:64])


@dataclass(frozen=True, slots=True, kw_only=True)
class HostKernel:
    """What tells the host's kernel from any other.

    Attributes:
        boot_id: Of random(4): another one for each boot, and no personality(2) changes it.
    """

    release: str
    version: str
    boot_id: str

    @classmethod
    def here(cls) -> Self:
        """Of the kernel that this process runs on."""
        uname = os.uname()
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(release=uname.release, version=uname.version, boot_id=boot_id)

    def is_shown_by(self, seen: Observation) -> bool:
        """Whether ``seen`` is of this kernel; one thing that is the same is enough."""
        return seen.boot_id == self.boot_id or seen.release == self.release


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the sandbox has to be.

    Attributes:
        uid: That policy judged the builder by, inside.
        host: What the host's own kernel shows.
        rootless: Whether no process may be host uid 0 or have a capability on the host.
        interfaces: That the sandbox may have besides loopback.
    """

    isolation: Isolation
    uid: int
    host: HostKernel
    rootless: bool
    interfaces: frozenset[str] = frozenset()


def judge(
    observation: Observation,
    processes: Sequence[HostProcess],
    expected: Expected,
    *,
    runtime: str,
    runtime_version: str,
) -> Evidence:
    """Accepts a sandbox, or refuses.

    Args:
        observation: From inside.
        processes: Of the sandbox, as the host shows them.
        expected: What it has to be.
        runtime: Which one started it; for the evidence.
        runtime_version: What it says of itself; for the evidence.

    Raises:
        IsolationMismatch: Inside or outside, something is not as it should be.
    """
    kernels = {
        Isolation.CONTAINER: _shows_the_host,
        Isolation.GVISOR: _shows_gvisor,
        Isolation.KATA: _shows_a_guest,
    }
    others = set(observation.interfaces) - {"lo"} - expected.interfaces
    refusals = [
        *kernels[expected.isolation](observation, processes, expected),
        *([f"there are network interfaces besides its own: {sorted(others)}"] if others else []),
        *(
            [f"it runs as uid {observation.uid} instead of {expected.uid}"]
            if observation.uid != expected.uid
            else []
        ),
        *(
            f"its {process.role} {fault}"
            for process in processes
            for fault in _faults(process, rootless=expected.rootless)
        ),
    ]
    if expected.rootless and not processes:
        refusals.append("the host shows no process of it")
    if refusals:
        raise IsolationMismatch(f"asked for {expected.isolation}, but {refusals[0]}")
    return Evidence(
        isolation=expected.isolation,
        kernel_release=observation.release,
        kernel_version=observation.version,
        runtime=runtime,
        runtime_version=runtime_version,
        interfaces=observation.interfaces,
        inside_uid=observation.uid,
        processes=tuple(processes),
    )


def _shows_gvisor(
    seen: Observation, processes: Sequence[HostProcess], expected: Expected
) -> Iterator[str]:
    roles = {process.role for process in processes}
    if not _is_gvisor(seen):
        yield "the kernel's log is not gVisor's"
    if expected.host.is_shown_by(seen):
        yield f"the kernel is the host's ({expected.host.release})"
    if seen.is_gvisor_file.strip() not in {"", "1"}:
        yield "/proc/gvisor says that the kernel is another"
    if "sandbox" not in roles:
        yield "the host shows no sandbox process of runsc"
    if "gofer" not in roles:
        yield "the host shows no gofer of runsc"


def _shows_a_guest(
    seen: Observation, processes: Sequence[HostProcess], expected: Expected
) -> Iterator[str]:
    """A virtual machine's own kernel, whatever runtime says that it is one."""
    if _is_gvisor(seen) or seen.is_gvisor_file.strip():
        yield "the kernel is gVisor's"
    if not seen.boot_id:
        yield "the kernel does not show when it was booted"
    if expected.host.is_shown_by(seen) or seen.version == expected.host.version:
        yield f"the kernel is the host's ({expected.host.release})"
    if not processes:
        yield "the host shows no process of it"
    if APPLICATION in {process.role for process in processes}:
        yield "the host shows its first process"


def _shows_the_host(
    seen: Observation, processes: Sequence[HostProcess], expected: Expected
) -> Iterator[str]:
    if _is_gvisor(seen) or seen.boot_id != expected.host.boot_id:
        yield "the kernel is not the host's"
    applications = [process for process in processes if process.role == APPLICATION]
    if not applications:
        yield "the host does not show its first process"
    for process in applications:  # nothing but these stands between it and the host's kernel
        if process.seccomp != _SECCOMP_FILTER:
            yield "its first process runs without seccomp"
        if not process.no_new_privileges:
            yield "its first process may gain new privileges"


def _is_gvisor(seen: Observation) -> bool:
    return _LOG_STAMP.sub("", seen.log.partition("\n")[0]) == _GVISOR_LOG


def _faults(process: HostProcess, *, rootless: bool) -> Iterator[str]:
    """What no process of a sandbox may be, each judged for itself."""
    if process.role == UNREADABLE:
        yield "process cannot be looked at"
    if process.seccomp != _SECCOMP_FILTER and process.role in _FILTERED:
        yield "runs without seccomp"
    if not rootless:
        return
    if process.uid == 0:
        yield "is host uid 0"
    if process.initial_user_namespace and process.role != "launcher":
        yield "is in the initial user namespace"
    if process.initial_user_namespace and process.capabilities:
        yield "has capabilities in the initial user namespace"


_FILTERED = {"sandbox", "gofer"}
_SECCOMP_FILTER = 2
"""``Seccomp:`` in ``/proc/PID/status`` where a filter is installed (proc(5))."""

"""Is the sandbox what it was asked to be? Judged before any untrusted byte is read. Pure.

Two views have to agree: what the kernel inside shows to our own static program, which no
builder image can replace, and what the host shows of the sandbox's processes.
"""

import os
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from policies.model import Isolation
from sandbox.errors import IsolationMismatch, NetworkOpen
from sandbox.model import ClusterView, Evidence, HostProcess, HostView
from sandbox.processes import APPLICATION, UNREADABLE
from sandbox.report import ReportInvalid, text, words

_GVISOR_LOG = "Starting gVisor..."
"""First words of gVisor's kernel log, in every release so far."""
_ADDRESS = re.compile(r"[0-9.]{7,15}:[0-9]{1,5}")
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
    reached: tuple[str, ...] = ()

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
                reached=_addresses(text(found, "reached")),
            )
        except ValueError as error:
            raise IsolationMismatch(f"the sandbox's canary is not sound: {error}") from None


def _images(mounts: str) -> frozenset[str]:
    """Where an EROFS image is mounted, by proc_pid_mounts(5)."""
    rows = (line.split(" ") for line in mounts.splitlines())
    return frozenset(row[1] for row in rows if row[2:3] == ["erofs"])


def _addresses(lines: str) -> tuple[str, ...]:
    addresses = lines.split()
    if not all(map(_ADDRESS.fullmatch, addresses)):
        raise ReportInvalid("something was reached that is no address")
    return tuple(addresses)


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
    outside: HostView | ClusterView,
    expected: Expected,
    *,
    runtime: str,
    runtime_version: str,
) -> Evidence:
    """Accepts a sandbox, or refuses.

    Args:
        observation: From inside.
        outside: The sandbox from there.
        expected: What it has to be.
        runtime: Which one started it; for the evidence.
        runtime_version: What it says of itself; for the evidence.

    Raises:
        IsolationMismatch: Inside or outside, something is not as it should be.
        NetworkOpen: It reaches what nobody inside may reach.
    """
    kernels = {
        Isolation.CONTAINER: _shows_the_host,
        Isolation.GVISOR: _shows_gvisor,
        Isolation.KATA: _shows_a_guest,
    }
    refusals = [
        *kernels[expected.isolation](observation, expected.host),
        *_inside(observation, expected),
        *_outside(outside, expected),
    ]
    if refusals:
        raise IsolationMismatch(f"asked for {expected.isolation}, but {refusals[0]}")
    if observation.reached:
        raise NetworkOpen(f"the sandbox reaches {', '.join(observation.reached)}")
    return Evidence(
        isolation=expected.isolation,
        kernel_release=observation.release,
        kernel_version=observation.version,
        runtime=runtime,
        runtime_version=runtime_version,
        interfaces=observation.interfaces,
        inside_uid=observation.uid,
        outside=outside,
    )


# -- inside --------------------------------------------------------------------------------------


def _shows_gvisor(seen: Observation, host: HostKernel) -> Iterator[str]:
    if not _is_gvisor(seen):
        yield "the kernel's log is not gVisor's"
    if host.is_shown_by(seen):
        yield f"the kernel is the host's ({host.release})"
    if seen.is_gvisor_file.strip() not in {"", "1"}:
        yield "/proc/gvisor says that the kernel is another"


def _shows_a_guest(seen: Observation, host: HostKernel) -> Iterator[str]:
    """A virtual machine's own kernel, whatever runtime says that it is one."""
    if _is_gvisor(seen) or seen.is_gvisor_file.strip():
        yield "the kernel is gVisor's"
    if not seen.boot_id:
        yield "the kernel does not show when it was booted"
    if host.is_shown_by(seen) or seen.version == host.version:
        yield f"the kernel is the host's ({host.release})"


def _shows_the_host(seen: Observation, host: HostKernel) -> Iterator[str]:
    if _is_gvisor(seen) or seen.boot_id != host.boot_id:
        yield "the kernel is not the host's"


def _inside(seen: Observation, expected: Expected) -> Iterator[str]:
    if others := set(seen.interfaces) - {"lo"} - expected.interfaces:
        yield f"there are network interfaces besides its own: {sorted(others)}"
    if seen.uid != expected.uid:
        yield f"it runs as uid {seen.uid} instead of {expected.uid}"


# -- outside -------------------------------------------------------------------------------------


def _outside(view: HostView | ClusterView, expected: Expected) -> Iterator[str]:
    if isinstance(view, ClusterView):
        if expected.rootless:
            yield "a cluster does not show whose processes are root on its nodes"
        return
    roles = {process.role for process in view.processes}
    yield from _ROLES[expected.isolation](roles)
    if not view.processes and (expected.rootless or expected.isolation is Isolation.KATA):
        yield "the host shows no process of it"
    for process in view.processes:
        for fault in _faults(process, expected):
            yield f"its {process.role} {fault}"


def _of_gvisor(roles: AbstractSet[str]) -> Iterator[str]:
    if "sandbox" not in roles:
        yield "the host shows no sandbox process of runsc"
    if "gofer" not in roles:
        yield "the host shows no gofer of runsc"


def _of_a_guest(roles: AbstractSet[str]) -> Iterator[str]:
    if APPLICATION in roles:
        yield "the host shows its first process"


def _of_the_host(roles: AbstractSet[str]) -> Iterator[str]:
    if APPLICATION not in roles:
        yield "the host does not show its first process"


_ROLES = {
    Isolation.CONTAINER: _of_the_host,
    Isolation.GVISOR: _of_gvisor,
    Isolation.KATA: _of_a_guest,
}


def _is_gvisor(seen: Observation) -> bool:
    return _LOG_STAMP.sub("", seen.log.partition("\n")[0]) == _GVISOR_LOG


def _faults(process: HostProcess, expected: Expected) -> Iterator[str]:
    """What no process of a sandbox may be, each judged for itself."""
    if process.role == UNREADABLE:
        yield "process cannot be looked at"
    # Nothing but these stands between a container's first process and the host's kernel.
    is_bare = expected.isolation is Isolation.CONTAINER and process.role == APPLICATION
    if process.seccomp != _SECCOMP_FILTER and (process.role in _FILTERED or is_bare):
        yield "runs without seccomp"
    if is_bare and not process.no_new_privileges:
        yield "may gain new privileges"
    if not expected.rootless:
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

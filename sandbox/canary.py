"""Is the sandbox what it was asked to be? Judged before any untrusted byte is read. Pure.

Two views have to agree: what the kernel inside shows to our own static program, which no
builder image can replace, and what the host shows of the sandbox's processes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from policies.model import Isolation
from sandbox.errors import IsolationMismatch
from sandbox.model import Evidence, HostProcess
from sandbox.processes import UNREADABLE
from sandbox.report import ReportInvalid, text, words

_GVISOR_LOG = "Starting gVisor..."
"""First words of gVisor's kernel log, in every release so far."""
_LOG_STAMP = re.compile(r"<\d+>\[ *\d+\.\d+\] ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the first process saw inside."""

    release: str
    version: str
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


def judge(
    observation: Observation,
    processes: Sequence[HostProcess],
    *,
    uid: int,
    host_release: str,
    runtime: str,
    runtime_version: str,
) -> Evidence:
    """Accepts a gVisor sandbox, or refuses.

    Args:
        observation: From inside.
        processes: Of the sandbox, as the host shows them.
        uid: That policy judged the builder by, inside.
        host_release: Of the host's own kernel; the sandbox must show another one.
        runtime: Path of the runtime whose processes these must be; for the evidence.
        runtime_version: What it says of itself; for the evidence.

    Raises:
        IsolationMismatch: Inside or outside, something is not as gVisor is.
    """
    roles = {process.role for process in processes}
    first_log_line = _LOG_STAMP.sub("", observation.log.partition("\n")[0])
    refusals = [
        ("the kernel's log is not gVisor's", first_log_line != _GVISOR_LOG),
        (f"the kernel is the host's ({host_release})", observation.release == host_release),
        (
            "/proc/gvisor says that the kernel is another",
            observation.is_gvisor_file.strip() not in {"", "1"},
        ),
        (
            f"there are network interfaces besides loopback: {observation.interfaces}",
            set(observation.interfaces) - {"lo"},
        ),
        (f"it runs as uid {observation.uid} instead of {uid}", observation.uid != uid),
        ("the host shows no sandbox process of runsc", "sandbox" not in roles),
        ("the host shows no gofer of runsc", "gofer" not in roles),
        *(
            (f"its {process.role} {fault}", True)
            for process in processes
            for fault in _faults(process)
        ),
    ]
    for refusal, holds in refusals:
        if holds:
            raise IsolationMismatch(f"asked for gVisor, but {refusal}")
    return Evidence(
        isolation=Isolation.GVISOR,
        kernel_release=observation.release,
        kernel_version=observation.version,
        runtime=runtime,
        runtime_version=runtime_version,
        interfaces=observation.interfaces,
        inside_uid=observation.uid,
        processes=tuple(processes),
    )


def _faults(process: HostProcess) -> Iterator[str]:
    """What no process of a sandbox may be, each judged for itself."""
    if process.role == UNREADABLE:
        yield "process cannot be looked at"
    if process.uid == 0:
        yield "is host uid 0"
    if process.initial_user_namespace and process.role != "launcher":
        yield "is in the initial user namespace"
    if process.initial_user_namespace and process.capabilities:
        yield "has capabilities in the initial user namespace"
    if process.seccomp != _SECCOMP_FILTER and process.role in {"sandbox", "gofer"}:
        yield "runs without seccomp"


_SECCOMP_FILTER = 2
"""``Seccomp:`` in ``/proc/PID/status`` where a filter is installed (proc(5))."""

"""Renders what the first process does: the plan that ``guest/plan.c`` reads. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from builder.model import DOOR, RUNNER
from sandbox.model import GATEWAY_PORT, GATEWAY_SOCKET, OUTLET_SOCKET, SandboxSpec


@dataclass(frozen=True, slots=True)
class Ways:
    """Where the first process finds the host.

    A way is the path of a Unix socket, ``ADDRESS:PORT``, or ``tls:ADDRESS:PORT/NAME``, where NAME
    is one of ``host``, ``files``, ``gateway`` and ``outlet``. Only ``init-pod`` knows the last.

    Attributes:
        host: For the conversation; empty where that is on standard input and output.
        files: That files come by, below RUNNER; empty where they are there already.
        init: Where the first process itself is.
    """

    gateway: str
    outlet: str
    host: str = ""
    files: str = ""
    init: str = f"{RUNNER}/init"


SOCKETS = Ways(gateway=f"{DOOR}/{GATEWAY_SOCKET}", outlet=f"{DOOR}/{OUTLET_SOCKET}")


PATIENCE_SECONDS = 120
"""Without a connection to the host, until the first process ends by itself. Long enough for the
host's front to be restarted, or for a runner that was started again to take the build up."""
_LONGEST_SECONDS = 1 << 30
_MOST_BYTES = 1 << 50
_TIMES = 2
"""The build's own limit, which is kept from outside: the first process ends by itself then, where
nobody is left to end it."""


def render(
    spec: SandboxSpec, nonce: str, ways: Ways = SOCKETS, probes: Sequence[str] = ()
) -> bytes:
    """NUL-terminated strings, counts before what they count.

    Args:
        spec: What to run, and its limits.
        nonce: That the lines of this sandbox are known by.
        ways: To the host.
        probes: ``ADDRESS:PORT`` of what nobody inside may reach; the canary tells what was reached.

    Raises:
        ValueError: A string holds a NUL.
    """
    strings = [
        "2",
        nonce,
        ways.host,
        str(GATEWAY_PORT if spec.gateway else 0),  # 0: no door
        ways.gateway,
        ways.files,
        spec.plan.claim,
        str(min(_TIMES * spec.limits.wall_seconds, _LONGEST_SECONDS)),
        str(PATIENCE_SECONDS),
        str(min(spec.limits.log_bytes, _MOST_BYTES)),
        str(min(spec.limits.disk_bytes, _MOST_BYTES) if spec.plan.apart else 0),
        *_counted(sorted(spec.plan.writable) if spec.plan.apart else ()),
        *_counted(probes),
    ]
    commands = spec.plan.commands
    if spec.plan.output is not None:
        commands += ((ways.init, "send", spec.plan.output, ways.outlet),)
    strings.append(str(len(commands)))
    for command in commands:
        strings += _counted(command)
    if any("\0" in string for string in strings):
        raise ValueError("a string of the plan holds a NUL")
    return b"".join(string.encode("utf-8", "surrogateescape") + b"\0" for string in strings)


def _counted(strings: Sequence[str]) -> list[str]:
    return [str(len(strings)), *strings]

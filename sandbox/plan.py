"""Renders what the first process does: the plan that ``guest/init.c`` reads. Pure."""

from dataclasses import dataclass

from builder.model import DOOR, RUNNER
from sandbox.model import GATEWAY_PORT, GATEWAY_SOCKET, OUTLET_SOCKET, SandboxSpec


@dataclass(frozen=True, slots=True)
class Ways:
    """Where the first process finds the host: a path of a Unix socket, or ``ADDRESS:PORT``."""

    gateway: str
    outlet: str


SOCKETS = Ways(gateway=f"{DOOR}/{GATEWAY_SOCKET}", outlet=f"{DOOR}/{OUTLET_SOCKET}")


_LONGEST_SECONDS = 1 << 30
_PATIENCE = 2
"""Times the build's own limit, which is kept from outside: the first process ends by itself then,
where nobody is left to end it."""


def render(spec: SandboxSpec, nonce: str, ways: Ways = SOCKETS) -> bytes:
    """NUL-terminated strings, counts before what they count.

    Raises:
        ValueError: A string holds a NUL.
    """
    port = GATEWAY_PORT if spec.gateway else 0  # no door
    seconds = min(_PATIENCE * spec.limits.wall_seconds, _LONGEST_SECONDS)
    strings = ["1", nonce, str(port), ways.gateway, spec.plan.claim, str(seconds)]
    commands = spec.plan.commands
    if spec.plan.output is not None:
        commands += ((f"{RUNNER}/init", "send", spec.plan.output, ways.outlet),)
    strings.append(str(len(commands)))
    for command in commands:
        strings += [str(len(command)), *command]
    if any("\0" in string for string in strings):
        raise ValueError("a command holds a NUL")
    return b"".join(string.encode("utf-8", "surrogateescape") + b"\0" for string in strings)

"""The host's side of a network of two, closed: nothing of the host may answer on it.

An engine leaves out the bridge's IPv4 address where it is asked to, and routes nothing. But the
kernel gives each bridge a link-local address of IPv6, by which everything that listens on ``[::]``
answers: from inside gVisor, with NET_ADMIN and an address of its own choice, a build gets there
(tried, with Engine 20.10).
"""

import hashlib
import os
from pathlib import Path

from sandbox.errors import IsolationUnavailable

_NAME_BYTES = 15
"""Of an interface, by linux/if.h."""
_MEND = (
    'Register runsc with "--host-uds=open", which needs no network (deploy/docker/README.md); or '
    "run runner as root; or, on the host: sysctl -w net.ipv6.conf.default.disable_ipv6=1"
)


def name_of(sandbox: str) -> str:
    """Of the bridge of ``sandbox``; nobody else's."""
    return f"rnr{hashlib.sha256(os.fsencode(sandbox)).hexdigest()}"[:_NAME_BYTES]


def close(name: str, proc: Path = Path("/proc")) -> None:
    """Takes IPv6 off a bridge, as root, or makes sure that it is off.

    Args:
        name: Of the bridge, which is there.
        proc: As this process's network namespace has it.

    Raises:
        IsolationUnavailable: It is on, or nobody can tell.
    """
    interfaces = (proc / "self/net/dev").read_text().splitlines()
    if not any(line.partition(":")[0].strip() == name for line in interfaces):
        raise IsolationUnavailable(
            f"the engine's bridge {name} is not to be seen here, so nobody can say that the host "
            "does not answer on it",
            advice=_MEND,
        )
    ipv6 = proc / "sys/net/ipv6"
    if not ipv6.exists():
        return  # a kernel without it
    switch = ipv6 / "conf" / name / "disable_ipv6"
    try:
        if os.geteuid() == 0:
            switch.write_text("1")
        is_off = switch.read_text().strip() == "1"
    except OSError:
        is_off = False
    if not is_off:
        raise IsolationUnavailable(
            f"the host would answer over IPv6 on the bridge {name}", advice=_MEND
        )

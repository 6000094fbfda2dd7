"""What this host can do for the local backend, row by row, each with what mends it."""

import os
import secrets
import shutil
from collections.abc import Iterator

from policies.errors import RunnerError
from policies.model import Isolation, Limits
from sandbox import runsc
from sandbox.cgroups import Group
from sandbox.model import Backend, Provided
from sandbox.rows import Row, Verdict, failed
from sandbox.smoke import smoke


def probe(backend: Backend, runsc_name: str, isolation: Isolation) -> Iterator[Row]:
    """Looks at everything that a sandbox needs, cheapest first, and then starts one."""
    yield _runsc(runsc_name)
    yield _user_namespaces()
    yield _tool("setpriv", "It drops privileges before runsc starts: apt-get install util-linux")
    yield _cgroups()
    yield _identity()
    yield smoke(backend, isolation)
    yield _base_images(backend)


def _runsc(name: str) -> Row:
    try:
        found = runsc.find(name)
    except RunnerError as error:
        return failed("runsc", error)
    return Row(name="runsc", verdict=Verdict.OK, detail=f"{found.path}, {found.version}")


def _user_namespaces() -> Row:
    refused = runsc.user_namespaces_refused()
    if refused is None:
        return Row(
            name="user namespaces", verdict=Verdict.OK, detail="ordinary users may make them"
        )
    path = refused.partition(" ")[0]
    key = path.removeprefix("/proc/sys/").replace("/", ".")
    value = "15000" if key.startswith("user.") else ("0" if "restrict" in key else "1")
    return Row(
        name="user namespaces",
        verdict=Verdict.FAIL,
        detail=refused,
        mend=f"sysctl -w {key}={value}, and the same in /etc/sysctl.d/runner.conf",
    )


def _tool(name: str, mend: str) -> Row:
    path = shutil.which(name)
    if path is None:
        return Row(name=name, verdict=Verdict.FAIL, detail="not on PATH", mend=mend)
    return Row(name=name, verdict=Verdict.OK, detail=path)


def _cgroups() -> Row:
    group = Group.make(f"probe-{secrets.token_hex(4)}", Limits())
    if group is not None:
        group.remove()
        detail = f"{group.name}: memory, cpu and pids are limited by the host's kernel"
        return Row(name="cgroups", verdict=Verdict.OK, detail=detail)
    return Row(
        name="cgroups",
        verdict=Verdict.WARN,
        detail="not delegated: memory and time are kept by a supervisor, cpu and pids are not",
        mend="systemd-run --user --scope -p Delegate=yes runner ... on a host with cgroup v2",
    )


def _identity() -> Row:
    if os.geteuid() == 0:
        return Row(
            name="identity", verdict=Verdict.OK, detail="as root: a host uid of its own per build"
        )
    return Row(
        name="identity",
        verdict=Verdict.WARN,
        detail=f"every sandbox runs as uid {os.geteuid()}: builds of one user are one trust domain",
        mend="Run as root for a host uid per build, or use another backend.",
    )


def _base_images(backend: Backend) -> Row:
    try:
        mounts = backend.provides(Isolation.GVISOR) is Provided.MOUNTED
    except RunnerError as error:  # its own row says it, too
        return Row(
            name="base images", verdict=Verdict.WARN, detail=error.message, mend=error.advice
        )
    if mounts:
        return Row(name="base images", verdict=Verdict.OK, detail="unpacked once, then mounted")
    return Row(
        name="base images",
        verdict=Verdict.WARN,
        detail="this runsc cannot mount them: each build copies them into its own memory",
        mend="A runsc of 2026-01-26 or later mounts them, which is faster: gvisor.dev",
    )

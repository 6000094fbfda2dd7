"""What this host can do for the local backend, row by row, each with what mends it."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from builder.model import RUNNER, BuildPlan
from policies.errors import RunnerError
from policies.model import Isolation, Limits
from sandbox import runsc
from sandbox.cgroups import Group
from sandbox.local import LocalBackend
from sandbox.model import Backend, Ending, SandboxSpec


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    detail: str
    mend: str = ""


def probe(backend: LocalBackend, runsc_name: str, isolation: Isolation) -> Iterator[Row]:
    """Looks at everything that a sandbox needs, cheapest first, and then starts one."""
    yield _runsc(runsc_name)
    yield _user_namespaces()
    yield _tool("setpriv", "It drops privileges before runsc starts: apt-get install util-linux")
    yield _cgroups()
    yield _identity()
    yield smoke(backend, isolation)


def _runsc(name: str) -> Row:
    try:
        found = runsc.find(name)
    except RunnerError as error:
        return Row(name="runsc", verdict=Verdict.FAIL, detail=error.message, mend=error.advice)
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


def smoke(backend: Backend, isolation: Isolation) -> Row:
    """Starts a sandbox whose root has nothing but mount points; judges it, and tries its door."""
    with tempfile.TemporaryDirectory(prefix="runner-probe-") as temporary:
        root = Path(temporary) / "root"
        (root / RUNNER.lstrip("/")).mkdir(parents=True)
        for directory in (Path(temporary), *root.rglob("*"), root):
            directory.chmod(0o755)
        handed_out = bytearray()
        try:
            place = backend.reserve(f"probe-{secrets.token_hex(4)}")
            try:
                spec = _smoke_spec(root, isolation)
                sandbox = backend.launch(place, spec, lambda _: None, handed_out.extend)
                ended = sandbox.wait()
            finally:
                place.release()
        except RunnerError as error:
            return Row(
                name="sandbox", verdict=Verdict.FAIL, detail=error.message, mend=error.advice
            )
    seen = sandbox.evidence
    if ended.ending is not Ending.EXITED or ended.status != 0 or not handed_out:
        return Row(
            name="sandbox",
            verdict=Verdict.FAIL,
            detail=f"started and accepted, but its door does not work ({ended.ending})",
            mend="The runtime lets no Unix socket of a mount through: it needs --host-uds=open.",
        )
    return Row(
        name="sandbox",
        verdict=Verdict.OK,
        detail=f"started and accepted: {seen.isolation}, kernel {seen.kernel_release}; "
        "its door works",
    )


def _smoke_spec(root: Path, isolation: Isolation) -> SandboxSpec:
    return SandboxSpec(
        isolation=isolation,
        limits=Limits(wall_seconds=60),
        plan=BuildPlan(
            commands=(),
            build_command=0,
            environment={},
            files={},
            writable=("/run",),
            uid=0,
            capabilities=(),
            claim="/run/claim",
            output=f"{RUNNER}/plan",  # anything that is there
        ),
        root=root,
        root_digest=PROBE_DIGEST,
        gateway=False,
    )


PROBE_DIGEST = f"sha256:{'0' * 64}"
"""Of the root that a probe starts."""

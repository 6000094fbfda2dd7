"""What an Engine on this host can do for the docker backend, row by row, with what mends it."""

import json
from collections.abc import Iterator

from policies.errors import RunnerError
from policies.model import Isolation
from sandbox.docker.backend import DockerBackend, Registered
from sandbox.docker.engine import Info
from sandbox.rows import Row, Verdict, failed
from sandbox.smoke import PROBE_DIGEST, smoke

ENTRY = {
    "path": "/usr/bin/runsc",
    "runtimeArgs": ["--network=none", "--host-uds=open", "--overlay2=none"],
}
"""Of daemon.json, as in deploy/docker/daemon.json: no network at all, and sockets in mounts."""


def probe(backend: DockerBackend, isolation: Isolation) -> Iterator[Row]:
    """Looks at the engine, at its runtime for ``isolation``, and then starts a sandbox."""
    try:
        info = backend.info()
    except RunnerError as error:
        yield failed("engine", error)
        return
    yield Row(
        name="engine",
        verdict=Verdict.OK,
        detail=f"Docker Engine {info.version}; whoever may use its socket is root on this host",
    )
    yield _limits(info)
    yield _identity(info)
    if isolation is Isolation.KATA:
        from sandbox.kata import host as kata_host  # noqa: PLC0415 - only who wants it needs it
        from sandbox.kata import preflight as kata  # noqa: PLC0415 - only who wants it needs it

        yield from kata.preflight(
            kata_host.ThisHost(),
            allow_older=backend.kata_older,
            configuration=backend.kata_configuration(info),
        )
    try:
        runtime = backend.runtime(info, isolation)
    except RunnerError as error:
        yield Row(name="runtime", verdict=Verdict.FAIL, detail=error.message, mend=_mend(isolation))
        return
    yield Row(
        name="runtime", verdict=Verdict.OK, detail=f"{runtime.name}, version {runtime.version}"
    )
    yield _door(runtime, isolation)
    yield smoke(backend, isolation)
    backend.forget_image(PROBE_DIGEST)


def _mend(isolation: Isolation) -> str:
    if isolation is Isolation.GVISOR:
        entry = json.dumps({"runtimes": {"runsc": ENTRY}})
        return f"in /etc/docker/daemon.json: {entry}, then restart the engine"
    return "docs/kata.md and docs/docker.md say what it needs, and how it is registered"


def _limits(info: Info) -> Row:
    missing = [name for name, there in info.limits.items() if not there]
    if missing:
        return Row(
            name="limits",
            verdict=Verdict.FAIL,
            detail=f"the engine cannot limit {', '.join(missing)}",
            mend="Boot the host with cgroups that can: docs/docker.md",
        )
    detail = f"{', '.join(info.limits)} by cgroup"
    if not info.swap_limit:
        return Row(
            name="limits",
            verdict=Verdict.WARN,
            detail=f"{detail}; a build may use the host's swap besides",
            mend="swapaccount=1 on the kernel's command line, or a host without swap",
        )
    return Row(name="limits", verdict=Verdict.OK, detail=f"{detail}, without swap")


def _identity(info: Info) -> Row:
    if info.root_uid:
        return Row(
            name="identity",
            verdict=Verdict.OK,
            detail=f"userns-remap: host uid {info.root_uid} and up, and no process is host root",
        )
    return Row(
        name="identity",
        verdict=Verdict.WARN,
        detail="plain: the sandbox's processes are host uid 0, each in a user namespace of its own",
        mend="userns-remap, which policies that ask for rootless need: deploy/docker/README.md "
        "says what else it changes",
    )


def _door(runtime: Registered, isolation: Isolation) -> Row:
    if runtime.takes_sockets(isolation):
        detail = f"{runtime.name}: no network, one Unix socket"
        return Row(name="door", verdict=Verdict.OK, detail=detail)
    detail = f"{runtime.name}: a network of two for each build, without an address of the host"
    if isolation is Isolation.KATA:
        return Row(name="door", verdict=Verdict.OK, detail=detail)
    return Row(name="door", verdict=Verdict.WARN, detail=detail, mend=_mend(isolation))

"""A real Docker Engine of the tests' own: private data, a private socket, and no way out.

It lives in a network namespace that has no route to anywhere, which is checked before it is used,
so what hostile builds send on its bridges ends there.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from runner.settings import DockerSettings, Settings
from sandbox import processes
from sandbox.docker.engine import Engine
from sandbox.errors import EngineUnavailable
from tests.support.hosts import REPOSITORY

REMAPPED: Final = 1_878_000_000
"""First host uid of an engine with userns-remap."""
_REMAP_USER = "daemon"
_PRETENDER = """\
#!/bin/sh
# runc that takes gVisor's options, and limits that only gVisor's own kernel could give.
[ "$*" != --version ] || { echo "kata-runtime (a pretender): version: 3.31.0"; exit; }
previous=
for word; do
    shift
    case $word in --host-uds=*) ;; *) set -- "$@" "$word" ;; esac
    [ "$previous" != --bundle ] || sed -i s/1048576/1024/g "$word/config.json"
    previous=$word
done
exec runc "$@"
"""
_WORLD = """\
ip link set lo up
for file in subuid subgid; do touch /etc/$file; mount --bind "$1" /etc/$file; done
echo there
exec sleep infinity
"""
"""Its namespaces, which stay while it is killed and started again."""


@dataclass
class RealEngine:
    """Attributes:
    directory: Everything of it.
    options: Of dockerd, besides those that make it private.
    """

    directory: Path
    options: tuple[str, ...] = ()
    path: str = os.defpath
    _world: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def socket(self) -> Path:
        return self.directory / "docker.sock"

    def settings(self, settings: Settings, **docker: str | bool) -> Settings:
        """``settings`` with this engine, and what it calls its runtimes."""
        own = DockerSettings.model_validate({"socket": str(self.socket), **docker})
        return settings.model_copy(update={"docker": own})

    @property
    def inside(self) -> tuple[str, ...]:
        """Words before a command that put it into the engine's network namespace, as on a host."""
        assert self._world is not None
        return ("nsenter", f"--target={self._world.pid}", "--net", "--")

    @contextmanager
    def client(self) -> Iterator[Engine]:
        with Engine.connect(self.socket) as engine:
            yield engine

    def run_inside(self, *command: str) -> str:
        """What ``command`` says of the engine's network."""
        return subprocess.run(
            [*self.inside, *command], capture_output=True, text=True, timeout=10, check=True
        ).stdout

    def start(self) -> None:
        """Raises where it does not come up."""
        here = self.directory
        log = here / "dockerd.log"
        world = self._world = self._world or self._make_world()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["nsenter", f"--target={world.pid}", "--net", "--mount", "--", "dockerd",
                 f"--config-file={here / 'daemon.json'}", f"--data-root={here / 'data'}",
                 f"--exec-root={here / 'exec'}", f"--pidfile={here / 'pid'}",
                 f"--host=unix://{self.socket}", *self.options],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={"PATH": self.path}, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 30
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with self.client() as client:
                    client.info()
            except EngineUnavailable:
                time.sleep(0.1)
            else:
                return self._require_no_way_out()
        pytest.fail(f"dockerd does not start:\n{log.read_text(errors='replace')[-3000:]}")

    def _make_world(self) -> subprocess.Popen[bytes]:
        world = subprocess.Popen(
            ["unshare", "--net", "--mount", "--", "sh", "-ec", _WORLD, "sh",
             self.directory / "subid"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert world.stdout is not None
        assert world.stdout.readline() == b"there\n"
        world.stdout.close()
        return world

    def _require_no_way_out(self) -> None:
        shown = self.run_inside("ip", "route", "show", "default")
        assert not shown, f"the engine has a route out: {shown!r}"

    def kill(self) -> None:
        """As a crash: what it had started goes on without it."""
        assert self._process is not None
        containerd = self.directory / "exec/containerd/containerd.pid"
        pid = int(containerd.read_text())
        self._process.kill()
        self._process.wait()
        end = time.monotonic() + 10
        # It dies with its parent, and one that comes before it is gone would wait for it in vain.
        while processes.read(pid) is not None and time.monotonic() < end:
            time.sleep(0.02)

    def stop(self) -> None:
        """In order, and then nothing of it is left."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        mine = f"{self.directory}/"
        processes.kill_all(lambda p: any(mine in word for word in p.argv))

    def end(self) -> None:
        """And its namespaces with it."""
        self.stop()
        if self._world is not None:
            self._world.kill()
            self._world.wait()


@contextmanager
def running_engine(directory: Path, *options: str) -> Iterator[RealEngine]:
    """An engine with the runtimes that the tests use, until the end of the block."""
    if os.geteuid() != 0:
        pytest.skip("only root can start an engine of its own: run as root too")
    for program in ("dockerd", "runsc", "ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: `make tools` installs it")
    runsc = json.loads((REPOSITORY / "deploy/docker/daemon.json").read_text())["runtimes"]["runsc"]
    runtimes = {
        "runsc": runsc,
        "runsc-networked": {"path": str(REPOSITORY / "deploy/docker/runsc-networked")},
        "not-gvisor": {"path": str(directory / "pretender"), "runtimeArgs": ["--host-uds=open"]},
        "not-kata": {"path": str(directory / "pretender"), "runtimeArgs": []},
        "broken": {"path": "/bin/false", "runtimeArgs": ["--host-uds=open"]},
    }
    pretender = directory / "pretender"
    pretender.write_text(_PRETENDER)
    pretender.chmod(0o755)
    (directory / "daemon.json").write_text(json.dumps({"runtimes": runtimes}))
    (directory / "subid").write_text(f"{_REMAP_USER}:{REMAPPED}:65536\n")
    shims = directory / "shims"
    shims.mkdir()
    shim = shims / "containerd-shim-kata-v2"
    shim.write_text('#!/bin/sh\necho "Kata Containers containerd shim (Golang): version: 3.31.0"\n')
    shim.chmod(0o755)
    engine = RealEngine(directory, options, f"{shims}:/usr/sbin:/usr/bin:/sbin:/bin")
    try:
        engine.start()
        yield engine
    finally:
        engine.end()


def remapping() -> str:
    """The option for userns-remap."""
    return f"--userns-remap={_REMAP_USER}"

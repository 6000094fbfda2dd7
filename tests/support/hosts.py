"""Somebody who runs ``runner`` on this host, and what may be left when it has ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from policies import loader
from policies.reference import ImageReference
from runner.cancel import Cancellation
from runner.cli.tools import BUILDERS, backends
from runner.errors import RunnerError
from runner.events import Event, Output
from runner.files import Home
from runner.pipeline import submit as submit_to
from runner.registry.auth import Anonymous, Credentials
from runner.request import BuildRequest, BuildResult
from runner.settings import RegistrySettings, Settings
from runner.tools import Tools
from sandbox import processes
from sandbox.cgroups import MOUNT
from sandbox.cleaning import clean
from sandbox.docker.engine import Engine
from sandbox.docker.place import of_state
from sandbox.locks import abandoned

REPOSITORY = Path(__file__).parent.parent.parent
STRANGER = 1_890_000_000 + os.getpid()
"""An ordinary user: just a number, no account has to be made. Another one in each run."""


def reachable(path: Path) -> bool:
    """Whether every other user may pass through to ``path``."""
    path = path.resolve()
    return all(part.stat().st_mode & 0o001 for part in (path, *path.parents))


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def code(self) -> str:
        """The error's stable code, as people see it."""
        lines = [line.split() for line in self.stderr.splitlines()]
        return next((words[1] for words in lines if words[:1] == ["code"]), "")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Of ``--json``; every line has to be one."""
        found: list[dict[str, Any]] = [json.loads(line) for line in self.stdout.splitlines()]
        return [event for event in found if event["event"] == kind]


@dataclass(frozen=True, slots=True)
class Person:
    """One user with directories of their own, and settings that name the tests' registries.

    Attributes:
        uid: Of the commands; None for that of the tests.
        environ: Added to what the commands see; nothing of the tests' own is.
        before: Words before each command, such as those that give it a mount namespace.
        backend: That ``submit`` names.
    """

    directory: Path
    settings: Settings
    uid: int | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    backend: str = "local"

    @classmethod
    def move_in(
        cls, directory: Path, settings: Settings, builders: Path, uid: int | None = None
    ) -> "Person":
        """Makes the directories; ``builders`` is shared by everybody, read-only."""
        home = Home(data=directory / "data/runner", state=directory / "state/runner")
        for path in (home.data, home.state):
            path.mkdir(parents=True)
        home.builders.symlink_to(builders)
        if uid is not None:
            for path in (directory, *directory.rglob("*")):
                os.chown(path, uid, uid, follow_symlinks=False)
        person = cls(directory, settings, uid)
        person._configure()
        return person

    @property
    def home(self) -> Home:
        return Home(data=self.directory / "data/runner", state=self.directory / "state/runner")

    @property
    def config(self) -> Path:
        return self.directory / "config.toml"

    def _configure(self) -> None:
        """Writes the settings that differ from the defaults."""
        lines = []
        for name in ("local", "docker", "kubernetes"):
            table = getattr(self.settings, name).model_dump(exclude_defaults=True)
            lines += [f"[{name}]"] * bool(table)
            lines += [*(f"{key} = {json.dumps(each)}" for key, each in table.items())]
        lines += [registry_lines(host, each) for host, each in self.settings.registries.items()]
        self.config.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def having(self, **environ: str) -> "Person":
        """The same person with a larger environment."""
        return replace(self, environ={**self.environ, **environ})

    def with_runsc(self, runsc: str) -> "Person":
        """The same person with another runsc, when not on the command line."""
        local = self.settings.local.model_copy(update={"runsc": runsc})
        return replace(self, settings=self.settings.model_copy(update={"local": local}))

    # -- the command line ------------------------------------------------------------------

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """``runner ARGUMENTS`` as a process; whoever starts it waits for it."""
        path = os.pathsep.join((os.defpath, "/usr/sbin", "/sbin"))
        environ = {
            "PATH": path,
            "HOME": str(self.directory),
            "XDG_DATA_HOME": str(self.directory / "data"),
            "XDG_STATE_HOME": str(self.directory / "state"),
            "RUNNER_CONFIG": str(self.config),
            "DOCKER_CONFIG": str(self.directory),
            "PYTHONDONTWRITEBYTECODE": "1",
            **self.environ,
        }
        return subprocess.Popen(
            [*self.before, sys.executable, "-m", "runner", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
            cwd=REPOSITORY,
            text=True,
            user=self.uid,
            group=self.uid,
            extra_groups=None if self.uid is None else [],
        )

    def run(self, *arguments: str | Path, seconds: float = 120) -> Ran:
        """``runner ARGUMENTS`` to its end."""
        with self.start(*arguments) as process:
            try:
                stdout, stderr = process.communicate(timeout=seconds)
            except BaseException:
                process.send_signal(signal.SIGKILL)
                raise
        return Ran(process.returncode, stdout, stderr)

    # -- in this process -------------------------------------------------------------------

    def tools(self, *policies: Path, credentials: Credentials | None = None) -> Tools:
        return Tools(
            settings=self.settings,
            home=self.home,
            policies=[loader.shipped("default"), *map(loader.read, policies)],
            backends=backends(self.home, self.settings),
            builders=BUILDERS,
            credentials=credentials or Anonymous(),
        )

    def submit(
        self,
        context: Path,
        *,
        destination: str | None = None,
        policies: tuple[Path, ...] = (),
        build_args: Mapping[str, str] | None = None,
        target: str | None = None,
        reproducible: bool = False,
        credentials: Credentials | None = None,
        listen: Callable[[Event], None] = lambda _: None,
        cancellation: Cancellation | None = None,
        tools: Tools | None = None,
    ) -> "Built":
        """One build by ``runner.pipeline``, in this process and as its user."""
        events: list[Event] = []

        def both(event: Event) -> None:
            events.append(event)
            listen(event)

        request = BuildRequest(
            context=context,
            destinations=(ImageReference.parse(destination),) if destination else (),
            build_args=build_args or {},
            target=target,
            reproducible=reproducible,
            backend=self.backend,
        )
        tools = tools or self.tools(*policies, credentials=credentials)
        try:
            return Built(submit_to(request, tools, both, cancellation or Cancellation()), events)
        except RunnerError as error:
            error.add_note(output_of(events)[-8000:])
            raise

    # -- afterwards ------------------------------------------------------------------------

    def leftovers(self) -> list[str]:
        """Everything of any sandbox of this person that is still there."""
        place = str(self.directory)
        uids = set(range(self.settings.local.first_uid, self._last_uid))
        found = [
            f"process {process.pid} of uid {process.uid}: {' '.join(process.argv)[:200]}"
            for process in processes.alive()
            if process.uid in uids
            or any(f"{place}/state/runner/sandboxes" in word for word in process.argv)
            or (self.uid is not None and process.uid == self.uid)
        ]
        if self.home.sandboxes.exists():
            found += [f"directory {path}" for path in self.home.sandboxes.iterdir()]
        if self.home.builds.exists():
            names = tuple(path.name for path in self.home.builds.iterdir())
            groups = (Path(group) for group, _, _ in os.walk(MOUNT))
            found += [f"cgroup {group}" for group in groups if group.name.endswith(names)]
            found += [
                f"file {path}" for name in ("staged", "context.tar")
                for path in self.home.builds.glob(f"*/{name}")
            ]  # fmt: skip
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        found += [f"mount {line}" for line in mounts if place in line]
        return found + list(self._of_engine())

    def _of_engine(self) -> Iterator[str]:
        socket = Path(self.settings.docker.socket)
        if self.backend != "docker" or not socket.exists():
            return
        ours = of_state(self.home.sandboxes)
        with Engine.connect(socket) as engine:
            kinds = (
                ("container", engine.labelled),
                ("network", engine.networks),
                ("volume", engine.volumes),
            )
            for kind, things in kinds:
                yield from (f"{kind} {each} {labels}" for each, labels in things(ours))

    @property
    def _last_uid(self) -> int:
        return self.settings.local.first_uid + self.settings.local.uids

    def move_out(self) -> None:
        """Ends what tests that failed have left running."""
        for directory in abandoned(self.home.sandboxes):
            clean(directory, backends(self.home, self.settings))

    def assert_nothing_left(
        self,
        within_seconds: float = 2.0,
        kinds: tuple[str, ...] = (
            "process",
            "directory",
            "cgroup",
            "file",
            "mount",
            "container",
            "network",
            "volume",
        ),
    ) -> None:
        """What was killed may need a moment to be gone."""
        end = time.monotonic() + within_seconds
        while found := [what for what in self.leftovers() if what.startswith(kinds)]:
            assert time.monotonic() < end, found
            time.sleep(0.05)


def read_until(
    process: subprocess.Popen[str], stream: IO[str] | None, wanted: str, *, seconds: float = 60
) -> str:
    """The first line of ``stream``, one of the process's, that has ``wanted`` in it."""
    assert stream is not None
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        for line in stream:
            if wanted in line:
                return line
    finally:
        watchdog.cancel()
    raise AssertionError(f"the command ended, or took {seconds} s, without {wanted!r}")


@dataclass(frozen=True, slots=True)
class Built:
    """A build that ended well."""

    result: BuildResult
    events: list[Event]

    @property
    def log(self) -> str:
        return output_of(self.events)


def output_of(events: list[Event]) -> str:
    """What the build wrote."""
    data = b"".join(event.data for event in events if isinstance(event, Output))
    return data.decode("utf-8", "replace")


def write_context(directory: Path, dockerfile: str, **files: str) -> Path:
    """A context whose files have the names of the keywords, which everybody can read."""
    directory.mkdir(mode=0o755)
    for name, content in {"Dockerfile": dockerfile, **files}.items():
        path = directory / name
        path.write_text(content, encoding="utf-8")
        path.chmod(0o644)
    return directory


def registry_lines(host: str, registry: RegistrySettings) -> str:
    """As config.toml has it."""
    values = registry.model_dump(exclude_defaults=True).items()
    lines = [f"[registries.{json.dumps(host)}]"]
    return "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in values)])

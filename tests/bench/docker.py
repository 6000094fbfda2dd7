"""``python -m tests.bench.docker``: the docker backend beside the Engine by hand. Writes its page.

It starts an Engine of its own, and a registry on loopback.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from builder.buildah import Buildah
from runner.cli.tools import docker_backend
from runner.settings import RegistrySettings, Settings
from runner.stores import installs
from runner.stores.rootfs import RootfsStore
from runner.tools import OnDemand
from sandbox.model import SandboxSpec
from tests.bench import machine, ours, registry
from tests.bench.bases import CACHE, workplace
from tests.bench.byhand import ByHand, RecordingBackend
from tests.bench.page import middle, ratio, table
from tests.support.engine import RealEngine, running_engine
from tests.support.hosts import REPOSITORY, Person, write_context

PAGE = REPOSITORY / "docs" / "benchmarks-docker.md"
RUNTIME = "runsc"

HEAD = """\
# The Docker backend

Made by `make bench` (`python -m tests.bench.docker --runs N`) as root, with an Engine of its own.
The aim is `--backend docker` within 10 % of *by hand*, which is the very container that ours asks
for: the same Engine, runtime, root filesystem, plan, inputs, mounts, limits and flags, over the
API and with nothing around it. It is created, attached to, started, waited for and removed. At its
door stands a plain registry that knows the base image's layers; nobody judges, records, verifies
or publishes anything.

*docker* and *local* are the whole of `runner submit`, from the start of its Python to its end; both
know the base images. *docker, launch and build* are the two stages of the same command that have
something beside them by hand. Each run does everything once, every second run in the opposite
order, and a first one does not count. Ratios are medians of those within each run.
"""
BY_HAND, DOCKER, LOCAL = "by hand", "docker", "local"
STAGES = f"{DOCKER}, launch and build"


@dataclass(frozen=True, slots=True)
class Context:
    """One thing to build."""

    name: str
    directory: Path
    base: str
    build_args: Mapping[str, str]


class Bench:
    """The rounds, and what they found: seconds by context and side, in the order of the runs."""

    def __init__(self, directory: Path, host: str, engine: RealEngine) -> None:
        self.seconds: dict[str, dict[str, list[float]]] = {}
        self._directory = directory
        self._host = host
        self._pushes = 0
        builders = directory / "builders"
        installs.from_packages(RootfsStore(builders), Buildah(), mirror=None, report=lambda _: None)
        settings = Settings(
            registries={host: RegistrySettings(plain_http=True, private_address=True)}
        )
        self._local = Person.move_in(directory / LOCAL, settings, builders)
        docker = Person.move_in(directory / DOCKER, engine.settings(settings), builders)
        self._docker = replace(docker, backend=DOCKER)
        self._by_hand = ByHand(engine.socket, RUNTIME, directory, directory / "by-hand")
        self._specs: dict[str, SandboxSpec] = {}

    def round(self, contexts: Sequence[Context], number: int) -> None:
        """Does everything once, in the opposite order each second time."""
        for context in contexts:
            if context.name not in self._specs:
                self._specs[context.name] = self._record(context)
            sides = (self._build_by_hand, self._build_by_docker, self._build_locally)
            for side in sides[:: -1 if number % 2 else 1]:
                for name, seconds in side(context).items():
                    found = self.seconds.setdefault(context.name, {})
                    found.setdefault(name, []).append(seconds)
                    print(f"{context.name}, {name}: {seconds:.2f} s", file=sys.stderr, flush=True)

    def forget(self) -> None:
        """Of the round that warms up, nothing counts."""
        self.seconds.clear()

    def _record(self, context: Context) -> SandboxSpec:
        """What ours launches for ``context``; the engine has the builder's image by that."""
        person = self._docker
        real = docker_backend(person.home, person.settings)
        recording = RecordingBackend(real, self._directory / f"inputs-{context.name}")
        tools = replace(person.tools(), backends=OnDemand({DOCKER: lambda: recording}))
        person.submit(context.directory, build_args=context.build_args, tools=tools)
        assert recording.spec is not None
        return recording.spec

    def _build_by_hand(self, context: Context) -> dict[str, float]:
        repository = self._repository()
        registry.push_again(context.base, repository)  # as our gateway has its layers too
        return {BY_HAND: self._by_hand.build(self._specs[context.name], repository)}

    def _build_by_docker(self, context: Context) -> dict[str, float]:
        timeline = self._submit(self._docker, context)
        return {
            DOCKER: timeline.seconds,
            STAGES: timeline.stage("launch") + timeline.stage("build"),
        }

    def _build_locally(self, context: Context) -> dict[str, float]:
        return {LOCAL: self._submit(self._local, context).seconds}

    def _submit(self, person: Person, context: Context) -> ours.Timeline:
        return ours.submit(
            person.having(PYTHONDONTWRITEBYTECODE=""),  # whoever uses it twice has its bytecode
            context.directory,
            destination=f"{self._host}/{self._repository()}:1",
            build_args=context.build_args,
        )

    def _repository(self) -> str:
        self._pushes += 1
        return f"bench/build-{self._pushes}"


def contexts(directory: Path, host: str) -> list[Context]:
    toolbox = registry.push_toolbox(host, directory)
    hello = write_context(
        directory / "hello",
        f'FROM {toolbox}\nCOPY greeting /greeting\nRUN ["true"]\n',
        greeting="hello\n",
    )
    c_hello = directory / "c-hello"
    shutil.copytree(REPOSITORY / "examples" / "c-hello", c_hello)
    debian = registry.push_debian(host, CACHE)
    return [
        Context("hello", hello, toolbox, {}),
        Context("c-hello", c_hello, debian, {"BASE": debian}),
    ]


def page(found: Mapping[str, Mapping[str, list[float]]], facts: Mapping[str, str]) -> str:
    rows = [
        (f"{name}, {side}", *middle(seconds), ratio(seconds, sides[BY_HAND]),
         ratio(seconds, sides[LOCAL]))
        for name, sides in found.items()
        for side, seconds in sorted(sides.items())
    ]  # fmt: skip
    head = ("build", "median s", "p90 s", "ratio to by hand", "ratio to local")
    return "\n".join([HEAD, table(("machine", ""), facts.items()), table(head, rows)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.docker", description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="rounds that count [%(default)s]")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write [%(default)s]")
    parsed = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    facts = {**machine.facts(), "runs": str(parsed.runs)}
    with workplace() as directory, registry.running(directory) as host:
        (directory / "engine").mkdir()
        with running_engine(directory / "engine") as engine:
            bench = Bench(directory, host, engine)
            building = contexts(directory, host)
            for number in range(parsed.runs + 1):
                bench.round(building, number)
                if number == 0:
                    bench.forget()
            with engine.client() as client:
                facts["Docker Engine"] = client.info().version
    facts["load average at the end"] = machine.load()
    shown = page(bench.seconds, facts)
    parsed.page.write_text(shown, encoding="utf-8")
    print(shown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

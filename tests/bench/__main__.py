"""``python -m tests.bench``: measures, and writes docs/benchmarks.json and docs/benchmarks.md.

What is needed once (a builder, a registry, base images) is made first; then come rounds that do
every command once, and last the page is rendered from the figures.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from builder.buildah import Buildah
from runner.events import Stage
from runner.settings import RegistrySettings, Settings
from runner.stores import installs
from runner.stores.rootfs import Installed, RootfsStore, remove_tree
from tests.bench import bare, machine, ours, page, registry
from tests.bench.clocked import clocks
from tests.support.hosts import REPOSITORY, Person, write_context

DOCS = REPOSITORY / "docs"
CACHE = REPOSITORY / ".cache" / "bench"

Seconds = defaultdict[str, list[float]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="rounds that count [%(default)s]")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where to write [%(default)s]")
    parser.add_argument(
        "--page-only", action="store_true", help="render the page again, measure nothing"
    )
    parsed = parser.parse_args()
    raw = parsed.docs / "benchmarks.json"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends us, all is removed
    if not parsed.page_only:
        directory = Path(tempfile.mkdtemp(prefix="runner-bench-", dir="/var/tmp"))
        directory.chmod(0o755)  # sandboxes have uids of their own
        try:
            measured = measure(directory, max(1, parsed.runs))
        finally:
            remove_tree(directory)
        raw.write_text(measured.model_dump_json(indent=1) + "\n", encoding="utf-8")
    found = page.Measured.model_validate_json(raw.read_bytes())
    (parsed.docs / "benchmarks.md").write_text(page.render(found), encoding="utf-8")
    print(page.render(found))
    return 0


def measure(directory: Path, runs: int) -> page.Measured:
    """All of it; everything that it makes is below ``directory`` and in CACHE."""
    facts = machine.facts()
    CACHE.mkdir(parents=True, exist_ok=True)
    builder, install_seconds = _install(directory)
    with registry.running(directory) as host:
        say("base images")
        toolbox = registry.push_toolbox(host, directory)
        debian = registry.push_debian(host, CACHE)
        hello = write_context(
            directory / "hello",
            f'FROM {toolbox}\nCOPY greeting /greeting\nRUN ["true"]\n',
            greeting="hello\n",
        )
        c_hello = directory / "c-hello"
        shutil.copytree(REPOSITORY / "examples" / "c-hello", c_hello)
        peer, no_bare = _peer(builder, directory, host, toolbox)
        bench = Bench(directory, builder, host, peer)
        builds = [Build("hello", hello, {}), Build("c-hello", c_hello, {"BASE": debian})]
        for number in range(runs + 1):
            bench.round(builds, number)
            if number == 0:  # for warming up
                bench.forget()
                for build in builds:
                    build.seconds.clear()
        return page.Measured(
            machine={
                **facts,
                "load average at the end": machine.load(),
                "builder": f"buildah {builder.version}",
            },
            runs=runs,
            isolation=peer.isolation if peer else None,
            no_bare=no_bare,
            builds={build.name: build.seconds for build in builds},
            stages=bench.stages,
            start_path=bench.start_path,
            whole_start_path=bench.whole_start_path,
            processes=bench.processes,
            clocked=bench.clocked,
            builder_bytes=builder.size_bytes,
            builder_entries=builder.entries,
            install_seconds=install_seconds,
            toolbox_bytes=(directory / "toolbox.tar").stat().st_size,
            debian_bytes=(CACHE / "debian.tar").stat().st_size,
        )


def _install(directory: Path) -> tuple[Installed, float]:
    say("the builder's root filesystem")
    store = RootfsStore(directory / "builders")
    started = time.monotonic()
    installed = installs.from_packages(store, Buildah(), mirror=None, report=lambda _: None)
    return installed, time.monotonic() - started


def _peer(
    builder: Installed, directory: Path, host: str, base: str
) -> tuple[bare.Bare | None, str]:
    """The bare builder, or why there is none."""
    try:
        return bare.working(builder.root, directory / "bare", registry=host, base=base), ""
    except bare.BareFailed as error:
        say(f"no bare builder: {error}")
        return None, str(error)


@dataclass(frozen=True, slots=True)
class Build:
    """One thing to build, and what it took: by ``bare``, ``cold`` and ``warm``, run by run."""

    name: str
    context: Path
    build_args: Mapping[str, str]
    seconds: Seconds = field(default_factory=lambda: defaultdict(list))


class Bench:
    """The rounds, and what they found."""

    def __init__(
        self, directory: Path, builder: Installed, host: str, peer: bare.Bare | None
    ) -> None:
        self._directory = directory
        self._builders = builder.root.parent.parent.parent
        self._host = host
        self._peer = peer
        self._pushes = 0
        self._warm = self._person("warm")
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self.stages: Seconds = defaultdict(list)
        self.start_path: Seconds = defaultdict(list)
        self.whole_start_path: list[float] = []
        self.processes: Seconds = defaultdict(list)
        self.clocked: Seconds = defaultdict(list)

    def round(self, builds: Sequence[Build], number: int) -> None:
        """Does everything once, in the opposite order each second time."""
        steps: list[Callable[[], None]] = [self._processes]
        for build in builds:
            sides: dict[str, Callable[[Build], float]] = {"cold": self._cold, "warm": self._warmed}
            if self._peer is not None:
                sides = {"bare": self._bare, **sides}
            steps += [partial(self._measure, build, side, do) for side, do in sides.items()]
        steps.append(partial(self._clocked, builds[0]))
        for step in steps[:: -1 if number % 2 else 1]:
            step()

    def _measure(self, build: Build, side: str, do: Callable[[Build], float]) -> None:
        seconds = do(build)
        build.seconds[side].append(seconds)
        say(f"{build.name}, {side}: {seconds:.2f} s")

    def _bare(self, build: Build) -> float:
        assert self._peer is not None
        return self._peer.build(
            build.context,
            registry=self._host,
            repository=self._repository(),
            build_args=build.build_args,
        )

    def _cold(self, build: Build) -> float:
        person = self._person("cold")
        try:
            return self._submit(person, build).seconds
        finally:
            remove_tree(person.directory)

    def _warmed(self, build: Build) -> float:
        timeline = self._submit(self._warm, build)
        if build.name == "hello":
            for name, seconds in timeline.stretches().items():
                self.start_path[name].append(seconds)
            self.whole_start_path.append(timeline.start_path)
            for stage in Stage:
                self.stages[stage].append(timeline.stage(stage))
        return timeline.seconds

    def _submit(self, person: Person, build: Build) -> ours.Timeline:
        return ours.submit(
            person, build.context, destination=self._destination(), build_args=build.build_args
        )

    def _clocked(self, build: Build) -> None:
        with clocks() as spent:
            self._warm.submit(
                build.context, destination=self._destination(), build_args=build.build_args
            )
        for name, seconds in spent.items():
            self.clocked[name].append(seconds)

    def _processes(self) -> None:
        self.processes["`python -c pass`"].append(ours.wall_seconds("-c", "pass"))
        self.processes["`runner --help`"].append(ours.wall_seconds("-m", "runner", "--help"))
        self.processes["`import runner.cli.submit`, the whole process"].append(
            ours.wall_seconds("-c", "import runner.cli.submit")
        )
        self.processes["the same, `-X importtime` added up"].append(
            ours.import_seconds("runner.cli.submit")
        )

    def _person(self, name: str) -> Person:
        here = RegistrySettings(plain_http=True, private_address=True)
        settings = Settings(registries={self._host: here})
        # Whoever uses a command twice has its bytecode.
        person = Person.move_in(self._directory / name, settings, self._builders)
        return person.having(PYTHONDONTWRITEBYTECODE="")

    def _repository(self) -> str:
        self._pushes += 1
        return f"bench/build-{self._pushes}"

    def _destination(self) -> str:
        return f"{self._host}/{self._repository()}:1"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""``python -m tests.bench.bases``: builds whose base image is new, or known. Writes its page.

RUNNER_CURRENT_RUNSC names a runsc that mounts EROFS, for a column of its own.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from builder.buildah import Buildah
from policies.model import MIB
from runner.settings import LocalSettings, RegistrySettings, Settings
from runner.stores import installs
from runner.stores.rootfs import RootfsStore, remove_tree
from runner.stores.unpacked import UnpackedStore
from tests.bench import bare, machine, ours, registry
from tests.support.hosts import REPOSITORY, Person, write_context

CACHE = REPOSITORY / ".cache" / "bench"
PAGE = REPOSITORY / "docs" / "benchmarks-bases.md"
CURRENT = "RUNNER_CURRENT_RUNSC"

HEAD = """\
# Base images: new, and known

Made by `make bench` (`python -m tests.bench.bases --runs N`) as root. Seconds of wall time, median
of the runs; the figure behind it is the ratio to *bare, new* within each run. *bare* is the same
buildah of the same root filesystem on the host, in a chroot and without a sandbox: *new* with an
empty storage, *known* with the base image in its storage. Both sides take base images from a
registry on loopback and push to it; ours verifies and publishes besides. *new* is a first build on
a host that has nothing: the base image is fetched, checked, and unpacked in a sandbox of its own.
*known* has it unpacked.

The packaged runsc cannot mount the unpacked image, and each build copies it into its own memory. So
does the current one here: mmdebstrap puts device nodes into these images, which gVisor's EROFS
would lose. A run from before devices were looked at, mounted, took 5.8 s for c-hello, known.
"""

UNPACKED = """\
## Unpacking, once per image

Seconds of the stage *bases* of a first build: fetching, checking, unpacking and packing.
"""


@dataclass(frozen=True, slots=True)
class Context:
    """One thing to build, from one base image."""

    name: str
    directory: Path
    base: str


@dataclass(frozen=True, slots=True)
class Image:
    """What unpacking one image took."""

    layer_bytes: int
    packed_bytes: int
    seconds: list[float]


class Bench:
    """Everything that one run of this module measures."""

    def __init__(self, directory: Path, host: str, contexts: Sequence[Context]) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.images: dict[tuple[str, str], Image] = {}
        self._directory = directory
        self._host = host
        self._contexts = contexts
        self._pushes = 0
        store = RootfsStore(directory / "builders")
        self._builder = installs.from_packages(store, Buildah(), mirror=None, report=lambda _: None)
        self._bare = bare.working(
            self._builder.root, directory / "bare", registry=host, base=contexts[0].base
        )
        self._runtimes = {"packaged runsc": "runsc"}
        if (current := os.environ.get(CURRENT)) is not None:
            self._runtimes["current runsc"] = current
        self._known = {name: self._person(name, path) for name, path in self._runtimes.items()}

    def round(self, number: int) -> None:
        """Every build once on each side, in the opposite order each second time."""
        for context in self._contexts:
            storage = self._directory / "storage"
            sides: list[tuple[str, Callable[[], float]]] = [
                ("bare, new", partial(self._build_bare, context, None)),
                ("bare, known", partial(self._build_bare, context, storage)),
            ]
            for name in self._runtimes:
                sides.append((f"{name}, new", partial(self._new, context, name)))
                sides.append((f"{name}, known", partial(self._submit, context, name)))
            for side, build in sides[:: -1 if number % 2 else 1]:
                seconds = build()
                self.seconds[context.name, side].append(seconds)
                print(f"{context.name}, {side}: {seconds:.2f} s", file=sys.stderr, flush=True)

    def forget(self) -> None:
        """Of the round that warms up, nothing counts."""
        self.seconds.clear()
        self.images.clear()

    def runtimes(self) -> Mapping[str, str]:
        return self._runtimes

    def _build_bare(self, context: Context, storage: Path | None) -> float:
        if storage is not None:
            storage.mkdir(exist_ok=True)
        return replace(self._bare, storage=storage).build(
            context.directory,
            registry=self._host,
            repository=self._repository(),
            build_args={"BASE": context.base},
        )

    def _submit(self, context: Context, runtime: str) -> float:
        return self._timed(self._known[runtime], context).seconds

    def _new(self, context: Context, runtime: str) -> float:
        person = self._person("new", self._runtimes[runtime])
        try:
            timeline = self._timed(person, context)
            (unpacked,) = UnpackedStore(person.home.unpacked).all()
            blobs = (person.home.base_images / "blobs").glob("*/*")
            image = self.images.setdefault(
                (context.name, runtime),
                Image(sum(b.stat().st_size for b in blobs), unpacked.size_bytes, []),
            )
            image.seconds.append(timeline.stage("bases"))
        finally:
            remove_tree(person.directory)
        return timeline.seconds

    def _timed(self, person: Person, context: Context) -> ours.Timeline:
        return ours.submit(
            person,
            context.directory,
            destination=f"{self._host}/{self._repository()}:1",
            build_args={"BASE": context.base},
        )

    def _repository(self) -> str:
        self._pushes += 1
        return f"bench/build-{self._pushes}"

    def _person(self, name: str, runsc: str) -> Person:
        here = RegistrySettings(plain_http=True, private_address=True)
        settings = Settings(registries={self._host: here}, local=LocalSettings(runsc=runsc))
        directory = self._directory / name.replace(" ", "-")
        builders = self._builder.root.parent.parent.parent
        return Person.move_in(directory, settings, builders).having(PYTHONDONTWRITEBYTECODE="")


def contexts(directory: Path, host: str) -> list[Context]:
    c_hello = directory / "c-hello"
    shutil.copytree(REPOSITORY / "examples" / "c-hello", c_hello)
    python = write_context(
        directory / "python",
        "ARG BASE\nFROM ${BASE}\nWORKDIR /app\nCOPY app.py .\n"
        "RUN python3 -m compileall -q . && python3 app.py\nCMD python3 app.py\n",
        **{"app.py": "import json\nprint(json.dumps({'hello': 'world'}))\n"},
    )
    node = write_context(
        directory / "node",
        "ARG BASE\nFROM ${BASE} AS build\nWORKDIR /app\nCOPY app.js .\nRUN node --check app.js\n"
        "FROM ${BASE}\nCOPY --from=build /app /app\nRUN node /app/app.js\nCMD node /app/app.js\n",
        **{"app.js": "console.log(JSON.stringify({hello: 'world'}))\n"},
    )
    return [
        Context("c-hello", c_hello, registry.push_debian(host, CACHE)),
        Context("python", python, registry.push_debian(host, CACHE, "python", "python3")),
        Context("node", node, registry.push_debian(host, CACHE, "node", "nodejs")),
    ]


def page(bench: Bench, facts: Mapping[str, str]) -> str:
    rows = ["| build | " + " | ".join(_sides(bench)) + " |"]
    rows.append("|---" * (len(_sides(bench)) + 1) + "|")
    for name in dict.fromkeys(name for name, _ in bench.seconds):
        first = bench.seconds[name, "bare, new"]
        cells = [_cell(bench.seconds[name, side], first) for side in _sides(bench)]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    images = ["| image of | runtime | layers MiB | unpacked MiB | seconds |", "|---" * 5 + "|"]
    for (name, runtime), image in bench.images.items():
        images.append(
            f"| {name} | {runtime} | {image.layer_bytes / MIB:.0f} | "
            f"{image.packed_bytes / MIB:.0f} | {median(image.seconds):.1f} |"
        )
    machine_lines = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    return "\n".join([HEAD, machine_lines, "", *rows, "", UNPACKED, *images, ""])


def _sides(bench: Bench) -> list[str]:
    return list(dict.fromkeys(side for _, side in sorted(bench.seconds, key=_order)))


def _order(key: tuple[str, str]) -> tuple[bool, str, bool]:
    side = key[1]
    return not side.startswith("bare"), side.partition(",")[0], not side.endswith("new")


def _cell(seconds: list[float], first: list[float]) -> str:
    ratio = median(one / other for one, other in zip(seconds, first, strict=True))
    return f"{median(seconds):.2f} ({ratio:.2f})"


@contextmanager
def workplace() -> Iterator[Path]:
    """A directory that is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="runner-bench-", dir="/var/tmp"))
    directory.chmod(0o755)  # sandboxes have uids of their own
    try:
        yield directory
    finally:
        remove_tree(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="rounds that count [%(default)s]")
    parsed = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    facts = machine.facts()
    with workplace() as directory, registry.running(directory) as host:
        bench = Bench(directory, host, contexts(directory, host))
        for number in range(parsed.runs + 1):
            bench.round(number)
            if number == 0:
                bench.forget()
        for name, path in bench.runtimes().items():
            shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
            facts[name] = shown.stdout.partition("\n")[0].removeprefix("runsc version ")
        facts.pop("runsc")
        facts["load average at the end"] = machine.load()
        PAGE.write_text(page(bench, facts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""docs/benchmarks.md out of docs/benchmarks.json. Pure."""

from collections.abc import Iterable, Sequence
from statistics import median, quantiles

from pydantic import BaseModel, ConfigDict

from policies.model import MIB

HEAD = """\
# Benchmarks

Written by `make bench` from `benchmarks.json`, which holds every single run. The machine is small,
shared and noisy: the figures show proportions and where time goes, not what a build server does.
Compare only figures of one table.
"""

BUILDS = """\
## A build, with and without the sandbox

*runner* is the whole command `runner submit`: snapshot, decision, sandbox, build, verification,
publishing to a registry on loopback. *bare* is the same buildah and runc of the same root
filesystem with the same arguments and the same push, run by root in a chroot on the host
(`--isolation={isolation}`); nothing contains it and nothing is verified. Both begin with an empty
storage in memory and take the base image over HTTP. With a *cold* cache `runner` fetches the base
image from the registry first, with a *warm* one it has the blobs already. The ratio is the median
of the ratios within each run.

`hello` copies one file and runs `true` on a base of {toolbox} MiB. `c-hello` is
`examples/c-hello`, two stages on a Debian base with a compiler of {debian} MiB.
"""

START = """\
## From the command to the builder's first line

Of the warm `hello` builds: when the lines of `--json` arrived, so without a gap from the start of
the process on. buildah says nothing between its exec and its first line, so the exec of its argv
lies within the last row.
"""

INSIDE = """\
## Where it goes inside

The same build, with clocks around functions of ours (`tests/bench/clocked.py`), every call of a
build added up. The rows overlap, and supervision runs beside the build.
"""

REPEAT = """\
## Measured how, and again

`make bench` (`python -m tests.bench --runs N`) as root; others cannot mount what *bare* needs, and
measure our side alone. Each run does every command once, one after the other, and every second run
in the opposite order; a first round is thrown away. Every build has a repository of its own, every
*cold* one a home of its own. Seconds are wall time by the monotonic clock; those of *bare* begin
when its mounts are made. p90 of few runs is close to the slowest one.
"""


SIDES = {"bare": "bare", "cold": "runner, cold cache", "warm": "runner, warm cache"}


class Measured(BaseModel):
    """Everything that one bench found. Lists are seconds, run by run, in the order of the runs."""

    model_config = ConfigDict(frozen=True)

    machine: dict[str, str]
    runs: int
    isolation: str | None
    """Of the bare builder's RUN steps; None where it could not be run."""
    no_bare: str
    """Why there is no bare builder."""
    builds: dict[str, dict[str, list[float]]]
    """By build, then ``bare``, ``cold``, ``warm``."""
    stages: dict[str, list[float]]
    start_path: dict[str, list[float]]
    whole_start_path: list[float]
    processes: dict[str, list[float]]
    clocked: dict[str, list[float]]
    builder_bytes: int
    builder_entries: int
    install_seconds: float
    toolbox_bytes: int
    debian_bytes: int


def render(found: Measured) -> str:
    """The page."""
    parts = [
        HEAD,
        table(("machine", ""), {**found.machine, "runs": str(found.runs)}.items()),
        BUILDS.format(
            isolation=found.isolation,
            toolbox=found.toolbox_bytes // MIB,
            debian=found.debian_bytes // MIB,
        ),
        _builds(found),
        START,
        _spread("stretch", {**found.start_path, "**altogether**": found.whole_start_path}),
        "The stages of the same builds as `runner` itself counts them:\n",
        _spread("stage", found.stages),
        "Before anything of ours runs (aim for `runner --help`: 0.150 s):\n",
        _spread("process", found.processes),
        INSIDE,
        _spread("what", found.clocked),
        "## Once per host\n",
        table(
            ("what", ""),
            {
                "builder's root filesystem": f"{found.builder_bytes // MIB} MiB in "
                f"{found.builder_entries} entries",
                "`runner builder install buildah`": f"{found.install_seconds:.1f} s, "
                "most of it the mirror's",
            }.items(),
        ),
        REPEAT,
    ]
    return "\n".join(parts)


def _builds(found: Measured) -> str:
    rows = []
    for name, sides in found.builds.items():
        for side, title in SIDES.items():
            if side in sides:
                to_bare = ratio(sides[side], sides.get("bare", []))
                rows.append((f"{name}, {title}", *middle(sides[side]), to_bare))
    missing = f"\nThe bare builder could not be run: {found.no_bare}\n" if found.no_bare else ""
    return table(("build", "median s", "p90 s", "ratio to bare"), rows) + missing


def ratio(ours: list[float], other: list[float]) -> str:
    """Run by run, so that noise hits both."""
    if not other:
        return "-"
    return f"{median(one / two for one, two in zip(ours, other, strict=True)):.2f}"


def _spread(first: str, rows: dict[str, list[float]]) -> str:
    cells = [(name, *middle(seconds)) for name, seconds in rows.items()]
    return table((first, "median s", "p90 s"), cells)


def middle(seconds: list[float]) -> tuple[str, str]:
    """Median and 90th percentile."""
    return f"{median(seconds):.3f}", f"{p90(seconds):.3f}"


def p90(values: list[float]) -> float:
    """Interpolated between the slowest runs."""
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of Markdown; figures stand on the right."""
    line = " | ".join(("---", *("---:" for _ in head[1:])))
    lines = [" | ".join(head), line, *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)

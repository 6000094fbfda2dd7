"""``python -m tests.bench.policy``: what a decision costs, and how it grows with the rules.

Writes docs/benchmarks-policy.md. Figures are of one process; what matters is how they relate.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from policies.engine import decide
from policies.facts import BuilderFacts, BuildFacts, DockerfileFacts, HostFacts, SourceFacts
from policies.loader import Policy, parse, shipped
from policies.model import Decision, Isolation
from policies.reference import ImageReference
from tests.bench import machine
from tests.support.hosts import REPOSITORY

PAGE = REPOSITORY / "docs" / "benchmarks-policy.md"
RULES = (1, 10, 50, 200, 1000)
FACTS = BuildFacts(
    source=SourceFacts(fork=False, ref="refs/heads/main", url="https://git.example.com/a/b"),
    tenant="acme",
    dockerfile=DockerfileFacts(images=tuple(map(ImageReference.parse, ("debian:12", "alpine")))),
    builder=BuilderFacts(capabilities=("CHOWN",)),
    host=HostFacts(isolations=frozenset({Isolation.GVISOR})),
)
CONDITIONS = (
    "tenant == 'other-{n}' && !source.fork",
    "source.ref.glob('refs/tags/v{n}.*')",
    "dockerfile.images.exists(i, i.glob('registry.example.com/base-{n}/**'))",
    "context.bytes > {n}000000 || size(destinations) > {n}",
)
_COLD = """
import time; start = time.perf_counter()
from policies.loader import shipped
from policies.engine import decide
imported = time.perf_counter()
from tests.bench.policy import FACTS
begun = time.perf_counter()
decide([shipped("default")], FACTS)
print(imported - start, time.perf_counter() - begun)
"""


def policy(rules: int) -> Policy:
    """A policy in which no rule holds, so that every one is evaluated."""
    default = {"backends": ["*"], "builders": ["*"], "capabilities": ["*"], "base_images": ["**"]}
    document = {
        "apiVersion": "runner/v1alpha1",
        "name": "bench",
        "rules": [
            {"name": f"r{n}", "when": CONDITIONS[n % 4].format(n=n + 1000), "then": {"priority": 1}}
            for n in range(rules)
        ],
        "default": default,
    }
    return parse(json.dumps(document).encode(), "bench")


def seconds(work: Callable[[], object], times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def row(rules: int, decisions: int) -> tuple[float, float, float]:
    """Median seconds to load, median and 99th percentile to decide."""
    loaded = policy(rules)
    assert isinstance(decide([loaded], FACTS), Decision)
    took = seconds(lambda: decide([loaded], FACTS), decisions)
    loading = statistics.median(seconds(lambda: policy(rules), 5))
    return loading, statistics.median(took), statistics.quantiles(took, n=100)[98]


def cold() -> tuple[float, float]:
    """Seconds to import the engine, then to load the default and decide, in new processes."""
    runs = [
        tuple(map(float, subprocess.run(
            [sys.executable, "-c", _COLD], check=True, capture_output=True, timeout=60,
            cwd=REPOSITORY,
        ).stdout.split()))
        for _ in range(7)
    ]  # fmt: skip
    imports, decisions = zip(*runs, strict=True)
    return statistics.median(imports), statistics.median(decisions)


def render(rows: Sequence[tuple[int, tuple[float, float, float]]], decisions: int) -> str:
    imported, first = cold()
    warm = statistics.median(seconds(lambda: decide([shipped("default")], FACTS), 200))
    least = rows[0][1][1]
    made = f"Made by `make bench`, {decisions} decisions a row. No rule holds: all are evaluated."
    lines = [
        "# What a decision costs",
        "",
        made,
        "",
        *(f"- {name}: {value}" for name, value in machine.facts().items()),
        "",
        "| rules | load (ms) | decide: median (us) | p99 (us) | times one rule | us a rule |",
        "|---|---|---|---|---|---|",
    ]
    for rules, (loading, median, worst) in rows:
        lines.append(
            f"| {rules} | {loading * 1e3:.1f} | {median * 1e6:.0f} | {worst * 1e6:.0f} | "
            f"{median / least:.1f} | {median * 1e6 / rules:.1f} |"
        )
    default = (
        f"Loading the shipped default and deciding takes {warm * 1e3:.1f} ms warm, and "
        f"{first * 1e3:.1f} ms the first time in a process, after {imported * 1e3:.0f} ms of "
        "imports (pydantic and YAML among them)."
    )
    return "\n".join([*lines, "", default, ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.policy", description=__doc__)
    parser.add_argument("--decisions", type=int, default=10_000, help="[%(default)s]")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write [%(default)s]")
    parsed = parser.parse_args()
    rows = [(rules, row(rules, parsed.decisions)) for rules in RULES]
    page = render(rows, parsed.decisions)
    parsed.page.write_text(page, encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m tests.bench.gateway``: the gateway's registry beside docker-registry.

Writes docs/benchmarks-gateway.md. Both are processes of their own on the same machine in the same
run, with the same clients and the same blobs; whatever is measured is measured of one and then of
the other at once, in the opposite order each second time.
"""

import argparse
import base64
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from policies.model import EgressRule, Limits, Network
from runner.gateway.http import Handler, Server
from runner.gateway.listen import Failed, tcp
from runner.gateway.session import Session
from runner.registry.auth import Anonymous
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from tests.bench import machine, registry, tunnel
from tests.bench.blobs import Blob, Client, Registry, Work, work
from tests.support.gateway import decision
from tests.support.hosts import REPOSITORY

MEMORY = Path("/dev/shm")
PAGE = REPOSITORY / "docs" / "benchmarks-gateway.md"
MIB = 1 << 20
GIB = 1 << 30
SESSIONS = 50


@dataclass(frozen=True, slots=True)
class Load:
    """So many blobs of so many bytes."""

    count: int
    size: int

    def __str__(self) -> str:
        size = f"{self.size >> 20} MiB" if self.size >= MIB else f"{self.size >> 10} KiB"
        return f"{self.count:,} x {size}"

    def scaled(self, by: float) -> "Load":
        """Smaller blobs, or fewer where they are small."""
        if self.size < MIB:
            return Load(max(1, round(self.count * by)), self.size)
        return Load(self.count, max(MIB, round(self.size * by)))

    def shares(self, data: Path, clients: int) -> list[list[Blob]]:
        """The same bytes for however many clients: one blob for several is cut up among them."""
        count, size = self.count, self.size
        if count < clients:
            count, size = clients, self.size * self.count // clients
        with data.open("rb") as file:
            blobs = [_blob(data, file.fileno(), number * size, size) for number in range(count)]
        return [blobs[first::clients] for first in range(clients)]


LOADS = (Load(1, GIB), Load(10, 100 * MIB), Load(2000, 10 << 10))


@dataclass(frozen=True, slots=True)
class Measured:
    """One side under one load, once."""

    work: Work
    bytes: int
    cpu_seconds: float
    peak_bytes: int
    """Resident, of the server since its start."""

    blobs: int

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.work.seconds


def _blob(path: Path, descriptor: int, offset: int, size: int) -> Blob:
    digest = hashlib.sha256()
    for start in range(offset, offset + size, MIB):
        digest.update(os.pread(descriptor, min(MIB, offset + size - start), start))
    return Blob(path, offset, size, f"sha256:{digest.hexdigest()}")


# -- the sides -----------------------------------------------------------------------------------


class Loopback:
    """A door for clients that know no Unix sockets."""

    def __init__(self) -> None:
        self.listener = tcp("127.0.0.1", 0)

    def open(self, handler: Handler, failed: Failed) -> Server:
        return Server(self.listener, handler, peer_uid=None, failed=failed)


def serve(directory: Path, sessions: int, origin_port: int) -> int:
    """Opens sessions, says where they listen, and serves until stdin ends."""
    rule = EgressRule(
        hosts=(tunnel.HOST,), ports=(origin_port,), private_ranges=("127.0.0.0/8", "::1/128")
    )
    limits = Limits(egress_bytes=1 << 50)
    decided = decision(network=Network.EGRESS, egress=((rule,),), limits=limits)
    opened, places = [], []
    for number in range(sessions):
        home = directory / str(number)
        home.mkdir()
        door = Loopback()
        session = Session(
            door,
            decided,
            settings=Settings(),
            credentials=Anonymous(),
            cache=BlobStore(directory / "cache"),
            staged=home / "staged",
            ledger=home / "ledger.jsonl",
            upstream_hosts=(),
            fetching=lambda *_: None,
        )
        opened.append(session)
        places.append((session.token, *door.listener.getsockname()))
    print(json.dumps(places), flush=True)
    sys.stdin.read()
    for session in opened:
        session.close()
    return 0


@contextmanager
def gateway(
    directory: Path, sessions: int = 1, origin_port: int = 443
) -> Iterator[tuple[int, list[Registry]]]:
    """A gateway in a process of its own; its pid, and where its sessions listen."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.gateway", "--serve", directory, str(sessions),
         str(origin_port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        found = []
        for token, host, port in json.loads(process.stdout.readline()):
            login = base64.b64encode(f"session:{token}".encode()).decode()
            header = f"Authorization: Basic {login}\r\n"
            found.append(Registry((host, port), "staged/image", header))
        yield process.pid, found
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


@contextmanager
def docker_registry(directory: Path) -> Iterator[tuple[int, list[Registry]]]:
    """A docker-registry likewise, with the cache of descriptors that its manual recommends."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    config = directory / "registry.yml"
    config.write_text(
        "version: 0.1\n"
        "log: {level: error, accesslog: {disabled: true}}\n"
        "storage:\n"
        f"  filesystem: {{rootdirectory: {directory / 'registry'}}}\n"
        "  cache: {blobdescriptor: inmemory}\n"
        f'http: {{addr: "127.0.0.1:{port}"}}\n',
        encoding="utf-8",
    )
    with (directory / "registry.log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", config], stdout=log, stderr=log)
        try:
            registry._wait_for(process, socket.AF_INET, ("127.0.0.1", port))
            yield process.pid, [Registry(("127.0.0.1", port), "bench/image")]
        finally:
            process.terminate()
            process.wait()


SIDES = {"gateway": gateway, "docker-registry": docker_registry}


# -- measuring -----------------------------------------------------------------------------------

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Of the process so far, in the kernel and outside."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def forget_peak(pid: int) -> None:
    """From now on ``peak_bytes`` counts anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def measure(
    pid: int,
    registries: Sequence[Registry],
    shares: Sequence[Sequence[Blob]],
    do: Callable[[Client, Blob], None],
) -> Measured:
    """One server under one load."""
    forget_peak(pid)
    before = cpu_seconds(pid)
    done = work(registries, shares, do)
    size = sum(blob.size for share in shares for blob in share)
    count = sum(map(len, shares))
    return Measured(done, size, cpu_seconds(pid) - before, peak_bytes(pid), count)


def side(name: str, shares: Sequence[Sequence[Blob]], directory: Path) -> tuple[Measured, Measured]:
    """A push, then a pull of the same, from a server that was just started."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        with SIDES[name](Path(place)) as (pid, (where,)):
            registries = [where] * len(shares)
            pushed = measure(pid, registries, shares, Client.push)
            pulled = measure(pid, registries, shares, Client.pull)
        return pushed, pulled


def many_sessions(data: Path, directory: Path) -> tuple[int, int]:
    """Peak memory in bytes of one gateway: idle with its sessions, and when all push and pull."""
    load = Load(SESSIONS, 16 * MIB)
    shares = load.shares(data, SESSIONS)
    with (
        tempfile.TemporaryDirectory(dir=directory) as place,
        gateway(Path(place), SESSIONS) as (pid, registries),
    ):
        idle = peak_bytes(pid)
        busy = [measure(pid, registries, shares, do) for do in (Client.push, Client.pull)]
        return idle, max(found.peak_bytes for found in busy)


def tunnels(directory: Path, size: int, runs: int) -> dict[str, list[tunnel.Carried]]:
    """A download of ``size`` bytes each way, run by run."""
    found: dict[str, list[tunnel.Carried]] = {way: [] for way in tunnel.WAYS}
    with (
        tempfile.TemporaryDirectory(dir=directory) as place,
        tunnel.origin(Path(place), size) as (port, cert),
        gateway(Path(place), 1, port) as (pid, (where,)),
    ):
        for _, (way, carried) in itertools.product(range(runs), found.items()):
            direct = tunnel.download(None, port, cert, way, size)
            before = cpu_seconds(pid)
            through = tunnel.download(where, port, cert, way, size)
            carried.append(tunnel.Carried(size, direct, through, cpu_seconds(pid) - before))
    return found


# -- the page ------------------------------------------------------------------------------------

HEAD = """\
# The gateway beside docker-registry

Made by `make bench` (`python -m tests.bench.gateway --runs N`). Both servers are processes of their
own on loopback TCP, started anew for each row, with the same clients and blobs: first one, then the
other, and in the opposite order each second time. docker-registry has its in-memory cache of
descriptors. The gateway is one session: it asks for the session's token, counts quotas, asks the
reachable set, and writes each request into its ledger. Both hash what arrives. docker-registry
syncs it to disk; what is staged here is for one build only, and is not synced.

Several clients share the bytes of one: a single blob is cut in as many. The ratio is the median of
the ratios within each run, gateway to docker-registry: more is better. CPU is the server's own;
its memory is the peak of what is resident. Latencies are of single requests, a whole body in or out
included; a push is three requests. The clients' CPU is in parts of one core. Files are in memory
(`--directory` takes another place): on the disk of a small machine both sides wait for it alone.
"""
COLUMNS = (
    "load", "clients", "way", "side", "MiB/s", "blobs/s", "ratio", "p50 ms", "p99 ms",
    "CPU s/GiB", "peak MiB", "clients' CPU",
)  # fmt: skip

Row = dict[str, list[Measured]]


def render(facts: Mapping[str, str], rows: Mapping[tuple[Load, int, str], Row], last: str) -> str:
    lines = [HEAD, *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for (load, clients, way), row in rows.items():
        theirs = row["docker-registry"]
        for name, found in row.items():
            ratios = [one.rate / other.rate for one, other in zip(found, theirs, strict=True)]
            ratio = f"{statistics.median(ratios):.2f}"
            cells = [str(load), str(clients), way, name, *_rates(found), ratio]
            cells += [*_latencies(found), *_costs(found)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", last, ""])


def _rates(found: Sequence[Measured]) -> tuple[str, str]:
    rate = statistics.median(one.rate for one in found) / MIB
    blobs = statistics.median(one.blobs / one.work.seconds for one in found)
    return f"{rate:.0f}", f"{blobs:.1f}"


def _latencies(found: Sequence[Measured]) -> tuple[str, str]:
    every = sorted(seconds for one in found for seconds in one.work.latencies)
    p50, p99 = statistics.median(every), every[min(len(every) - 1, len(every) * 99 // 100)]
    return f"{p50 * 1e3:.2f}", f"{p99 * 1e3:.2f}"


def _costs(found: Sequence[Measured]) -> tuple[str, str, str]:
    cpu = statistics.median(one.cpu_seconds * GIB / one.bytes for one in found)
    share = statistics.median(one.work.client_cpu_seconds / one.work.seconds for one in found)
    peak = max(one.peak_bytes for one in found) / MIB
    return f"{cpu:.2f}", f"{peak:.0f}", f"{share:.0%}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each row [%(default)s]")
    parser.add_argument("--scale", type=float, default=1.0, help="of the loads [%(default)s]")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write [%(default)s]")
    parser.add_argument("--directory", type=Path, default=MEMORY, help="for blobs [%(default)s]")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.serve:
        return serve(Path(parsed.serve[0]), *map(int, parsed.serve[1:]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends us, all is removed
    facts = {**machine.facts(), "nice value of both sides and clients": str(os.nice(0))}
    with tempfile.TemporaryDirectory(prefix="runner-bench-", dir=parsed.directory) as place:
        directory = Path(place)
        data = directory / "data"
        _write_data(data, max(GIB, 1000 * MIB))
        loads = [load.scaled(parsed.scale) for load in LOADS]
        rows = measure_all(data, directory, loads, parsed.runs)
        idle, busy = many_sessions(data, directory)
        carried = tunnels(directory, loads[0].size, parsed.runs)
    last = (
        f"{tunnel.render(carried)}\n\n## Many sessions\n\n"
        f"One gateway with {SESSIONS} sessions has {idle / MIB:.0f} MiB when they are open, and\n"
        f"{busy / MIB:.0f} MiB at most while all of them push, and then pull, 16 MiB at once."
    )
    page = render({**facts, "load average at the end": machine.load()}, rows, last)
    parsed.page.write_text(page, encoding="utf-8")
    print(page)
    return 0


def _write_data(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(0, size, MIB):
            file.write(os.urandom(MIB))


def measure_all(
    data: Path, directory: Path, loads: Sequence[Load], runs: int
) -> dict[tuple[Load, int, str], Row]:
    """Every row, run by run."""
    rows: dict[tuple[Load, int, str], Row] = {}
    for load, clients in itertools.product(loads, (1, 8)):
        shares = load.shares(data, clients)
        pushes, pulls = (
            rows.setdefault((load, clients, way), {name: [] for name in SIDES})
            for way in ("push", "pull")
        )
        for number in range(runs):
            for name in list(SIDES)[:: -1 if number % 2 else 1]:
                pushed, pulled = side(name, shares, directory)
                pushes[name].append(pushed)
                pulls[name].append(pulled)
                rates = f"{pushed.rate / MIB:.0f} and {pulled.rate / MIB:.0f} MiB/s"
                print(f"{load}, {clients} clients, {name}: {rates}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())

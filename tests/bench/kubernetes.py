"""``python -m tests.bench.kubernetes``: the kubernetes backend beside a bare Job. Writes its page.

In the cluster that KUBECONFIG names, with what tests/cluster/conftest.py says of it. Bare Jobs run
in a namespace of their own, RUNNER_CLUSTER_BARE, which may have what our pods may not.
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from builder.buildah import BUILDER_CAPABILITIES, ENVIRONMENT, WRITABLE, Buildah
from policies.reference import ImageReference
from runner.settings import KubernetesSettings, RegistrySettings, Settings
from runner.stores import installs, podimage
from runner.stores.rootfs import RootfsStore
from sandbox.kubernetes.cluster import Cluster
from sandbox.kubernetes.objects import Job
from tests.bench import machine, ours
from tests.bench.bases import workplace
from tests.bench.page import middle, ratio, table
from tests.support.hosts import REPOSITORY, Person, read_until, write_context

PAGE = REPOSITORY / "docs" / "benchmarks-kubernetes.md"
HEAD = """\
# The kubernetes backend

Made by `python -m tests.bench.kubernetes --runs N` in a cluster of one node. *bare Job* is the same
builder image under the same RuntimeClass with the same limits: one container builds, the next one
pushes to a registry, with the capabilities that buildah wants, an open network, and nothing around
it: no gateway, no judgement, nothing verified and nothing published. Its time is from the request
that makes the Job to its completion. *kubernetes* is the whole of `runner submit`, from the start
of its Python to its end. *launch and build* are the two stages of it that have something beside
them in the bare Job. Each run does everything once, every second run in the opposite order, and a
first one does not count. Ratios are medians of those within each run; overheads are medians of
differences.
"""
BARE, OURS, STAGES = "bare Job", "kubernetes", "kubernetes, launch and build"
MEMORY, CPU = 1 << 30, 500
POLICY = f"""\
apiVersion: runner/v1alpha1
name: bench
default:
  isolation: gvisor
  backends: [kubernetes]
  builders: [buildah]
  capabilities: ["*"]
  network: registries
  base_images: ["**"]
  destinations: ["**"]
  limits:
    cpu_millis: {CPU}
    memory_bytes: {MEMORY}
"""
DOCKERFILE = 'FROM {base}\nCOPY greeting /greeting\nRUN ["/bin/sh", "-c", "true"]\n'


class Bench:
    """The rounds, and what they found: seconds by side, in the order of the runs."""

    def __init__(self, directory: Path, base: str, builders: Path) -> None:
        self.seconds: dict[str, list[float]] = {}
        host = os.environ["RUNNER_CLUSTER_REGISTRY"]
        kubernetes = KubernetesSettings(
            gateway=os.environ["RUNNER_CLUSTER_GATEWAY"],
            repository=f"{host}/bench",
            kubeconfig=os.environ["KUBECONFIG"],
            namespace=os.environ.get("RUNNER_CLUSTER_NAMESPACE", "runner-builds"),
            gvisor=os.environ.get("RUNNER_CLUSTER_CLASS", "gvisor"),
        )
        plain = RegistrySettings(plain_http=True, private_address=True)
        settings = Settings(registries={host: plain}, kubernetes=kubernetes)
        store = RootfsStore(builders)
        if store.installed("buildah") is None:
            installs.from_packages(store, Buildah(), mirror=None, report=lambda _: None)
        self.person = replace(
            Person.move_in(directory / "me", settings, builders), backend="kubernetes"
        )
        installed = store.installed("buildah")
        assert installed is not None
        to = ImageReference.parse(f"{host}/bench/buildah:bench")
        self.image = podimage.push(Buildah.recipe, installed, to, settings)
        self.base, self.host = base, host
        self.policy = directory / "policy.yaml"
        self.policy.write_text(POLICY)
        self.context = write_context(
            directory / "context", DOCKERFILE.format(base=base), greeting="hello\n"
        )
        self._cluster = Cluster.connect(Path(os.environ["KUBECONFIG"]), None)
        self._namespace = os.environ.get("RUNNER_CLUSTER_BARE", "runner-bare")
        self._number = 0

    @contextmanager
    def port(self) -> Iterator[None]:
        """The gateway's port while the block runs."""
        gateway = self.person.settings.kubernetes.gateway
        assert gateway is not None
        with self.person.start("gateway", "serve", "--listen", gateway) as process:
            try:
                read_until(process, process.stderr, "listening")
                yield
            finally:
                process.terminate()

    def round(self, number: int) -> None:
        """Does everything once, in the opposite order each second time."""
        for side in (self._bare, self._ours)[:: -1 if number % 2 else 1]:
            for name, seconds in side().items():
                self.seconds.setdefault(name, []).append(seconds)
                print(f"{name}: {seconds:.2f} s", file=sys.stderr, flush=True)

    def _destination(self) -> str:
        self._number += 1
        return f"{self.host}/bench/out-{self._number}:1"

    def _ours(self) -> dict[str, float]:
        timeline = ours.submit(
            self.person.having(PYTHONDONTWRITEBYTECODE=""),
            self.context,
            destination=self._destination(),
            build_args={},
            policies=(self.policy,),
        )
        stages = timeline.stage("launch") + timeline.stage("build")
        return {OURS: timeline.seconds, STAGES: stages}

    def _bare(self) -> dict[str, float]:
        to = self._destination()
        name = f"bare-{self._number}"
        jobs = f"/apis/batch/v1/namespaces/{self._namespace}/jobs"
        started = time.monotonic()
        self._cluster.create(jobs, self._bare_job(name, to))
        while True:
            found = self._cluster.get(Job, f"{jobs}/{name}")
            ends = {each.type for each in found.status.conditions} if found is not None else set()
            if "Complete" in ends:
                break
            assert "Failed" not in ends, f"kubectl logs --namespace={self._namespace} job/{name}"
            time.sleep(0.05)
        seconds = time.monotonic() - started
        self._cluster.delete(f"{jobs}/{name}", propagationPolicy="Background")
        return {BARE: seconds}

    def lay_out(self) -> None:
        """What bare Jobs read: the context, and the configuration of buildah."""
        files = {
            "Dockerfile": DOCKERFILE.format(base=self.base),
            "greeting": "hello\n",
            "storage.conf": "[storage]\ndriver = 'overlay'\n"
            "graphroot = '/var/lib/containers/storage'\nrunroot = '/run/containers/storage'\n",
            "containers.conf": "[containers]\nnetns = 'host'\n"
            "default_ulimits = ['nofile=1024:4096', 'nproc=1024:1024']\n"
            "[engine]\nruntime = 'runc'\n",
            "policy.json": '{"default":[{"type":"insecureAcceptAnything"}]}',
        }
        name = {"name": "bare"}
        document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": name, "data": files}
        self._cluster.create(f"/api/v1/namespaces/{self._namespace}/configmaps", document)

    def _bare_job(self, name: str, to: str) -> dict[str, Any]:
        build = [
            "buildah", "build", "--isolation=oci", "--network=host", "--tls-verify=false",
            "--signature-policy=/bare/policy.json", "--short-name-alias-conf=/run/names.conf",
            "--file=/bare/Dockerfile", f"--tag={to}", "/bare",
        ]  # fmt: skip
        push = ["buildah", "push", "--tls-verify=false", to]
        writable = {f"writable-{number}": path for number, path in enumerate(sorted(WRITABLE))}
        memory = [{"name": key, "emptyDir": {"medium": "Memory"}} for key in writable]
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name},
            "spec": {
                "backoffLimit": 0,
                "template": {
                    "spec": {
                        "restartPolicy": "Never",
                        "runtimeClassName": self.person.settings.kubernetes.gvisor,
                        "automountServiceAccountToken": False,
                        "initContainers": [self._container("build", build, writable)],
                        "containers": [self._container("push", push, writable)],
                        "volumes": [*memory, {"name": "bare", "configMap": {"name": "bare"}}],
                    }
                },
            },
        }

    def _container(
        self, name: str, command: list[str], writable: Mapping[str, str]
    ) -> dict[str, Any]:
        bounds = {"cpu": f"{CPU}m", "memory": str(MEMORY)}
        environment = {
            "PATH": ENVIRONMENT["PATH"],
            "HOME": "/root",
            "CONTAINERS_CONF": "/bare/containers.conf",
            "CONTAINERS_STORAGE_CONF": "/bare/storage.conf",
        }
        return {
            "name": name,
            "image": str(self.image),
            "command": command,
            "env": [{"name": key, "value": value} for key, value in environment.items()],
            "resources": {"requests": bounds, "limits": bounds},
            "securityContext": {"capabilities": {"add": list(BUILDER_CAPABILITIES)}},
            "volumeMounts": [
                *({"name": key, "mountPath": path} for key, path in writable.items()),
                {"name": "bare", "mountPath": "/bare"},
            ],
        }


def many(bench: Bench, count: int) -> str:
    """So many builds at once by one process: a line about what they took."""
    failures: list[str] = []
    before = threading.active_count()
    started = time.monotonic()
    most, peak = 0, 0

    def build(number: int) -> None:
        try:
            bench.person.submit(
                bench.context,
                destination=f"{bench.host}/bench/many-{number}:1",
                policies=(bench.policy,),
            )
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(f"{number}: {error!r}"[:300])

    threads = [threading.Thread(target=build, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, threading.active_count() - before - count)
        peak = max(peak, resident_bytes())
        time.sleep(0.2)
    seconds = time.monotonic() - started
    time.sleep(3)
    return (
        f"{count} builds at once by one process: {count - len(failures)} ended well in "
        f"{seconds:.0f} s; at most {most / count:.1f} threads for each besides its own, "
        f"{threading.active_count() - before} left over; {peak >> 20} MiB resident at most. "
        f"{' '.join(failures[:5])}"
    )


def resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kubernetes", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--many", type=int, default=0, help="builds at once, besides [%(default)s]")
    parser.add_argument("--base", required=True, help="a base image with /bin/sh, in the registry")
    parser.add_argument("--builders", type=Path, help="a store with buildah [installed anew]")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write [%(default)s]")
    parsed = parser.parse_args()
    facts = machine.facts()
    with workplace() as directory:
        bench = Bench(directory, parsed.base, parsed.builders or directory / "builders")
        bench.lay_out()
        with bench.port():
            bench.round(0)
            bench.seconds.clear()
            for number in range(parsed.runs):
                bench.round(number)
            last = many(bench, parsed.many) if parsed.many else ""
    bare = bench.seconds[BARE]
    rows = [
        [name, *middle(found), ratio(found, bare), f"{_over(found, bare):+.2f}"]
        for name, found in bench.seconds.items()
    ]
    lines = [HEAD, *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [table(("side", "median s", "p90 s", "ratio", "overhead s"), rows), "", last, ""]
    parsed.page.write_text("\n".join(lines))
    return 0


def _over(found: list[float], bare: list[float]) -> float:
    differences = sorted(one - other for one, other in zip(found, bare, strict=True))
    return differences[len(differences) // 2]


if __name__ == "__main__":
    sys.exit(main())

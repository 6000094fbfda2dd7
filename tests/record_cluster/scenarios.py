"""What happens to sandboxes in a cluster, one function each."""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builder.model import BuildPlan
from policies.errors import RunnerError
from policies.model import MIB, Isolation, Limits
from sandbox.kubernetes.backend import Classes, KubernetesBackend, Reach
from sandbox.kubernetes.manifests import Pool
from sandbox.model import Sandbox, SandboxSpec
from tests.record_cluster.forward import Forward
from tests.support.cluster import RELEASED, SAID


def awk(program: str) -> tuple[str, ...]:
    """A command of what every builder's image has: there is no shell in it."""
    rest = "function rest(seconds) { end = systime() + seconds; while (systime() < end); }"
    return ("mawk", f"{rest} BEGIN {{ {program} }}")


PLAN = BuildPlan(
    commands=(awk('getline it < "/run/runner/config/greeting"; print it; rest(2); print "done"'),),
    build_command=0,
    environment={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    files={"greeting": b"hello\n"},
    writable=("/tmp",),
    uid=0,
    capabilities=("CHOWN",),
    claim="",
)
LIMITS = Limits(
    memory_bytes=256 * MIB,
    cpu_millis=300,
    disk_bytes=64 * MIB,
    log_bytes=MIB,
    wall_seconds=120,
)
LONG = 'print "hello"; fflush(); rest(100)'


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the backend made of it.

    Attributes:
        said: Its outcome or error, for people.
        log: Output of the build.
    """

    said: str
    log: str


@dataclass
class Stage:
    """One scenario's.

    Attributes:
        name: What the cluster calls the sandbox.
        kubectl: Of whoever records, with the arguments that it always has.
        by_hand: What somebody does while the build runs.
    """

    name: str
    forward: Forward
    reach: Reach
    sandboxes: Path
    image: str
    kubectl: Sequence[str]
    pool: Pool
    classes: Classes = field(default_factory=Classes)
    plan: BuildPlan = PLAN
    limits: Limits = LIMITS
    by_hand: Callable[[], object] = lambda: None
    clearing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def does(self, *words: str, given: object = None) -> str:
        """What kubectl answers."""
        done = subprocess.run(
            [*self.kubectl, *words],
            input=None if given is None else json.dumps(given),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def has(self, *objects: dict[str, Any]) -> None:
        """Makes objects for the time of the scenario."""
        for each in objects:
            self.does("apply", "-f", "-", given=each)
            self.clearing.callback(
                self.does, "delete", "--ignore-not-found", "--wait=false", "-f", "-", given=each
            )

    def ours(self) -> tuple[str, ...]:
        return ("-n", self.pool.namespace)

    def pod(self) -> str:
        """Its name."""
        found = self.does(*self.ours(), "get", "pod", "-o", "name", "-l", f"job-name={self.name}")
        return found.strip().removeprefix("pod/")

    def runs(self, program: str) -> None:
        self.plan = replace(self.plan, commands=(awk(program),))

    def spec(self) -> SandboxSpec:
        return SandboxSpec(
            isolation=Isolation.GVISOR,
            limits=self.limits,
            plan=self.plan,
            root=Path("/nowhere"),
            root_digest=f"sha256:{'0' * 64}",
            image=self.image,
            gateway=False,
        )

    def play(self) -> Recorded:
        """All of it, from its place to its release."""
        backend = KubernetesBackend(
            self.sandboxes,
            reach=self.reach,
            classes=self.classes,
            pool=self.pool,
            probe_image=str,
        )
        offered = sorted(map(str, backend.offer().isolations))
        said, log = f"offers {offered}", bytearray()
        place = backend.reserve(self.name.removeprefix("ur-"))
        try:
            sandbox = backend.launch(place, self.spec(), log.extend)
            self.forward.note(mark=RELEASED)
            with self._watched(sandbox):
                self.by_hand()
                outcome = sandbox.wait()
            said = f"{outcome.ending}, status {outcome.status}"
        except RunnerError as error:
            said = f"{error.code}: {error.message}"
        finally:
            place.release()
        return Recorded(said, log.decode())

    @contextmanager
    def _watched(self, sandbox: Sandbox) -> Iterator[None]:
        """Marks when the sandbox has said its last word."""

        def mark() -> None:
            sandbox._reader.join()  # type: ignore[attr-defined]  # a SupervisedSandbox
            self.forward.note(mark=SAID)

        thread = threading.Thread(target=mark)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def succeeds(stage: Stage) -> None:
    del stage


def fails(stage: Stage) -> None:
    stage.runs('print "no"; exit 7')


def out_of_memory(stage: Stage) -> None:
    stage.runs('print "hello"; fflush(); rest(2); s = "0123456789abcdef"; while (1) s = s s')


def volume_over_its_limit(stage: Stage) -> None:
    stage.runs(
        's = "0123456789abcdef"; while (length(s) < 2 ^ 20) s = s s; '
        'while (n++ < 96) printf "%s", s > "/tmp/much"; print "hello"; fflush(); rest(100)'
    )


def too_much_cpu(stage: Stage) -> None:
    stage.limits = replace(stage.limits, cpu_millis=15_000)
    stage.pool = replace(stage.pool, pending_seconds=10)


def no_such_node(stage: Stage) -> None:
    selector = {"example.com/builds": "only"}
    stage.pool = replace(stage.pool, pending_seconds=10, node_selector=selector)


def no_handler(stage: Stage) -> None:
    own_namespace(stage)
    stage.has(runtime_class(f"{stage.name}-class", "nobody-has-this"))
    stage.classes = Classes(gvisor=f"{stage.name}-class")


def class_goes_away(stage: Stage) -> None:
    own_namespace(stage)
    name = f"{stage.name}-class"
    stage.has(runtime_class(name, "runsc"))
    stage.classes = Classes(gvisor=name)

    def first(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/jobs"):
            stage.does("delete", "runtimeclass", name)
            time.sleep(1)  # admission looks into a cache

    stage.forward.first = first


def quota(stage: Stage) -> None:
    hard = {"requests.cpu": "100m"}
    own_namespace(stage)
    stage.has(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "builds", "namespace": stage.pool.namespace},
            "spec": {"hard": hard},
        }
    )
    time.sleep(2)


def no_image(stage: Stage) -> None:
    stage.image = f"{stage.image.partition('@')[0]}@sha256:{'0' * 64}"


def pod_security(stage: Stage) -> None:
    own_namespace(stage, {"pod-security.kubernetes.io/enforce": "restricted"})


def policy(stage: Stage) -> None:
    own_namespace(stage)
    api = "admissionregistration.k8s.io/v1"
    metadata = {"name": f"{stage.name}-policy"}
    pods = {
        "apiGroups": [""],
        "apiVersions": ["v1"],
        "operations": ["CREATE"],
        "resources": ["pods"],
    }
    here = {"matchLabels": {"kubernetes.io/metadata.name": stage.pool.namespace}}
    stage.has(
        {
            "apiVersion": api,
            "kind": "ValidatingAdmissionPolicy",
            "metadata": metadata,
            "spec": {
                "matchConstraints": {"resourceRules": [pods]},
                "validations": [{"expression": "false", "message": "no pods today"}],
            },
        },
        {
            "apiVersion": api,
            "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": metadata,
            "spec": {
                "policyName": metadata["name"],
                "validationActions": ["Deny"],
                "matchResources": {"namespaceSelector": here},
            },
        },
    )
    time.sleep(3)  # until it is in force


def deadline(stage: Stage) -> None:
    stage.runs(LONG)
    patch = json.dumps({"spec": {"activeDeadlineSeconds": 1}})
    stage.by_hand = lambda: stage.does(*stage.ours(), "patch", "job", stage.name, "-p", patch)


def pod_deleted(stage: Stage) -> None:
    stage.runs(LONG)
    stage.by_hand = lambda: stage.does(*stage.ours(), "delete", "pod", stage.pod())


def pod_deleted_by_force(stage: Stage) -> None:
    stage.runs(LONG)
    stage.by_hand = lambda: stage.does(
        *stage.ours(), "delete", "pod", "--force", "--grace-period=0", stage.pod()
    )


def job_deleted(stage: Stage) -> None:
    stage.runs(LONG)
    stage.by_hand = lambda: stage.does(*stage.ours(), "delete", "job", stage.name)


def drained(stage: Stage) -> None:
    """As ``kubectl drain`` does it, pod by pod."""
    stage.runs(LONG)

    def evict() -> None:
        name = stage.pod()
        path = f"/api/v1/namespaces/{stage.pool.namespace}/pods/{name}/eviction"
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": stage.pool.namespace},
        }
        stage.does("create", "--raw", path, "-f", "-", given=eviction)

    stage.by_hand = evict


def preempted(stage: Stage) -> None:
    """By a pod that only ours has to make room for: nobody else has so little priority."""
    stage.runs(LONG)
    low, high = f"{stage.name}-low", f"{stage.name}-high"
    stage.has(priority_class(low, -1000), priority_class(high, -900))
    stage.pool = replace(stage.pool, priority_class=low)
    stage.limits = replace(stage.limits, cpu_millis=1100)

    elsewhere = another_namespace(stage, {})

    def crowd() -> None:
        stage.has(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": high, "namespace": elsewhere},
                "spec": {
                    "priorityClassName": high,
                    "terminationGracePeriodSeconds": 1,
                    "containers": [
                        {
                            "name": "crowd",
                            "image": stage.image,
                            "command": list(awk("rest(1)")),
                            "resources": {"requests": {"cpu": "1100m"}},
                        }
                    ],
                },
            }
        )

    stage.by_hand = crowd


def runtime_class(name: str, handler: str) -> dict[str, Any]:
    return {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": name},
        "handler": handler,
    }


def priority_class(name: str, value: int) -> dict[str, Any]:
    return {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": name},
        "value": value,
    }


def own_namespace(stage: Stage, labels: dict[str, str] | None = None) -> None:
    """For those that do not get as far as a node: only the configured one is closed in."""
    stage.pool = replace(stage.pool, namespace=another_namespace(stage, labels or {}))


def another_namespace(stage: Stage, labels: dict[str, str]) -> str:
    name = f"{stage.name}-space"
    metadata = {"name": name, "labels": labels}
    stage.has({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    end = time.monotonic() + 30
    while "default" not in stage.does("-n", name, "get", "serviceaccounts", "-o", "name"):
        assert time.monotonic() < end, "no controller manager"
        time.sleep(0.2)
    return name


ALL: dict[str, Callable[[Stage], None]] = {
    each.__name__.replace("_", "-"): each
    for each in (
        succeeds,
        fails,
        out_of_memory,
        volume_over_its_limit,
        too_much_cpu,
        no_such_node,
        no_handler,
        class_goes_away,
        quota,
        no_image,
        pod_security,
        policy,
        deadline,
        pod_deleted,
        pod_deleted_by_force,
        job_deleted,
        drained,
        preempted,
    )
}

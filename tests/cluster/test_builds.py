"""Builds in a real cluster, and every way that the cluster ends one."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.model import Isolation
from runner.cancel import Cancellation
from runner.errors import (
    AdmissionRefused,
    BuildFailed,
    Cancelled,
    ClusterQuotaExceeded,
    DiskExceeded,
    ImagePullFailed,
    IsolationMismatch,
    MemoryExceeded,
    PodDeleted,
    RunnerError,
    RuntimeUnknown,
    TimeExceeded,
    Unschedulable,
)
from runner.events import Event, Observed, Output
from sandbox.model import ClusterView
from tests.cluster.conftest import Port, RealCluster, selector
from tests.support.hosts import Built, Person, write_context

pytestmark = [
    pytest.mark.cluster, pytest.mark.sandbox, pytest.mark.registry, pytest.mark.usefixtures("port"),
]  # fmt: skip


def configured(person: Person, **changed: object) -> Person:
    """The same person with other settings of the cluster."""
    kubernetes = person.settings.kubernetes.model_copy(update=changed)
    settings = person.settings.model_copy(update={"kubernetes": kubernetes})
    return replace(person, settings=settings)


def assert_nothing_left(cluster: RealCluster, person: Person, seconds: float = 15.0) -> None:
    person.assert_nothing_left()
    end = time.monotonic() + seconds
    while left := cluster.names(person):
        assert time.monotonic() < end, left
        time.sleep(0.2)
    assert not list(person.home.doors.iterdir())


_SMALL = """\
apiVersion: runner/v1alpha1
name: small
default:
  isolation: gvisor
  backends: [kubernetes]
  builders: [buildah]
  capabilities: ["*"]
  network: registries
  base_images: ["**"]
  destinations: ["**"]
  limits:
"""


def submit(person: Person, place: Path, context: Path, limits: Mapping[str, int] | None = None,
           **options: Any) -> Built:  # fmt: skip
    """A build that small nodes have room for."""
    wanted = {"cpu_millis": 500, "memory_bytes": 1 << 30, **(limits or {})}
    path = place / "small.yaml"
    path.write_text(_SMALL + "".join(f"    {name}: {each}\n" for name, each in wanted.items()))
    return person.submit(context, policies=(path,), **options)


def test_a_build_is_published_and_nothing_of_it_is_left(
    somebody: Person, cluster: RealCluster, place: Path, tools_base: str
) -> None:
    context = write_context(
        place / "context",
        f"FROM {tools_base}\nCOPY hello /hello\nRUN cat /hello && chown 7:8 /hello\n",
        hello="from the context",
    )
    host = tools_base.partition("/")[0]
    built = submit(somebody, place, context, destination=f"{host}/cluster/hello:1")
    assert "from the context" in built.log
    evidence = built.result.evidence
    assert evidence.isolation is Isolation.GVISOR
    assert "gvisor" in evidence.kernel_release.lower() or evidence.kernel_release == "4.4.0"
    assert isinstance(evidence.outside, ClusterView)
    assert evidence.outside.runtime_class == somebody.settings.kubernetes.gvisor
    assert evidence.outside.image.count("@sha256:") == 1
    assert built.result.published
    assert built.result.usage.memory_peak_bytes is None
    assert_nothing_left(cluster, somebody)


ENDINGS: list[tuple[str, dict[str, int], type[RunnerError]]] = [
    ("RUN exit 3", {}, BuildFailed),
    ("RUN sleep 120", {"wall_seconds": 8}, TimeExceeded),
    (
        "RUN perl -e '$x = \"a\" x (1 << 20); push @a, $x . $_ for 1 .. 4000; sleep 20'",
        {"memory_bytes": 400 << 20},
        MemoryExceeded,
    ),
    (
        "RUN dd if=/dev/zero of=/large bs=1M count=4000; sleep 60",
        {"disk_bytes": 300 << 20},
        DiskExceeded,
    ),
]


@pytest.mark.parametrize(("step", "bounds", "error"), ENDINGS, ids=lambda it: str(it)[:20])
def test_a_limit_ends_a_build_by_its_own_name(
    step: str, bounds: dict[str, int], error: type[RunnerError], somebody: Person,
    cluster: RealCluster, place: Path, tools_base: str,
) -> None:  # fmt: skip
    context = write_context(place / "context", f"FROM {tools_base}\n{step}\n")
    with pytest.raises(error):
        submit(somebody, place, context, bounds)
    assert_nothing_left(cluster, somebody, 30)


def test_the_schedulers_words_are_shown(
    somebody: Person, cluster: RealCluster, place: Path, tools_base: str
) -> None:
    nowhere = configured(somebody, node_selector={"runner.test": "no"}, pending_seconds=10)
    context = write_context(place / "context", f"FROM {tools_base}\n")
    with pytest.raises(Unschedulable, match=r"affinity|selector"):
        submit(nowhere, place, context)
    assert_nothing_left(cluster, somebody)


def test_a_class_that_is_not_there_ends_it_before_anything(
    somebody: Person, cluster: RealCluster, place: Path, tools_base: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\n")
    with pytest.raises(RuntimeUnknown, match="runner-test-nothing"):
        submit(configured(somebody, gvisor="runner-test-nothing"), place, context)
    assert_nothing_left(cluster, somebody)


def runtime_class(cluster: RealCluster, name: str, handler: str) -> None:
    document = {
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass",
        "metadata": {"name": name}, "handler": handler,
    }  # fmt: skip
    cluster.kubectl("apply", "--filename=-", document=document)


def test_a_handler_that_no_node_has_is_named(
    somebody: Person, cluster: RealCluster, place: Path, tools_base: str
) -> None:
    runtime_class(cluster, "runner-test-nowhere", "runner-test-nowhere")
    context = write_context(place / "context", f"FROM {tools_base}\n")
    try:
        # Where the chart's policy guards the namespace, the cluster itself refuses it.
        with pytest.raises(
            (RuntimeUnknown, AdmissionRefused), match=r"runner-test-nowhere|RuntimeClass"
        ):
            submit(configured(somebody, gvisor="runner-test-nowhere"), place, context)
    finally:
        cluster.kubectl("delete", "runtimeclass", "runner-test-nowhere")
    assert_nothing_left(cluster, somebody)


def test_a_class_that_is_no_sandbox_gets_nothing(
    somebody: Person, cluster: RealCluster, place: Path, tools_base: str
) -> None:
    runtime_class(cluster, "runner-test-plain", "runc")
    context = write_context(place / "context", f"FROM {tools_base}\nRUN echo it ran\n")
    seen: list[Event] = []
    try:
        with pytest.raises((IsolationMismatch, RuntimeUnknown, AdmissionRefused)) as caught:
            submit(
                configured(somebody, gvisor="runner-test-plain"), place, context, listen=seen.append
            )
        if isinstance(caught.value, RuntimeUnknown):
            pytest.skip("no node has a handler runc: name it in containerd's configuration")
    finally:
        cluster.kubectl("delete", "runtimeclass", "runner-test-plain")
    assert not any(isinstance(each, Observed) for each in seen)
    if isinstance(caught.value, AdmissionRefused):
        assert_nothing_left(cluster, somebody)
        pytest.skip(
            "the cluster's own policy refused it, so the canary was not asked: delete the "
            "ValidatingAdmissionPolicyBinding of the builds' namespace to see that too"
        )
    assert_nothing_left(cluster, somebody)


def test_an_image_that_cannot_be_pulled_is_named(
    somebody: Person, cluster: RealCluster, place: Path, tools_base: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    image = f"{somebody.settings.kubernetes.repository}/nothing@sha256:{'1' * 64}"
    monkeypatch.setattr("runner.stores.podimage.pushed", lambda _: image)
    context = write_context(place / "context", f"FROM {tools_base}\n")
    with pytest.raises(ImagePullFailed, match="nothing"):
        submit(somebody, place, context)
    assert_nothing_left(cluster, somebody)


def test_a_quota_that_is_used_up_is_named(
    somebody: Person, cluster: RealCluster, place: Path, tools_base: str
) -> None:
    quota = {
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "runner-test"},
        "spec": {"hard": {"pods": "0"}},
    }  # fmt: skip
    cluster.kubectl("apply", "--filename=-", document=quota)
    context = write_context(place / "context", f"FROM {tools_base}\n")
    try:
        while "pods" not in json.loads(
            cluster.kubectl("get", "resourcequota", "runner-test", "--output=json")
        ).get("status", {}).get("hard", {}):
            time.sleep(0.2)
        with pytest.raises(ClusterQuotaExceeded, match="runner-test"):
            submit(somebody, place, context)
    finally:
        cluster.kubectl("delete", "resourcequota", "runner-test")
    assert_nothing_left(cluster, somebody)


def test_a_level_that_the_builder_cannot_live_with_is_named(
    somebody: Person, cluster: RealCluster, place: Path, tools_base: str
) -> None:
    level = "pod-security.kubernetes.io/enforce"
    before = json.loads(cluster.kubectl("get", "namespace", cluster.namespace, "--output=json"))
    label = before["metadata"]["labels"].get(level)
    cluster.kubectl("label", "--overwrite", "namespace", cluster.namespace, f"{level}=restricted")
    context = write_context(place / "context", f"FROM {tools_base}\n")
    try:
        with pytest.raises(AdmissionRefused, match="PodSecurity"):
            submit(somebody, place, context)
    finally:
        again = f"{level}={label}" if label else f"{level}-"
        cluster.kubectl("label", "--overwrite", "namespace", cluster.namespace, again)
    assert_nothing_left(cluster, somebody)


def when_observed(do: Callable[[], object]) -> Callable[[Event], None]:
    """Calls ``do`` a second after the sandbox was accepted."""

    def listen(event: Event) -> None:
        if isinstance(event, Observed):
            threading.Timer(1, do).start()

    return listen


@pytest.mark.parametrize("kind", ["pod", "job"])
def test_somebody_may_delete_it(
    kind: str, somebody: Person, cluster: RealCluster, place: Path, tools_base: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN sleep 60\n")

    def delete() -> None:
        cluster.kubectl("delete", kind, selector(somebody), "--wait=false")

    with pytest.raises(PodDeleted):
        submit(somebody, place, context, listen=when_observed(delete))
    assert_nothing_left(cluster, somebody)


def test_a_build_is_cancelled_while_it_runs_and_while_it_waits(
    somebody: Person, cluster: RealCluster, place: Path, tools_base: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN sleep 60\n")
    running, waiting = Cancellation(), Cancellation()
    with pytest.raises(Cancelled):
        submit(somebody, place, context, cancellation=running, listen=when_observed(running.cancel))
    assert_nothing_left(cluster, somebody)
    threading.Timer(4, waiting.cancel).start()
    nowhere = configured(somebody, node_selector={"runner.test": "no"})
    with pytest.raises(Cancelled):
        submit(nowhere, place, context, cancellation=waiting)
    assert_nothing_left(cluster, somebody)


def test_the_gateways_port_may_be_started_again_in_the_middle(
    somebody: Person, cluster: RealCluster, place: Path, tools_base: str, port: Port
) -> None:
    steps = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do echo line $i; sleep 1; done"
    context = write_context(place / "context", f"FROM {tools_base}\nRUN {steps}\n")

    def again(event: Event) -> None:
        if isinstance(event, Output) and b"line 3\n" in event.data:
            port.kill()
            port.start()

    built = submit(somebody, place, context, listen=again)
    assert [line for line in built.log.splitlines() if line.startswith("line ")] == [
        f"line {number}" for number in range(1, 13)
    ]
    assert_nothing_left(cluster, somebody)


def test_doctor_tries_a_sandbox(somebody: Person, cluster: RealCluster) -> None:
    ran = somebody.run("doctor", "--backend", "kubernetes", "--json")
    rows = {row["name"]: row for row in json.loads(ran.stdout)}
    assert rows["sandbox"]["verdict"] == "ok", rows["sandbox"]
    assert rows["rights"]["verdict"] == "ok"
    assert_nothing_left(cluster, somebody)


def test_gc_removes_what_a_killed_runner_left(
    somebody: Person, cluster: RealCluster, place: Path, tools_base: str
) -> None:
    context = write_context(place / "context", f"FROM {tools_base}\nRUN sleep 60\n")
    with somebody.start("submit", "--backend", "kubernetes", context) as process:
        end = time.monotonic() + 60
        while not any(name.startswith("pod/") for name in cluster.names(somebody)):
            assert time.monotonic() < end
            time.sleep(0.2)
        process.kill()
    ran = somebody.run("gc")
    assert ran.status == 0, ran.stderr
    assert_nothing_left(cluster, somebody)

"""What a cluster says of a sandbox, and what is made of it.

Whole documents of a real cluster are in ``test_recorded``. Here are those that one node does not
do on demand: the words are those of Kubernetes' sources and documentation.
"""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import errors
from sandbox.errors import (
    AdmissionRefused,
    ClusterForbidden,
    ClusterQuotaExceeded,
    Evicted,
    ImagePullFailed,
    IsolationError,
    NodeLost,
    PodDeleted,
    Preempted,
    RuntimeUnknown,
    SandboxFailed,
    TimeInQueue,
    Unschedulable,
)
from sandbox.kubernetes import fate
from sandbox.kubernetes.fate import Fate
from sandbox.kubernetes.objects import Event, Job, Pod
from sandbox.model import Ending


def pod(phase: str = "Running", *, state: Any = None, deleted: bool = False, **status: Any) -> Pod:
    """A pod on node n, with that state of its container."""
    statuses = [{"name": "builder", "state": state}] if state else []
    metadata = {"name": "p", "deletionTimestamp": "2026-01-01T00:00:00Z" if deleted else None}
    return Pod.model_validate(
        {
            "metadata": metadata,
            "spec": {"nodeName": "n"},
            "status": {"phase": phase, "containerStatuses": statuses, **status},
        }
    )


def ended(code: int, reason: str = "Error", *, deleted: bool = False, **status: Any) -> Pod:
    state = {"terminated": {"exitCode": code, "reason": reason}}
    return pod("Failed" if code else "Succeeded", state=state, deleted=deleted, **status)


def waits(reason: str, message: str = "so it is") -> Pod:
    return pod("Pending", state={"waiting": {"reason": reason, "message": message}})


def runs() -> Pod:
    return pod(state={"running": {"startedAt": "2026-01-01T00:00:00Z"}})


def disrupted(reason: str, status: str = "True") -> dict[str, Any]:
    return {"conditions": [{"type": "DisruptionTarget", "status": status, "reason": reason}]}


def late_job(kind: str = "Failed") -> Job:
    conditions = [{"type": kind, "status": "True", "reason": "DeadlineExceeded"}]
    return Job.model_validate({"status": {"conditions": conditions}})


def event(reason: str, message: str = "", kind: str = "Warning") -> Event:
    return Event(type=kind, reason=reason, message=message)


# -- before it runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ('pods "p" is forbidden: exceeded quota: q, requested: pods=1', ClusterQuotaExceeded),
        ('pods "p" is forbidden: pod rejected: RuntimeClass "x" not found', RuntimeUnknown),
        ('runtimeclasses.node.k8s.io "x" not found', RuntimeUnknown),
        ('jobs.batch is forbidden: User "u" cannot create resource "jobs"', ClusterForbidden),
        ('pods "p" is forbidden: violates PodSecurity "restricted:latest": ...', AdmissionRefused),
        ('admission webhook "w" denied the request: no', AdmissionRefused),
        ("", AdmissionRefused),
    ],
)
def test_a_refusal_is_told_by_its_words(message: str, kind: type[IsolationError]) -> None:
    found = fate.refusal(message)
    assert type(found) is kind
    assert message in found.message


def test_only_whom_the_cluster_forbids_something_is_called_an_identity() -> None:
    """A quota's or an admission's answer begins likewise."""
    assert type(fate.refusal('pods "x" is forbidden: no')) is AdmissionRefused


@pytest.mark.parametrize(
    ("found", "events", "kind"),
    [
        (None, [], None),
        (None, [event("SuccessfulCreate")], None),
        (None, [event("FailedCreate", "exceeded quota")], ClusterQuotaExceeded),
        (waits("ContainerCreating"), [], None),
        (waits("ErrImagePull"), [], None),  # it is tried again
        (waits("ImagePullBackOff"), [], ImagePullFailed),
        (waits("InvalidImageName"), [], ImagePullFailed),
        (waits("ErrImageNeverPull"), [], ImagePullFailed),
        (waits("CreateContainerConfigError"), [], None),  # the Secret comes a moment later
        (waits("CreateContainerError"), [], SandboxFailed),
        (waits("RunContainerError"), [], SandboxFailed),
        (pod("Pending"), [event("FailedMount", "no runtime for")], None),
        (pod("Pending"), [event("FailedCreatePodSandBox", "context deadline exceeded")], None),
        (pod("Pending"), [event("FailedCreatePodSandBox", 'no runtime for "x" is configured')],
         RuntimeUnknown),
        (pod("Pending"), [event("FailedCreatePodSandBox", "runtime handler x not found")],
         RuntimeUnknown),
    ],
)  # fmt: skip
def test_what_will_never_start_is_not_waited_for(
    found: Pod | None, events: Sequence[Event], kind: type[IsolationError] | None
) -> None:
    error = fate.hopeless(found, events)
    assert (None if error is None else type(error)) is kind


def unscheduled(message: str = "", reason: str = "Unschedulable") -> Pod:
    conditions = [{"type": "PodScheduled", "status": "False", "reason": reason, "message": message}]
    return pod("Pending", conditions=conditions)


@pytest.mark.parametrize(
    ("found", "events", "words"),
    [
        (None, [], "a pod"),
        (None, [event("Suspended", "Job suspended", "Normal")], "Job suspended"),
        (unscheduled("0/1 nodes"), [], "a node: 0/1 nodes"),
        (unscheduled(), [], "a node: Unschedulable"),
        (waits("ErrImagePull", "401"), [], "the builder's image: ErrImagePull: 401"),
        (waits("ErrImagePull", ""), [], "the builder's image: ErrImagePull"),
        (waits("ContainerCreating"), [event("FailedMount", "no secret")], "no secret"),
        (pod(), [event("Pulled", "it has it", "Normal")], "the node to start it"),
        (runs(), [], "pod p on node n to come to the gateway's port"),
        (
            runs(),
            [event("FailedMount", "a moment ago")],
            "pod p on node n to come to the gateway's port",
        ),
    ],
)
def test_whoever_waits_hears_for_what(
    found: Pod | None, events: Sequence[Event], words: str
) -> None:
    assert fate.waits_for(found, events) == words


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (None, TimeInQueue),
        (unscheduled("no"), Unschedulable),
        (waits("ContainerCreating"), SandboxFailed),
    ],
)
def test_the_end_of_patience_is_told_by_where_it_ended(
    found: Pod | None, kind: type[IsolationError]
) -> None:
    error = fate.never_began(found, [], 7)
    assert type(error) is kind
    assert "7 s" in error.message


@pytest.mark.parametrize("error", [fate.never_began(runs(), [], 7), fate.ended_unheard(ended(125))])
def test_whoever_runs_and_does_not_come_is_told_with_what_is_in_between(
    error: IsolationError,
) -> None:
    """The container runs: neither the image nor the node is to blame, and doctor says no more."""
    assert type(error) is SandboxFailed
    assert "gateway's port" in error.message
    assert "gateway serve" in error.advice
    assert "NetworkPolicies" in error.advice


# -- when it has ended -----------------------------------------------------------------------------


STORAGE = [
    'Usage of EmptyDir volume "writable-0" exceeds the limit "1Gi".',
    "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi.",
    'Container builder exceeded its local ephemeral storage limit "1Gi".',
]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "job", "deleted", "expected"),
    [
        (ended(0, "Completed"), None, False, Fate(status=0)),
        (ended(7), None, False, Fate(status=7)),
        (ended(7), None, True, Fate(status=7)),
        (ended(137), None, False, Fate(status=137)),
        (ended(137, "OOMKilled"), None, False, Fate(status=137, ending=Ending.MEMORY)),
        (ended(128, "OOMKilled"), None, False, Fate(status=128, ending=Ending.MEMORY)),
        *((pod("Failed", reason="Evicted", message=words), None, False, Fate(ending=Ending.DISK))
          for words in STORAGE),
        (pod("Failed", reason="DeadlineExceeded"), None, False, Fate(ending=Ending.TIME)),
        (ended(143, deleted=True), late_job(), True, Fate(ending=Ending.TIME)),
        (ended(143, deleted=True), late_job("FailureTarget"), True, Fate(ending=Ending.TIME)),
        (pod(), None, False, Fate()),
        (pod(), late_job("Complete"), False, Fate()),
    ],
)  # fmt: skip
def test_an_end_is_told_by_who_made_it(
    found: Pod, job: Job | None, deleted: bool, expected: Fate
) -> None:
    assert fate.of(found, job, deleted=deleted) == expected


@pytest.mark.parametrize(
    ("found", "deleted", "kind"),
    [
        *((pod("Failed", reason="Evicted", message=f"The node was low on resource: {each}. "
               "Container builder was using 1Gi, request is 1Gi, has larger consumption."), False,
           Evicted) for each in ("memory", "ephemeral-storage")),
        (pod(**disrupted("PreemptionByScheduler")), True, Preempted),
        (ended(143, deleted=True, **disrupted("PreemptionByScheduler")), True, Preempted),
        (pod("Failed", **disrupted("DeletionByPodGC")), True, NodeLost),
        (pod(**disrupted("DeletionByTaintManager")), True, NodeLost),
        (pod(**disrupted("EvictionByEvictionAPI")), True, Evicted),
        (pod("Failed", **disrupted("TerminationByKubelet")), False, Evicted),
        (pod(**disrupted("SomethingNew")), False, Evicted),
        *((pod("Failed", reason=reason), False, NodeLost)
          for reason in ("NodeLost", "NodeShutdown", "Shutdown", "Terminated", "NodeAffinity")),
        (ended(137, "ContainerStatusUnknown"), False, NodeLost),
        (ended(143, deleted=True), True, PodDeleted),
        (ended(137, deleted=True), False, PodDeleted),
        (pod(), True, PodDeleted),
        (pod(**disrupted("EvictionByEvictionAPI", "False")), True, PodDeleted),
        (pod("Failed", reason="UnexpectedAdmissionError", message="cpu"), False, SandboxFailed),
        (pod("Failed", reason="OutOfcpu"), False, SandboxFailed),
    ],
)  # fmt: skip
def test_what_took_a_sandbox_away_is_an_error_of_its_own(
    found: Pod, deleted: bool, kind: type[SandboxFailed]
) -> None:
    error = fate.of(found, None, deleted=deleted).error
    assert type(error) is kind
    assert "pod p on node n" in error.message


@pytest.mark.parametrize("reason", ["StartError", "ContainerCannotRun"])
def test_a_first_process_that_the_runtime_did_not_start_has_no_status(reason: str) -> None:
    found = fate.of(ended(128, reason), None, deleted=False)
    assert found.status is None
    assert found.error is not None
    assert reason in found.error.message


def test_a_node_that_there_is_not_is_called_none() -> None:
    found = Pod.model_validate({"metadata": {"name": "p"}})
    error = fate.of(found, None, deleted=True).error
    assert error is not None
    assert error.message == "somebody deleted pod p on node none"


@pytest.mark.parametrize(
    ("phase", "over"),
    [("Pending", False), ("Running", False), ("Unknown", False), ("Succeeded", True),
     ("Failed", True)],
)  # fmt: skip
def test_a_pod_is_over_when_the_kubelet_says_that_nothing_runs(phase: str, over: bool) -> None:
    assert fate.is_over(pod(phase)) is over


REASONS = st.sampled_from(
    ["", "Evicted", "Error", "Completed", "OOMKilled", "DeadlineExceeded", "NodeLost", "x"]
)


@given(
    reason=REASONS,
    why=REASONS,
    code=st.integers(0, 255),
    phase=st.sampled_from(["Running", "Succeeded", "Failed"]),
    deleted=st.booleans(),
)
def test_no_end_is_a_success_that_the_kubelet_did_not_see(
    reason: str, why: str, code: int, phase: str, deleted: bool
) -> None:
    state = {"terminated": {"exitCode": code, "reason": why}}
    found = fate.of(pod(phase, state=state, reason=reason), None, deleted=deleted)
    if found.status == 0 and found.ending is None and found.error is None:
        assert code == 0
        assert reason not in {"Evicted", "DeadlineExceeded", "NodeLost"}


def test_every_error_of_a_cluster_has_advice_of_its_own() -> None:
    for kind in (Preempted, Evicted, NodeLost, PodDeleted, TimeInQueue, Unschedulable):
        assert kind("x").advice != errors.IsolationError.default_advice

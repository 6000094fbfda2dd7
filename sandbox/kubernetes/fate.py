"""What a cluster says of a sandbox, as what became of it. Pure.

A pod that waits may wait for something that never comes; one that ended may have been ended by
many. The API tells by reasons, conditions and events: each is one class of error here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

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
from sandbox.kubernetes.objects import Event, Job, Pod, Reason
from sandbox.model import Ending

_PULL = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_PULL_ENDS = _PULL - {"ErrImagePull"}
"""The kubelet has tried more than once, or need not try again."""
_NEVER_STARTS = {"CreateContainerError", "RunContainerError", "CreateContainerConfigError"}
_NO_HANDLER = re.compile(r"no runtime for|runtime handler .* not (?:found|supported)|"
                         r"no such runtime|unknown runtime", re.IGNORECASE)  # fmt: skip
_NO_CLASS = re.compile(r'RuntimeClass "?[^ ]*"? not found|runtimeclass\S* "[^"]*" not found',
                       re.IGNORECASE)  # fmt: skip
_STORAGE = re.compile(r"exceeds the (?:total )?limit|exceeded its local")
"""A pod that is over a limit of its own; a node that is low on storage says something else."""
_NODE_ENDS = {"NodeLost", "NodeShutdown", "Shutdown", "Terminated", "NodeAffinity"}
_KILLED = {137, 143}
"""Exit codes of who was ended by SIGKILL or SIGTERM."""
_DISRUPTIONS: dict[str, type[SandboxFailed]] = {
    "PreemptionByScheduler": Preempted,
    "DeletionByTaintManager": NodeLost,
    "DeletionByPodGC": NodeLost,
    "EvictionByEvictionAPI": Evicted,
    "TerminationByKubelet": Evicted,
}
"""Of the condition DisruptionTarget (kubernetes.io, "Disruptions", since 1.26)."""


# -- before it runs --------------------------------------------------------------------------------


def refusal(message: str) -> IsolationError:
    """What the API's words mean when it does not make an object."""
    if "exceeded quota" in message:
        return ClusterQuotaExceeded(f"the namespace's quota is used up: {message}")
    if _NO_CLASS.search(message):
        return RuntimeUnknown(f"the cluster has no such RuntimeClass: {message}", advice=_CLASSES)
    if "is forbidden: User" in message:
        return ClusterForbidden(f"this identity may not do that in the cluster: {message}")
    return AdmissionRefused(f"the cluster refuses the sandbox: {message}")


_CLASSES = "deploy/kubernetes has RuntimeClasses; runner doctor --backend kubernetes"


def hopeless(pod: Pod | None, events: Sequence[Event]) -> IsolationError | None:
    """Why there is no use in waiting for the first process; None while there may be."""
    if pod is None:
        refused = [each.message for each in events if each.reason == "FailedCreate"]
        return refusal(refused[-1]) if refused else None
    if (waiting := pod.builder.state.waiting) is not None:
        if waiting.reason in _PULL_ENDS:
            return ImagePullFailed(f"the builder's image cannot be pulled: {_words(waiting)}")
        if waiting.reason in _NEVER_STARTS and not _is_early(waiting):
            return SandboxFailed(f"the sandbox's container does not start: {_words(waiting)}")
    for event in events:
        if event.reason == "FailedCreatePodSandBox" and _NO_HANDLER.search(event.message):
            return RuntimeUnknown(f"the node has no such runtime: {event.message}", advice=_CLASSES)
    return None


def _is_early(waiting: Reason) -> bool:
    """Whether the kubelet looks again: the Secret is made a moment after the Job."""
    return waiting.reason == "CreateContainerConfigError"


def waits_for(pod: Pod | None, events: Sequence[Event]) -> str:
    """What the first process waits for, in words for who waits for it."""
    if pod is None:
        return events[-1].message if events else "a pod"
    scheduled = pod.condition("PodScheduled")
    if scheduled is not None and scheduled.status == "False":
        return f"a node: {scheduled.message or scheduled.reason}"
    if (waiting := pod.builder.state.waiting) is not None and waiting.reason in _PULL:
        return f"the builder's image: {_words(waiting)}"
    if pod.builder.state.running is not None:
        return f"{_where(pod)} to come to the gateway's port"
    told = [each.message for each in events if each.type == "Warning"]
    return told[-1] if told else "the node to start it"


def never_began(pod: Pod | None, events: Sequence[Event], seconds: int) -> IsolationError:
    """After ``seconds`` the first process has not spoken."""
    scheduled = pod.condition("PodScheduled") if pod is not None else None
    reason = f"{seconds} s: {waits_for(pod, events)}"
    if scheduled is not None and scheduled.status == "False":
        return Unschedulable(f"no node took the sandbox in {reason}")
    if pod is None:
        return TimeInQueue(f"the cluster made no pod in {reason}")
    advice = _PORT if pod.builder.state.running is not None else None
    return SandboxFailed(f"the sandbox did not start in {reason}", advice=advice)


def ended_unheard(pod: Pod) -> SandboxFailed:
    """Its first process ended before it spoke, and nothing took it away: it found nobody."""
    return SandboxFailed(
        f"{_where(pod)} ended, and had not come to the gateway's port", advice=_PORT
    )


_PORT = (
    "Does runner gateway serve run, with this state directory? Is gateway in config.toml its "
    "address as pods have it? Do NetworkPolicies let pods of builds come there?"
)


# -- when it has ended -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fate:
    """How a pod ended.

    Attributes:
        status: Of the first process, as the kubelet saw it; None where nobody did.
        ending: A limit that the cluster kept, if that was it.
        error: What took the sandbox away, if something did.
    """

    status: int | None = None
    ending: Ending | None = None
    error: SandboxFailed | None = None


def is_over(pod: Pod) -> bool:
    """Whether nothing of the pod runs any more."""
    return pod.status.phase in {"Succeeded", "Failed"}


def of(pod: Pod, job: Job | None, *, deleted: bool) -> Fate:
    """What became of a pod that is over, or that is there no more.

    Args:
        pod: As it was seen last.
        job: Its Job, if that is still there.
        deleted: Whether the pod is gone.
    """
    # In this order: an eviction also kills the container, and every end at last deletes the pod.
    for tells in (_evicted, _disrupted, partial(_late, job), _ended_by_node, _exited, _refused):
        if (fate := tells(pod)) is not None:
            return fate
    return Fate(error=PodDeleted(f"somebody deleted {_where(pod)}")) if deleted else Fate()


def _evicted(pod: Pod) -> Fate | None:
    if pod.status.reason != "Evicted":
        return None
    if _STORAGE.search(pod.status.message):
        return Fate(ending=Ending.DISK)
    return Fate(error=Evicted(f"the node evicted {_told(pod)}"))


def _disrupted(pod: Pod) -> Fate | None:
    found = pod.condition("DisruptionTarget")
    if found is None or found.status != "True":
        return None
    kind = _DISRUPTIONS.get(found.reason, Evicted)
    return Fate(error=kind(f"{_where(pod)}: {found.message or found.reason}"))


def _late(job: Job | None, pod: Pod) -> Fate | None:
    conditions = job.status.conditions if job is not None else ()
    reasons = {each.reason for each in conditions if each.type in {"Failed", "FailureTarget"}}
    is_late = "DeadlineExceeded" in {pod.status.reason, *reasons}
    return Fate(ending=Ending.TIME) if is_late else None


def _ended_by_node(pod: Pod) -> Fate | None:
    if pod.status.reason not in _NODE_ENDS:
        return None
    return Fate(error=NodeLost(f"the node ended {_told(pod)}"))


def _exited(pod: Pod) -> Fate | None:
    ended = pod.builder.state.terminated
    if ended is None:
        return None
    if ended.reason == "OOMKilled":
        return Fate(status=ended.exit_code, ending=Ending.MEMORY)
    if ended.reason == "ContainerStatusUnknown":
        return Fate(error=NodeLost(f"the node lost {_where(pod)}: {_words(ended)}"))
    if pod.metadata.deletion_timestamp is not None and ended.exit_code in _KILLED:
        return Fate(error=PodDeleted(f"somebody deleted {_where(pod)}"))
    if ended.reason in {"StartError", "ContainerCannotRun"}:
        return Fate(error=SandboxFailed(f"the sandbox did not start: {_words(ended)}"))
    return Fate(status=ended.exit_code)


def _refused(pod: Pod) -> Fate | None:
    if pod.status.phase != "Failed":
        return None
    return Fate(error=SandboxFailed(f"the node did not take {_told(pod)}"))


def _where(pod: Pod) -> str:
    return f"pod {pod.metadata.name} on node {pod.spec.node_name or 'none'}"


def _told(pod: Pod) -> str:
    return f"{_where(pod)}: {pod.status.message or pod.status.reason}"


def _words(reason: Reason) -> str:
    return f"{reason.reason}: {reason.message}" if reason.message else reason.reason

"""A pod that runs a sandbox, from its Job to its end."""

import threading
import time
from collections.abc import Callable, Iterable

from policies.errors import RunnerError
from policies.model import Isolation
from sandbox import diagnostics
from sandbox.errors import (
    ClusterUnreachable,
    IsolationError,
    IsolationMismatch,
    IsolationUnavailable,
    SandboxFailed,
    SandboxLost,
)
from sandbox.kubernetes import fate, manifests
from sandbox.kubernetes import place as kubernetesplace
from sandbox.kubernetes.conversation import Conversation
from sandbox.kubernetes.files import Files
from sandbox.kubernetes.follower import Follower
from sandbox.kubernetes.objects import Events, Job, Pod, PodSpec
from sandbox.kubernetes.place import KubernetesPlace
from sandbox.model import Ending, SandboxSpec
from sandbox.supervise import Remains

_END_SECONDS = 60.0
"""Until the kubelet says how a first process ended that has said so itself."""
_UNHEARD_SECONDS = 300.0
"""For which an API that does not answer may still tell how a sandbox ended."""
_EVENTS_AFTER_SECONDS = 2.0
_EVENTS_EACH_SECONDS = 5.0
_BEGIN_SECONDS = 0.5
_SHOW_SECONDS = 20.0
"""The kubelet reports a container a second or two after it was started."""


class KubernetesMachine:
    """See ``sandbox.supervise.Machine``."""

    poll_seconds = 1.0

    def __init__(
        self,
        place: KubernetesPlace,
        spec: SandboxSpec,
        pod: manifests.Pod,
        files: dict[str, bytes],
        *,
        nonce: str,
        waiting: Callable[[str], None],
    ) -> None:
        """Starts it, and waits until its first process speaks.

        Args:
            place: Of the sandbox.
            spec: Of the sandbox.
            pod: How the cluster is to run it.
            files: Of its Secret.
            nonce: That its first process was given.
            waiting: Is told again and again what it waits for; what it raises is the end.

        Raises:
            IsolationError: What it waits for will not come.
        """
        self.enforced = _enforced(spec.isolation)
        self._place = place
        self._cluster = place.cluster
        self._killed = threading.Event()
        self._files: Files | None = None
        self._changes: Callable[[PodSpec], Iterable[str]] = lambda _: ()
        self._conversation = Conversation(place.door, peer_uid=place.peer_uid, nonce=nonce)
        self._follower: Follower | None = None
        try:
            self._uid = self._create(spec, pod, files)
            self._follower = Follower(self._cluster, place.namespace, place.labels, owner=self._uid)
            self._await_first(pod.pool.pending_seconds, waiting)
        except BaseException:
            self.close()
            raise

    def _create(self, spec: SandboxSpec, pod: manifests.Pod, files: dict[str, bytes]) -> str:
        namespace, cluster = pod.pool.namespace, self._cluster
        asked = manifests.job(spec, pod)
        diagnostics.debug("sandbox", job=asked)
        jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        self._place.announce()
        try:
            cluster.create(jobs, asked)
        except IsolationError as error:
            if not isinstance(error, ClusterUnreachable):
                self._place.recant()
            raise
        job = cluster.get(Job, f"{jobs}/{pod.name}")
        if job is None:
            raise SandboxFailed(f"job {pod.name} is gone, a moment after it was made")
        secret = manifests.secret(spec, pod, files, job.metadata.uid)
        cluster.create(f"/api/v1/namespaces/{namespace}/secrets", secret)
        return job.metadata.uid

    def _await_first(self, seconds: int, waiting: Callable[[str], None]) -> None:
        follower = self.follower
        began, asked = time.monotonic(), 0.0
        events = Events()
        while not self._conversation.begin(_BEGIN_SECONDS):
            if (pod := follower.pod) is not None and (fate.is_over(pod) or follower.gone):
                self._require_untaken()
                raise fate.ended_unheard(pod)
            late = time.monotonic() - began
            if late > _EVENTS_AFTER_SECONDS and late - asked > _EVENTS_EACH_SECONDS:
                asked, events = late, self._events()
            if (error := fate.hopeless(pod, events.items)) is not None:
                raise error
            if late > seconds:
                raise fate.never_began(pod, events.items, seconds)
            # A pod that starts as pods do is nothing to speak of.
            is_slow = late > _EVENTS_AFTER_SECONDS
            waiting(fate.waits_for(pod, events.items) if is_slow else "")

    def _events(self) -> Events:
        """Of the Job until there is a pod, then of the pod. Nothing where they cannot be had."""
        pod = self.follower.pod
        uid = pod.metadata.uid if pod is not None else self._uid
        try:
            found = self._cluster.get(
                Events,
                f"/api/v1/namespaces/{self._place.namespace}/events",
                fieldSelector=f"involvedObject.uid={uid}",
            )
        except IsolationUnavailable:  # they only tell more
            return Events()
        return found or Events()

    @property
    def follower(self) -> Follower:
        assert self._follower is not None, "started"
        return self._follower

    def running_pod(self) -> Pod:
        """As the cluster shows it once its container runs: with its node, and its image resolved.

        Raises:
            SandboxFailed: The cluster does not say so.
        """
        follower = self.follower
        follower.wait(
            lambda it: it.pod is not None and bool(it.pod.builder.image_id), _SHOW_SECONDS
        )
        pod = follower.pod
        if pod is None or not pod.builder.image_id:
            raise SandboxFailed("the sandbox speaks, and the cluster does not show its pod running")
        return pod

    def watch_over(self, changes: Callable[[PodSpec], Iterable[str]]) -> None:
        """From now on whatever ``changes`` finds ends the sandbox: a debugging container, say."""
        self._changes = changes

    # -- sandbox.supervise.Machine -------------------------------------------------------------

    def read(self) -> bytes:
        return self._conversation.read()

    def write(self, data: bytes) -> None:
        self._conversation.write(data)

    def hand_in(self, spec: SandboxSpec) -> None:
        """Lets the sandbox have its files from now on."""
        place = self._place
        self._files = Files(
            place.door,
            peer_uid=place.peer_uid,
            data={f"config/{name}": data for name, data in spec.plan.files.items()},
            paths={f"door/{name}": path for name, path in spec.inputs.items()},
        )

    def sample(self) -> Ending | None:
        follower = self.follower
        if follower.pod is not None and (faults := list(self._changes(follower.pod.spec))):
            raise IsolationMismatch(f"somebody changed the pod while it ran: {faults[0]}")
        if follower.pod is not None and (fate.is_over(follower.pod) or follower.gone):
            # It will say nothing more: whoever reads may have what it said before.
            self._conversation.no_more()
        return None

    def kill(self) -> None:
        if self._killed.is_set():
            return  # asked once; and what stays, the place's release removes
        self._killed.set()
        self._conversation.close()
        try:
            kubernetesplace.remove(self._cluster, self._place.namespace, self._place.title)
        except RunnerError as error:  # then it is for the place's release, and for gc
            diagnostics.debug("cluster", kill=error.message)

    def reap(self) -> Remains:
        follower = self.follower
        seconds = _END_SECONDS
        while not follower.wait(_is_over, seconds):
            if not 0 < follower.unheard_seconds < _UNHEARD_SECONDS:
                break
            seconds = 1.0
        pod = follower.pod
        self._place.is_over = pod is not None and fate.is_over(pod)
        if self._killed.is_set() or pod is None:
            return _remains(fate.Fate())
        if not _is_over(follower) and follower.unheard_seconds:
            raise SandboxLost(
                f"nobody knows how the sandbox ended: the cluster's API at {self._cluster.name} "
                "does not answer"
            )
        found = fate.of(pod, self._job(pod), deleted=follower.gone)
        if found.error is not None:
            raise found.error
        return _remains(found)

    def _job(self, pod: Pod) -> Job | None:
        """Asked for only where the pod itself does not tell."""
        if pod.status.phase == "Succeeded":
            return None
        try:
            path = f"/apis/batch/v1/namespaces/{self._place.namespace}/jobs/{self._place.title}"
            return self._cluster.get(Job, path)
        except ClusterUnreachable:
            return None

    def _require_untaken(self) -> None:
        pod = self.follower.pod
        assert pod is not None, "it was seen"
        found = fate.of(pod, self._job(pod), deleted=self.follower.gone)
        if found.error is not None:
            raise found.error

    def close(self) -> None:
        self._conversation.dispose()
        if self._files is not None:
            self._files.close()
        if self._follower is not None:
            self._follower.close()


def _is_over(follower: Follower) -> bool:
    return follower.gone or (follower.pod is not None and fate.is_over(follower.pod))


def _remains(found: fate.Fate) -> Remains:
    return Remains(
        status=found.status, ending=found.ending, cpu_seconds=None, memory_peak_bytes=None
    )


def _enforced(isolation: Isolation) -> dict[str, str]:
    kept = dict.fromkeys(("memory_bytes", "cpu_millis"), "cgroup of the kubelet")
    if isolation is Isolation.KATA:
        from sandbox.kata import preflight as kata  # noqa: PLC0415 - only who wants it needs it

        kept |= kata.NOT_ENFORCED
    return {
        **kept,
        "pids": "not enforced for one pod: the kubelet's podPidsLimit, where it is set",
        "disk_bytes": "kubelet",
    }

"""Follows the pod of one sandbox, whatever becomes of the connection to the API."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import urllib3

from sandbox import diagnostics
from sandbox.errors import ClusterUnreachable
from sandbox.kubernetes import manifests
from sandbox.kubernetes.cluster import Cluster, Expired, Refused
from sandbox.kubernetes.objects import Pod, Pods

WATCH_SECONDS = 240
"""Of one watch; load balancers like to end what lasts longer."""
_AGAIN_SECONDS = (0.2, 5.0)


class Follower:
    """The pod as it was seen last, kept up to date by a thread.

    A watch is taken up again from the last version that was seen; where the API has forgotten that,
    everything is looked at anew. What happened in between shows in what there is.
    """

    def __init__(
        self, cluster: Cluster, namespace: str, labels: Mapping[str, str], *, owner: str
    ) -> None:
        """``owner`` is the uid of the Job: anybody may give a pod our labels."""
        self._cluster = cluster
        self._owner = owner
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        self._selector = manifests.selector(labels)
        self._changed = threading.Condition()
        self._closed = False
        self._version = ""
        self._unheard_since: float | None = None
        self._watch: urllib3.HTTPResponse | None = None
        self.pod: Pod | None = None
        self.gone = False
        """Whether there was a pod, and there is none any more."""
        self._thread = threading.Thread(target=self._follow, name="sandbox-pod", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Follows no longer. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if (watch := self._watch) is not None:
            with suppress(OSError, ValueError, RuntimeError):
                watch.shutdown()

    def wait(self, until: Callable[["Follower"], bool], seconds: float) -> bool:
        """Whether ``until`` holds before the time is over, or nobody follows any more."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or until(self), seconds)

    @property
    def unheard_seconds(self) -> float:
        """Since when the API has not answered; 0 where it does."""
        since = self._unheard_since
        return 0.0 if since is None else time.monotonic() - since

    # -- the thread ----------------------------------------------------------------------------

    def _follow(self) -> None:
        pause = _AGAIN_SECONDS[0]
        while not self._closed:
            began = time.monotonic()
            try:
                if not self._version:
                    self._version = self._look()
                self._watch_on()
            except Expired:
                self._version = ""
            except Exception as error:  # noqa: BLE001 - nobody would follow any more
                if isinstance(error, Refused):
                    self._version = ""
                diagnostics.debug("cluster", watch=repr(error)[:300])
                self._unheard_since = self._unheard_since or time.monotonic()
            # Whoever ends watches at once, or forgets at once, is not asked without a break.
            if time.monotonic() - began > _AGAIN_SECONDS[1]:
                pause = _AGAIN_SECONDS[0]
            with self._changed:
                self._changed.wait_for(lambda: self._closed, pause)
            pause = min(2 * pause, _AGAIN_SECONDS[1])

    def _look(self) -> str:
        found = self._cluster.get(Pods, self._path, labelSelector=self._selector)
        if found is None:
            raise ClusterUnreachable("the cluster's API has no pods")
        self._heard()
        ours = [each for each in found.items if self._is_ours(each)]
        if ours:
            self._note(ours[0], gone=False)
        elif self.pod is not None:
            self._note(self.pod, gone=True)
        return found.metadata.resource_version

    def _watch_on(self) -> None:
        watch = self._cluster.watch(
            self._path, self._version, WATCH_SECONDS, labelSelector=self._selector
        )
        with watch as events:
            self._heard()
            self._watch = events.response
            if self._closed:
                return
            for kind, pod in events:
                self._heard()
                self._version = pod.metadata.resource_version or self._version
                if kind in {"ADDED", "MODIFIED", "DELETED"} and self._is_ours(pod):
                    self._note(pod, gone=kind == "DELETED")

    def _is_ours(self, pod: Pod) -> bool:
        """The first one of our Job's: a second one would find nobody to speak to."""
        if self.pod is not None:  # whose Job may be gone meanwhile
            return self.pod.metadata.uid == pod.metadata.uid
        return any(
            each.controller and each.uid == self._owner for each in pod.metadata.owner_references
        )

    def _heard(self) -> None:
        self._unheard_since = None

    def _note(self, pod: Pod, *, gone: bool) -> None:
        with self._changed:
            self.pod = pod
            self.gone = self.gone or gone
            self._changed.notify_all()

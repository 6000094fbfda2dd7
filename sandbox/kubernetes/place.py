"""Where a sandbox of the Kubernetes backend is: a directory of this host, and what a cluster has.

::

    STATE/sandboxes/ID/
        ...         as every place
        cluster     the API, and the namespace of the Job; there before the Job is asked for
"""

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sandbox import doors
from sandbox.errors import SandboxFailed
from sandbox.kubernetes import manifests
from sandbox.kubernetes.cluster import Cluster
from sandbox.kubernetes.objects import Job, Jobs
from sandbox.locks import make_locked
from sandbox.place import HostPlace, remove_files

CLUSTER = "cluster"
_GONE_SECONDS = 90.0
_LOOK_SECONDS = (0.1, 2.0)
_UNFIT = re.compile(r"[^a-z0-9]+")


@dataclass(slots=True)
class KubernetesPlace(HostPlace):
    """See ``sandbox.model.Place``.

    Attributes:
        key: Opens the door through the gateway's port.
        is_over: Whether the kubelet said that nothing of the pod runs any more.
    """

    cluster: Cluster
    namespace: str
    key: doors.Key
    is_over: bool = False
    _released: bool = False

    @property
    def title(self) -> str:
        """What the cluster calls what it has of this sandbox."""
        return title(self.name)

    @property
    def labels(self) -> dict[str, str]:
        return manifests.labels(of_state(self.directory.parent), self.title)

    def announce(self) -> None:
        """From now on the cluster may have something of it."""
        document = {"api": self.cluster.name, "namespace": self.namespace}
        (self.directory / CLUSTER).write_text(json.dumps(document))

    def recant(self) -> None:
        """The cluster refused: it has nothing."""
        (self.directory / CLUSTER).unlink(missing_ok=True)

    def release(self) -> None:
        if self._released:
            return
        self._released = True
        try:
            self.key.revoke()
            if (self.directory / CLUSTER).exists():
                remove(self.cluster, self.namespace, self.title)
                if not self.is_over:
                    require_gone(self.cluster, self.namespace, self.title)
            remove_files(self.directory)
        finally:  # what a cluster that does not answer has is for gc
            self.cluster.close()
            self._lock.release()


def reserve(
    sandboxes: Path, name: str, *, cluster: Cluster, namespace: str, doors_at: Path
) -> KubernetesPlace:
    """Makes the place for one sandbox. Raises SandboxFailed where it exists already."""
    directory = sandboxes.resolve() / name
    try:
        sandboxes.mkdir(parents=True, exist_ok=True)
        lock = make_locked(directory)
        key = doors.Key.to(directory / "guest" / "door", doors_at)
        # The gateway's port connects for the sandbox, as the same user as we are.
        place = KubernetesPlace(name, directory, os.geteuid(), lock, cluster, namespace, key)
        place.make("kubernetes", {})
    except OSError as error:
        raise SandboxFailed(f"no place for the sandbox: {error}") from None
    return place


def title(name: str) -> str:
    """A name that RFC 1123 allows, at most 63 characters."""
    return f"ur-{_UNFIT.sub('-', name.lower()).strip('-')}"[:63].rstrip("-")


def of_state(sandboxes: Path) -> str:
    """What the cluster knows one state directory by: many hosts and pods have it at one path.

    Raises OSError.
    """
    own = sandboxes.parent / "cluster-state"
    if not own.exists():
        made = own.with_name(f".{own.name}-{secrets.token_hex(8)}")
        made.write_text(secrets.token_hex(16))
        with suppress(FileExistsError):  # another runner was faster
            os.link(made, own)
        made.unlink()
    return own.read_text()


def remove(cluster: Cluster, namespace: str, name: str) -> None:
    """Asks for the end of a sandbox and of all that it has. Raises ClusterUnreachable."""
    cluster.delete(_job(namespace, name), propagationPolicy="Foreground")
    cluster.delete(f"/api/v1/namespaces/{namespace}/secrets/{name}")


def require_gone(cluster: Cluster, namespace: str, name: str) -> None:
    """Waits until nothing of the sandbox is there: a Job goes after its pods.

    Raises:
        SandboxFailed: It is still there.
        ClusterUnreachable: Nobody can tell.
    """
    pause, end = _LOOK_SECONDS[0], time.monotonic() + _GONE_SECONDS
    while cluster.get(Job, _job(namespace, name)) is not None:
        if time.monotonic() > end:
            raise SandboxFailed(
                f"the cluster does not remove job {name} in {namespace}",
                advice="kubectl describe tells what holds it; runner gc tries again.",
            )
        time.sleep(pause)
        pause = min(2 * pause, _LOOK_SECONDS[1])


def _job(namespace: str, name: str) -> str:
    return f"/apis/batch/v1/namespaces/{namespace}/jobs/{name}"


def clean(directory: Path, connect: Callable[[], Cluster]) -> None:
    """Removes what a cluster has of the sandbox in ``directory``, and its files.

    Raises:
        ClusterUnreachable: Nobody can tell whether something is left.
        SandboxFailed: Something is, or it is of another cluster than the configured one.
    """
    try:
        document: Any = json.loads((directory / CLUSTER).read_bytes())
        api, namespace = str(document["api"]), str(document["namespace"])
    except FileNotFoundError:  # no cluster ever had anything of it
        remove_files(directory)
        return
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SandboxFailed(f"{directory / CLUSTER} cannot be read: {error}") from None
    with connect() as cluster:
        if cluster.name != api:
            raise SandboxFailed(
                f"sandbox {directory.name} is of another cluster: {api}",
                advice="Run gc with the kubeconfig and context that it was started with.",
            )
        remove(cluster, namespace, title(directory.name))
        require_gone(cluster, namespace, title(directory.name))
    remove_files(directory)


def sweep(
    cluster: Cluster, namespace: str, sandboxes: Path, roots: Collection[str]
) -> Iterator[str]:
    """Removes Jobs of ``sandboxes`` whose place is gone, and says which.

    Raises:
        ClusterUnreachable: The API does not answer.
    """
    del roots  # a registry has the images
    asked: Mapping[str, str] = {manifests.STATE_LABEL: of_state(sandboxes)}
    found = cluster.get(
        Jobs,
        f"/apis/batch/v1/namespaces/{namespace}/jobs",
        labelSelector=manifests.selector(asked),
    )
    places = {title(path.name) for path in sandboxes.iterdir()} if sandboxes.is_dir() else set()
    for job in found.items if found is not None else ():
        if job.metadata.name not in places:
            remove(cluster, namespace, job.metadata.name)
            yield f"job {job.metadata.name} in {namespace}"


def sweep_older(cluster: Cluster, namespace: str, seconds: float) -> Iterator[str]:
    """Removes Jobs that were made longer ago, whoever's they are, and says which.

    Raises:
        ClusterUnreachable: The API does not answer.
    """
    found = cluster.get(
        Jobs,
        f"/apis/batch/v1/namespaces/{namespace}/jobs",
        labelSelector=manifests.selector({manifests.MANAGED_BY: manifests.OURS}),
    )
    oldest = datetime.now(UTC) - timedelta(seconds=seconds)
    for job in found.items if found is not None else ():
        made = job.metadata.creation_timestamp
        if made is not None and made < oldest:
            remove(cluster, namespace, job.metadata.name)
            yield f"job {job.metadata.name} in {namespace}, of {made.isoformat()}"

"""Renders a SandboxSpec as what the Kubernetes API makes a pod of. Pure.

One Job with one pod with one container, and one Secret that only this pod mounts. Nothing in here
comes from a build's context: names, labels and options are ours, and what the user gave goes
through the door once the sandbox was accepted.
"""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from builder.model import RUNNER
from sandbox.model import SandboxSpec

MANAGED_BY = "app.kubernetes.io/managed-by"
OURS = "untrusted-runner"
STATE_LABEL = f"{OURS}/state"
"""Its value names the state directory whose builds these are."""
SANDBOX_LABEL = f"{OURS}/sandbox"
CONTAINER = "builder"
SESSION = f"{RUNNER}/session"
"""Where the pod finds its Secret."""
INIT = "/.runner/init"
"""Our first process, a layer of ours on top of the builder's image."""
PLAN, KEY, CERTIFICATE = "plan", "key", "certificate.pem"

_FINISHED_SECONDS = 600
"""For which a Job that ended stays, where its runner is gone."""
_SPARE_SECONDS = 120
"""For the start of a pod and for telling its end, besides the time of the build itself."""
_GRACE_SECONDS = 1
"""0 would take the pod out of the API before the kubelet says that it is gone."""
NOBODY_INJECTS = {
    "sidecar.istio.io/inject": "false",
    "linkerd.io/inject": "disabled",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
}
"""Another container in the pod would be inside the sandbox, whose pod is refused then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Toleration:
    """Of a taint that the nodes for builds have."""

    key: str
    value: str = ""
    effect: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Which nodes are for builds, and how builds stand among other pods there.

    Attributes:
        node_selector: Labels that a node has to have.
        queue: Name of a LocalQueue of Kueue; its controller lets the Job start.
        pull_secrets: Names of Secrets for the builder's image alone.
        pending_seconds: That a pod may take until its first process speaks.
    """

    namespace: str = "runner-builds"
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    priority_class: str = ""
    queue: str = ""
    pull_secrets: tuple[str, ...] = ()
    pending_seconds: int = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """What a cluster needs to know besides the spec.

    Attributes:
        image: Of the builder, by digest.
        runtime_class: Empty for the nodes' default runtime.
    """

    name: str
    image: str
    runtime_class: str
    labels: Mapping[str, str]
    pool: Pool


def labels(state: str, sandbox: str) -> dict[str, str]:
    """What everything of one sandbox carries."""
    return {MANAGED_BY: OURS, STATE_LABEL: state, SANDBOX_LABEL: sandbox}


def selector(wanted: Mapping[str, str]) -> str:
    """Labels as the API asks for them."""
    return ",".join(f"{name}={value}" for name, value in sorted(wanted.items()))


def job(spec: SandboxSpec, pod: Pod) -> dict[str, Any]:
    """The Job: its pod is started once, or not at all."""
    pool = pod.pool
    queue = {"kueue.x-k8s.io/queue-name": pool.queue} if pool.queue else {}
    seconds = pool.pending_seconds + spec.limits.wall_seconds + _SPARE_SECONDS
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": pod.name,
            "namespace": pool.namespace,
            "labels": {**pod.labels, **queue},
        },
        "spec": {
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": 0,
            "activeDeadlineSeconds": seconds,
            "ttlSecondsAfterFinished": _FINISHED_SECONDS,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    }
                ]
            },
            "template": {
                "metadata": {"labels": dict(pod.labels), "annotations": dict(NOBODY_INJECTS)},
                "spec": _pod(spec, pod),
            },
        },
    }


def secret(
    spec: SandboxSpec, pod: Pod, files: Mapping[str, bytes], owner_uid: str
) -> dict[str, Any]:
    """What the pod must have before it can speak to anybody; gone with its Job.

    Args:
        spec: Of the sandbox, for its environment.
        pod: Whose it is.
        files: In SESSION, by name.
        owner_uid: Of the Job.
    """
    environment = {_key(name): value.encode() for name, value in spec.plan.environment.items()}
    contents = {**environment, **files}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": pod.name,
            "namespace": pod.pool.namespace,
            "labels": dict(pod.labels),
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": pod.name, "uid": owner_uid}
            ],
        },
        "type": "Opaque",
        "immutable": True,
        "data": {each: base64.b64encode(data).decode() for each, data in contents.items()},
    }


def _pod(spec: SandboxSpec, pod: Pod) -> dict[str, Any]:
    pool = pod.pool
    optional = {
        "runtimeClassName": pod.runtime_class,
        "priorityClassName": pool.priority_class,
        "nodeSelector": dict(pool.node_selector),
        "tolerations": [_toleration(each) for each in pool.tolerations],
        "imagePullSecrets": [{"name": each} for each in pool.pull_secrets],
    }
    return {
        **{name: value for name, value in optional.items() if value},
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "hostNetwork": False,
        "hostPID": False,
        "hostIPC": False,
        "shareProcessNamespace": False,
        # Nothing inside asks for names; the gateway does, outside.
        "dnsPolicy": "None",
        "dnsConfig": {"nameservers": ["127.0.0.1"]},
        "hostname": "sandbox",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "securityContext": {
            "runAsUser": spec.plan.uid,
            "runAsGroup": spec.plan.uid,
            "runAsNonRoot": spec.plan.uid != 0,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {MANAGED_BY: OURS}},
            }
        ],
        "containers": [_container(spec, pod)],
        "volumes": list(_volumes(spec, pod.name)),
    }


def _container(spec: SandboxSpec, pod: Pod) -> dict[str, Any]:
    bounds = resources(spec)
    added = {"add": sorted(spec.plan.capabilities)} if spec.plan.capabilities else {}
    return {
        "name": CONTAINER,
        "image": pod.image,
        "imagePullPolicy": "IfNotPresent",  # it is named by digest
        "command": [INIT, f"{SESSION}/{PLAN}"],
        "workingDir": "/",
        # The proxy's login is among it, and whoever may read pods must not be able to use that.
        "env": [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": pod.name, "key": _key(name)}}}
            for name in spec.plan.environment
        ],
        # Requests equal limits: a build takes nothing that another pod was promised.
        "resources": {"requests": bounds, "limits": bounds},
        "securityContext": {
            "privileged": False,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], **added},
        },
        "volumeMounts": [
            {"name": name, "mountPath": path} for name, path in _writable(spec).items()
        ]
        + [{"name": "session", "mountPath": SESSION, "readOnly": True}],
    }


def resources(spec: SandboxSpec) -> dict[str, str]:
    """Of the builder's container; the RuntimeClass adds what the sandbox itself needs."""
    limits = spec.limits
    return {
        "cpu": f"{limits.cpu_millis}m",
        "memory": str(limits.memory_bytes),
        # Volumes and what the container writes to its log count together.
        "ephemeral-storage": str(limits.disk_bytes + 2 * limits.log_bytes),
    }


def _writable(spec: SandboxSpec) -> dict[str, str]:
    """Volumes by where they are mounted: RUNNER, and each path of a plan that makes none itself."""
    paths = sorted({RUNNER} if spec.plan.apart else {*spec.plan.writable, RUNNER})
    return {f"writable-{number}": path for number, path in enumerate(paths)}


def _volumes(spec: SandboxSpec, name: str) -> Iterator[dict[str, Any]]:
    for volume in _writable(spec):
        yield {"name": volume, "emptyDir": {"sizeLimit": str(spec.limits.disk_bytes)}}
    # The sandbox's uid reads it, whoever that is; nobody else is in the pod.
    files = [{"key": each, "path": each} for each in (PLAN, KEY, CERTIFICATE)]
    yield {
        "name": "session",
        "secret": {"secretName": name, "defaultMode": 0o444, "items": files},
    }


def _toleration(taint: Toleration) -> dict[str, str]:
    operator = "Equal" if taint.value else "Exists"
    found = {"key": taint.key, "operator": operator, "value": taint.value, "effect": taint.effect}
    return {name: value for name, value in found.items() if value}


def _key(variable: str) -> str:
    return f"env.{variable}"

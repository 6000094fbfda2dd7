"""What a cluster can do for the kubernetes backend, row by row, with what mends it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from policies.errors import RunnerError
from policies.model import Isolation
from sandbox.kubernetes.backend import KubernetesBackend
from sandbox.kubernetes.cluster import Cluster
from sandbox.kubernetes.objects import (
    AccessReview,
    AdmissionPolicy,
    Namespace,
    NetworkPolicies,
    ResourceQuotas,
    Version,
)
from sandbox.rows import Row, Verdict, failed
from sandbox.smoke import smoke

OLDEST, NEWEST = 28, 36
"""Minor versions whose published schemas the manifests were checked against."""
_DEPLOY = "helm upgrade --install runner deploy/kubernetes/chart; docs/kubernetes.md"
_LEVELS = {"baseline", "restricted"}
_PSA = "pod-security.kubernetes.io/enforce"


@dataclass(frozen=True, slots=True)
class Right:
    """Something that this identity has to be allowed, and no more than that."""

    verb: str
    resource: str
    group: str = ""
    namespace: str = ""
    name: str = ""

    def __str__(self) -> str:
        where = f" in {self.namespace}" if self.namespace else ""
        return f"{self.verb} {self.resource}{where}"


def rights(namespace: str) -> Iterator[Right]:
    """All that builds need of the API."""
    for verb in ("create", "get", "list", "delete"):
        yield Right(verb, "jobs", "batch", namespace)
    for verb in ("create", "delete"):
        yield Right(verb, "secrets", "", namespace)
    for verb in ("list", "watch"):
        yield Right(verb, "pods", "", namespace)
    yield Right("list", "events", "", namespace)
    yield Right("get", "services", "", "default", "kubernetes")
    yield Right("get", "nodes")
    yield Right("get", "runtimeclasses", "node.k8s.io")


def probe(backend: KubernetesBackend, isolation: Isolation) -> Iterator[Row]:
    """Looks at the cluster from outside, and then starts a sandbox and looks from inside."""
    try:
        with backend.connect() as cluster:
            yield _version(cluster)
            yield _allowed(cluster, backend.namespace)
            for name, look in _LOOKS.items():
                yield _looked(name, partial(look, cluster, backend.namespace))
            handler = backend.handler(cluster, isolation)
    except RunnerError as error:
        yield failed("cluster", error)
        return
    name = backend.class_of(isolation)
    detail = f"{name}: handler {handler}" if name else "the nodes' default runtime"
    yield Row(name="runtime class", verdict=Verdict.OK, detail=detail)
    try:
        address = backend.require_port()
    except RunnerError as error:
        yield failed("gateway", error)
        return
    yield Row(name="gateway", verdict=Verdict.OK, detail=f"pods are told {address}")
    # Accepted, it reached the gateway's port, and nothing of what it must not.
    yield smoke(backend, isolation, backend.probe_image())


def _looked(name: str, look: Callable[[], Row]) -> Row:
    try:
        return look()
    except RunnerError as error:
        return Row(
            name=name,
            verdict=Verdict.WARN,
            detail=f"could not be looked at: {error.message}",
            mend="The chart's role for doctor lets an identity look: docs/kubernetes.md",
        )


def _version(cluster: Cluster) -> Row:
    found = cluster.get(Version, "/version") or Version()
    minor = int(found.minor.rstrip("+") or 0) if found.minor.rstrip("+").isdecimal() else 0
    if OLDEST <= minor <= NEWEST:
        return Row(
            name="cluster", verdict=Verdict.OK, detail=f"{cluster.name}, {found.git_version}"
        )
    return Row(
        name="cluster",
        verdict=Verdict.WARN,
        detail=f"{cluster.name}, {found.git_version}: neither tried nor checked",
        mend=f"Kubernetes 1.{OLDEST} to 1.{NEWEST}",
    )


def _allowed(cluster: Cluster, namespace: str) -> Row:
    lacking = [right for right in rights(namespace) if not _may(cluster, right)]
    if lacking:
        return Row(
            name="rights",
            verdict=Verdict.FAIL,
            detail=f"this identity may not {', nor '.join(map(str, lacking))}",
            mend="the chart's Role and ClusterRole, bound to it: docs/kubernetes.md",
        )
    return Row(name="rights", verdict=Verdict.OK, detail="every verb that builds need")


def _may(cluster: Cluster, right: Right) -> bool:
    asked = {
        "verb": right.verb,
        "resource": right.resource,
        "group": right.group,
        "namespace": right.namespace,
        "name": right.name,
    }
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }
    return cluster.ask(AccessReview, path, review).status.allowed


def _namespace(cluster: Cluster, name: str) -> Row:
    found = cluster.get(Namespace, f"/api/v1/namespaces/{name}")
    if found is None:
        return Row(
            name="namespace", verdict=Verdict.FAIL, detail=f"there is no {name}", mend=_DEPLOY
        )
    level = found.metadata.labels.get(_PSA, "none")
    if level not in _LEVELS:
        return Row(
            name="namespace",
            verdict=Verdict.WARN,
            detail=f"{name} enforces Pod Security level {level}",
            mend=f"kubectl label namespace {name} {_PSA}=baseline",
        )
    return Row(name="namespace", verdict=Verdict.OK, detail=f"{name}, Pod Security level {level}")


def _admission(cluster: Cluster, namespace: str) -> Row:
    # The chart calls it as the namespace that it is for.
    path = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
    if cluster.get(AdmissionPolicy, f"{path}/{namespace}") is None:
        return Row(
            name="admission",
            verdict=Verdict.WARN,
            detail="the cluster itself would admit a build's pod without a sandbox",
            mend=f"ValidatingAdmissionPolicy {namespace}, Kubernetes 1.30: {_DEPLOY}",
        )
    return Row(name="admission", verdict=Verdict.OK, detail=f"policy {namespace} is there")


def _quota(cluster: Cluster, namespace: str) -> Row:
    found = cluster.get(ResourceQuotas, f"/api/v1/namespaces/{namespace}/resourcequotas")
    left = [
        f"{name} {each.status.used.get(name, '0')} of {hard}"
        for each in (found.items if found is not None else ())
        for name, hard in sorted(each.status.hard.items())
    ]
    if not left:
        return Row(
            name="quota", verdict=Verdict.WARN, detail="builds may take all that nodes have",
            mend=f"A ResourceQuota: {_DEPLOY}",
        )  # fmt: skip
    return Row(name="quota", verdict=Verdict.OK, detail=f"used: {', '.join(left)}")


def _network(cluster: Cluster, namespace: str) -> Row:
    path = f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies"
    found = cluster.get(NetworkPolicies, path)
    if found is None or not found.items:
        return Row(
            name="network policy",
            verdict=Verdict.WARN,
            detail=f"{namespace} has none; the sandbox below tells what pods reach all the same",
            mend=_DEPLOY,
        )
    names = ", ".join(each.metadata.name for each in found.items)
    return Row(name="network policy", verdict=Verdict.OK, detail=f"{names}; tried below")


_LOOKS = {
    "namespace": _namespace,
    "admission": _admission,
    "quota": _quota,
    "network policy": _network,
}

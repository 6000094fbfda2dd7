"""``deploy/kubernetes`` in a real cluster: what runner's token may do and a build may take."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import pytest

from tests.support.deployed import (
    BARE,
    BUILDS,
    MERGE,
    SYSTEM,
    Api,
    deployed,
    identity,
    manifests,
    pod,
    submit,
    until,
    volume,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def applied() -> Iterator[Api]:
    with deployed() as admin:
        yield admin


@dataclass(frozen=True)
class Right:
    verb: str
    resource: str
    group: str = ""
    namespace: str = BUILDS
    name: str = "none"
    role: str = "runner"

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"

    @property
    def path(self) -> str:
        root = f"/apis/{self.group}" if self.group else "/api"
        version = "" if root.endswith("/v1") else "/v1"
        inside = f"/namespaces/{self.namespace}" if self.namespace else ""
        of_one = f"/{self.name}" if self.verb in {"get", "delete"} else ""
        return f"{root}{version}{inside}/{self.resource}{of_one}"

    def is_granted(self, api: Api) -> bool:
        """By the request itself, for something that is not there."""
        method = {"create": "POST", "delete": "DELETE"}.get(self.verb, "GET")
        query = {"watch": "true", "timeoutSeconds": "1"} if self.verb == "watch" else {}
        body = {"metadata": {"name": "x"}} if self.verb == "create" else None
        status, _ = api.ask(method, self.path, body, **query)
        assert status != 401
        return status != 403


_CLUSTER = f"{SYSTEM}-runner"
RIGHTS = [
    *(Right(verb, "jobs", "batch") for verb in ("create", "get", "list", "delete")),
    *(Right(verb, "secrets") for verb in ("create", "delete")),
    *(Right(verb, "pods") for verb in ("list", "watch")),
    Right("list", "events"),
    Right("get", "services", "", "default", "kubernetes", _CLUSTER),
    Right("get", "nodes", "", "", role=_CLUSTER),
    Right("get", "runtimeclasses", "node.k8s.io", "", role=_CLUSTER),
    # runner doctor's
    Right("get", "validatingadmissionpolicies", "admissionregistration.k8s.io", "", BUILDS,
          f"{_CLUSTER}-doctor"),
    Right("list", "resourcequotas", role="runner-doctor"),
    Right("list", "networkpolicies", "networking.k8s.io", role="runner-doctor"),
    Right("get", "namespaces", "", "", BUILDS, "runner-doctor"),
]  # fmt: skip


@pytest.fixture(scope="module")
def runner(applied: Api) -> Api:
    """The API as runner's service account has it."""
    return identity(applied, "runner")


@pytest.mark.parametrize("right", RIGHTS, ids=str)
def test_runner_needs_the_verb_and_has_it(applied: Api, runner: Api, right: Right) -> None:
    """Each is taken out of its role: only then the request is refused."""
    role = next(
        each for each in manifests()
        if each["kind"] in {"Role", "ClusterRole"} and each["metadata"]["name"] == right.role
        and any(right.resource in rule["resources"] for rule in each["rules"])
    )  # fmt: skip
    less = copy.deepcopy(role)
    rules = [rule for rule in less["rules"] if right.resource in rule["resources"]]
    rules[0]["verbs"].remove(right.verb)
    less["rules"] = [rule for rule in less["rules"] if rule["verbs"]]
    assert until(partial(right.is_granted, runner))
    applied.apply(less)
    try:
        assert until(lambda: not right.is_granted(runner))
    finally:
        applied.apply(role)
    assert until(partial(right.is_granted, runner))


def test_runner_has_no_verb_more(applied: Api, runner: Api) -> None:
    """What its token may do, without what any service account may: these rights and no others."""
    nobody = identity(applied, "default")
    for namespace in (BUILDS, SYSTEM, "default", "kube-system"):
        more = _rules(runner, namespace) - _rules(nobody, namespace)
        assert more == {
            (right.verb, right.group, right.resource, _names(right))
            for right in RIGHTS
            if _granted_in(right) in {"", namespace}
        }


def _granted_in(right: Right) -> str:
    return BUILDS if right.resource == "namespaces" else right.namespace


def _names(right: Right) -> tuple[str, ...]:
    named = {"services", "validatingadmissionpolicies"}
    return (right.name,) if right.resource in named else ()


def _rules(api: Api, namespace: str) -> set[tuple[str, str, str, tuple[str, ...]]]:
    """By the API's own account, which is complete where RBAC alone decides."""
    review = {
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }  # fmt: skip
    path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
    status, answer = api.ask("POST", path, review)
    assert status == 201
    return {
        (verb, group, resource, tuple(rule.get("resourceNames", ())))
        for rule in answer["status"]["resourceRules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"/api/v1/namespaces/{BUILDS}/secrets/ur-one"),
        ("GET", f"/api/v1/namespaces/{BUILDS}/secrets"),
        ("GET", f"/api/v1/namespaces/{SYSTEM}/secrets"),
        ("POST", f"/api/v1/namespaces/{BUILDS}/pods"),
        ("POST", f"/api/v1/namespaces/{BUILDS}/pods/ur-one/exec"),
        ("POST", f"/apis/batch/v1/namespaces/{SYSTEM}/jobs"),
        ("PATCH", f"/apis/batch/v1/namespaces/{BUILDS}/jobs/ur-one"),
        ("DELETE", f"/apis/batch/v1/namespaces/{BUILDS}/jobs"),
        ("GET", "/api/v1/namespaces/default/services"),
        ("GET", "/api/v1/nodes"),
        ("DELETE", f"/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/{BUILDS}"),
    ],
)
def test_runners_token_does_not_open(runner: Api, method: str, path: str) -> None:
    body: object = {} if method in {"POST", "PATCH"} else None
    assert runner.ask(method, path, body, "application/merge-patch+json"
                      if method == "PATCH" else "application/json")[0] == 403  # fmt: skip


# -- what Kubernetes itself does with the rest of the manifests ------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"spec.hostPID": True, "spec.shareProcessNamespace": None},
        volume(hostPath={"path": "/"}),
        {"c.securityContext.capabilities.add+": "SYS_ADMIN"},
        {"c.ports": [{"containerPort": 80, "hostPort": 80}]},
    ],
    ids=str,
)
def test_pod_security_stands_alone_as_well(applied: Api, changes: Mapping[str, object]) -> None:
    status, message = submit(applied, pod(**{**changes, "spec.runtimeClassName": None}), BARE)
    assert (status, 'violates PodSecurity "baseline' in message) == (403, True), message


def test_baseline_lets_runners_pod_in(applied: Api) -> None:
    assert submit(applied, pod(), BARE) == (201, "")


def test_the_gateways_own_pod_is_restricted(applied: Api) -> None:
    stateful = next(each for each in manifests() if each["kind"] == "StatefulSet")
    template = stateful["spec"]["template"]
    document = {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {**template["metadata"], "name": "gateway"}, "spec": template["spec"],
    }  # fmt: skip
    assert submit(applied, document, SYSTEM) == (201, "")


def test_a_sandbox_counts_with_what_its_runtime_needs(applied: Api) -> None:
    _, answer = applied.ask("POST", f"/api/v1/namespaces/{BUILDS}/pods", pod(), dryRun="All")
    assert answer["spec"]["overhead"] == {"cpu": "100m", "memory": "64Mi"}


@pytest.mark.parametrize(
    ("wanted", "changes"),
    [
        pytest.param("exceeded quota", {"c.resources": {side: {"cpu": "1", "memory": "1Gi",
                     "ephemeral-storage": "1Gi"} for side in ("limits", "requests")}}, id="quota"),
        pytest.param("maximum memory usage per Container", {"c.resources.limits.memory": "999Gi",
                     "c.resources.requests.memory": "999Gi"}, id="of one build"),
        pytest.param("limit to request ratio", {"c.resources.requests.memory": "1Mi"},
                     id="what others were promised"),
    ],
)  # fmt: skip
def test_a_build_gets_no_more_than(
    applied: Api, wanted: str, changes: Mapping[str, object]
) -> None:
    quota = f"/api/v1/namespaces/{BUILDS}/resourcequotas/builds"
    full = {"spec": {"hard": {"limits.cpu": "500m" if wanted == "exceeded quota" else "48"}}}
    assert applied.ask("PATCH", quota, full, MERGE)[0] == 200
    assert until(lambda: wanted in submit(applied, pod(**changes))[1])
    applied.ask("PATCH", quota, {"spec": {"hard": {"limits.cpu": "48"}}}, MERGE)
    assert until(lambda: submit(applied, pod())[0] == 201)

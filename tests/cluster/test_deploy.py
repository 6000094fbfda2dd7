"""``deploy/kubernetes`` on a real cluster: what its API lets in, and what runner's token may do.

The plain manifests are applied under names of this test's own and taken away again. No sandbox is
started: any cluster of Kubernetes 1.34 or newer will do, whatever its nodes can run.
"""

import copy
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml
from kubernetes import client, config

from tests.support.hosts import REPOSITORY

PLAIN = REPOSITORY / "deploy/kubernetes/plain"
WAIT_SECONDS = 20.0
_TAG = f"deploy-{secrets.token_hex(3)}"
BUILDS, SYSTEM, GVISOR, KATA = f"{_TAG}-builds", f"{_TAG}-system", f"{_TAG}-gvisor", f"{_TAG}-kata"
BARE = f"{_TAG}-bare"
"""Has the Pod Security labels that the builds' namespace has, and no policy of ours."""
FOREIGN = f"{_TAG}-foreign"
"""A RuntimeClass that the cluster has for others."""
NO_CLUSTER = (
    "KUBECONFIG names no cluster: `kind create cluster --kubeconfig FILE`, or any other of "
    "Kubernetes 1.34 or newer whose administrator you are, then KUBECONFIG=FILE make test-cluster"
)
IMAGE = "registry.invalid/builder@sha256:" + 64 * "0"

Document = dict[str, Any]


class Api:
    """The API of the cluster, as one identity."""

    def __init__(self, settings: client.Configuration) -> None:
        self._settings = settings
        self._pool = client.ApiClient(settings).rest_client.pool_manager

    def ask(
        self, method: str, path: str, body: object = None, kind: str = "application/json",
        **query: str,
    ) -> tuple[int, Document]:  # fmt: skip
        headers = {"Content-Type": kind, "Accept": "application/json"}
        for each in self._settings.auth_settings().values():
            headers[each["key"]] = each["value"]
        url = f"{self._settings.host}{path}?{urlencode(query)}"
        data = None if body is None else json.dumps(body)
        answer = self._pool.request(method, url, body=data, headers=headers, timeout=30, retries=0)
        text = answer.data.decode()
        return answer.status, json.loads(text) if text.startswith("{") and "\n{" not in text else {}

    def as_token(self, token: str) -> "Api":
        settings = client.Configuration(host=self._settings.host)
        settings.ssl_ca_cert = self._settings.ssl_ca_cert
        settings.verify_ssl = self._settings.verify_ssl
        settings.api_key["authorization"] = f"Bearer {token}"
        return Api(settings)

    def apply(self, document: Document, **query: str) -> tuple[int, Document]:
        return self.ask(
            "PATCH", place_of(document), document, "application/apply-patch+yaml",
            fieldManager="test", force="true", **query,
        )  # fmt: skip


_COLLECTIONS = {
    "Namespace": "namespaces",
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "RuntimeClass": "runtimeclasses",
    "NetworkPolicy": "networkpolicies",
    "ValidatingAdmissionPolicy": "validatingadmissionpolicies",
    "MutatingAdmissionPolicy": "mutatingadmissionpolicies",
}


def place_of(document: Document) -> str:
    version, metadata = document["apiVersion"], document["metadata"]
    collection = _COLLECTIONS.get(document["kind"], f"{document['kind'].lower()}s")
    inside = f"/namespaces/{metadata['namespace']}" if "namespace" in metadata else ""
    root = "/apis" if "/" in version else "/api"
    return f"{root}/{version}{inside}/{collection}/{metadata['name']}"


def manifests() -> list[Document]:
    """The plain ones, by names of ours; the gateway's image is nowhere, so it stays at none."""
    names = {
        "runner-builds": BUILDS, "runner-system": SYSTEM,
        '["gvisor","kata"]': json.dumps([GVISOR, KATA]),
        "name: gvisor": f"name: {GVISOR}", "name: kata": f"name: {KATA}",
    }  # fmt: skip
    found: list[Document] = []
    for name in yaml.safe_load((PLAIN / "kustomization.yaml").read_text())["resources"]:
        text = (PLAIN / name).read_text(encoding="utf-8")
        for old, new in names.items():
            text = text.replace(old, new)
        found += filter(None, yaml.safe_load_all(text))
    for document in found:
        if document["kind"] == "Deployment":
            document["spec"]["replicas"] = 0
    return found


def until(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT_SECONDS
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.1)
    return held


@pytest.fixture(scope="module")
def admin() -> Api:
    if not os.environ.get("KUBECONFIG"):
        pytest.skip(NO_CLUSTER)
    settings = client.Configuration()
    config.load_kube_config(client_configuration=settings)
    return Api(settings)


@pytest.fixture(scope="module")
def applied(admin: Api) -> Iterator[Api]:
    """With everything of deploy/kubernetes in it, in namespaces of this test's own."""
    documents = manifests()
    bare = next(each for each in documents if each["metadata"]["name"] == BUILDS)
    bare = {**bare, "metadata": {**bare["metadata"], "name": BARE}}
    foreign = {
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": FOREIGN},
        "handler": "runc",
    }  # fmt: skip
    another = {
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": "another", "namespace": BUILDS},
    }  # fmt: skip
    documents = [bare, foreign, *documents, another]
    try:
        for document in documents:
            status, answer = admin.apply(document)
            assert status in {200, 201}, answer
        yield admin
    finally:
        for document in reversed(documents):
            admin.ask("DELETE", place_of(document))


@pytest.fixture(scope="module")
def guarded(applied: Api) -> Api:
    """The builds' namespace without Pod Security, so that the policy stands alone."""
    labels = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}}
    status, _ = applied.ask(
        "PATCH", f"/api/v1/namespaces/{BUILDS}", labels, "application/merge-patch+json"
    )
    assert status == 200
    # It is enforced a moment after the API has it.
    assert until(lambda: submit(applied, pod(**{"spec.runtimeClassName": None}))[0] == 422)
    return applied


# -- pods ------------------------------------------------------------------------------------------


def asked_for() -> Document:
    """A pod as runner's Job makes it."""
    bounds = {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "1Gi"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "ur-one",
            "annotations": {
                "sidecar.istio.io/inject": "false",
                "linkerd.io/inject": "disabled",
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            },
            "ownerReferences": [
                {
                    "apiVersion": "batch/v1", "kind": "Job", "name": "ur-one",
                    "uid": "00000000-0000-0000-0000-000000000000", "controller": True,
                }
            ],
        },
        "spec": {
            "runtimeClassName": GVISOR,
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "hostNetwork": False,
            "hostPID": False,
            "hostIPC": False,
            "shareProcessNamespace": False,
            "dnsPolicy": "None",
            "dnsConfig": {"nameservers": ["127.0.0.1"]},
            "nodeSelector": {"untrusted-runner/no-such": "node"},
            "tolerations": [{"key": "for-builds", "operator": "Exists"}],
            "securityContext": {
                "runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": False,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "builder",
                    "image": IMAGE,
                    "command": ["/.runner/init", "/run/runner/session/plan"],
                    "env": [{"name": "PATH", "valueFrom": {
                        "secretKeyRef": {"name": "ur-one", "key": "env.PATH"}}}],
                    "resources": {"requests": {**bounds}, "limits": {**bounds}},
                    "securityContext": {
                        "privileged": False,
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"], "add": ["SETGID", "SETUID"]},
                    },
                    "volumeMounts": [
                        {"name": "writable-0", "mountPath": "/run/runner"},
                        {"name": "session", "mountPath": "/session", "readOnly": True},
                    ],
                }
            ],
            "volumes": [
                {"name": "writable-0", "emptyDir": {"sizeLimit": "1Gi"}},
                {"name": "session", "secret": {"secretName": "ur-one", "defaultMode": 0o444}},
            ],
        },
    }  # fmt: skip


def pod(**changes: object) -> Document:
    """``asked_for``, with what stands at dotted paths changed; ``+`` adds to a list."""
    document = asked_for()
    for path, value in changes.items():
        # "c" is for the container, whose path is long.
        *parents, last = re.sub(r"^c(?=\.)", "spec.containers.0", path).split(".")
        at: Any = document
        for key in parents:
            at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
        if value is None:
            del at[last]
        elif last.endswith("+"):
            at[last[:-1]] = [*at.get(last[:-1], []), value]
        else:
            at[int(last) if isinstance(at, list) else last.replace("~", ".")] = value
    return document


def submit(api: Api, document: Document, namespace: str = BUILDS) -> tuple[int, str]:
    """What the API would say; nothing is stored."""
    status, answer = api.ask(
        "POST", f"/api/v1/namespaces/{namespace}/pods", document, dryRun="All"
    )
    return status, answer.get("message", "")


CONTAINER = asked_for()["spec"]["containers"][0]
OTHER = {**CONTAINER, "name": "other"}


def volume(**source: object) -> Mapping[str, object]:
    return {"spec.volumes+": {"name": "v", **source}}


ONE = "one container, and no other"
CLASS = "runs under a RuntimeClass of"
SHARES = "shares no namespace with its node"
MOUNTS = "mounts emptyDir volumes and the Secret of its own Job"
WHOLE = "mounts whole volumes"
TOKEN = "no token of the API"
WRITTEN = "environment is in its pod and in the Secret of its own Job"
PRIVILEGES = "is not privileged, and gets no privileges"
CAPABILITIES = "drops ALL capabilities, and adds some of"
SECCOMP = "default seccomp profile"
PROFILES = "no AppArmor profile, SELinux label, sysctl or Windows option"
PORTS = "no port of its node"
PROBES = "no probes and no lifecycle hooks"
DEVICES = "asks for cpu, memory and ephemeral-storage"
NODE = "does not choose its node"
PRIORITY = "priority is at most 0"
DIGEST = "named by its digest"
NOTES = "refused for its annotations"
_ELSEWHERE = {"httpGet": {"host": "169.254.169.254", "port": 80}}
_EXEC = {"exec": {"command": ["true"]}}

ATTACKS: list[tuple[str, str, Mapping[str, object]]] = [
    ("no RuntimeClass", CLASS, {"spec.runtimeClassName": None}),
    ("a RuntimeClass of another's", CLASS, {"spec.runtimeClassName": FOREIGN}),
    ("a second container", ONE, {"spec.containers+": OTHER}),
    ("an init container", ONE, {"spec.initContainers": [OTHER]}),
    ("a sidecar", ONE, {"spec.initContainers": [{**OTHER, "restartPolicy": "Always"}]}),
    ("the node's network", SHARES, {"spec.hostNetwork": True, "spec.dnsPolicy": "Default",
                                    "spec.dnsConfig": None}),
    ("the node's processes", SHARES, {"spec.hostPID": True, "spec.shareProcessNamespace": None}),
    ("the node's IPC", SHARES, {"spec.hostIPC": True}),
    ("a user namespace", SHARES, {"spec.hostUsers": False}),
    ("the node's users, said aloud", SHARES, {"spec.hostUsers": True}),
    ("the node's root", MOUNTS, volume(hostPath={"path": "/"})),
    ("containerd's socket", MOUNTS, volume(hostPath={"path": "/run/containerd/containerd.sock",
                                                     "type": "Socket"})),
    ("a token in a volume of its own", MOUNTS, volume(
        projected={"sources": [{"serviceAccountToken": {"path": "token"}}]})),
    ("another build's Secret", MOUNTS, volume(secret={"secretName": "ur-two"})),
    ("another build's Secret, projected", MOUNTS, volume(
        projected={"sources": [{"secret": {"name": "ur-two"}}]})),
    ("its Secret without its Job", MOUNTS, {"metadata.ownerReferences": []}),
    ("its Secret, owned by something else", MOUNTS, {"metadata.ownerReferences.0.kind": "Pod"}),
    ("its Secret, with a Job beside", MOUNTS, {"metadata.ownerReferences.0.controller": False}),
    ("a pull secret, with a Job of its name", MOUNTS, {
        "metadata.ownerReferences.0.name": "pull", "spec.volumes.1.secret.secretName": "pull",
        "c.env": []}),
    ("a ConfigMap", MOUNTS, volume(configMap={"name": "kube-root-ca.crt"})),
    ("a volume of the cluster", MOUNTS, volume(persistentVolumeClaim={"claimName": "c"})),
    ("a volume made for it", MOUNTS, volume(ephemeral={"volumeClaimTemplate": {"spec": {
        "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}})),
    ("a CSI volume", MOUNTS, volume(csi={"driver": "secrets-store.csi.k8s.io"})),
    ("a share", MOUNTS, volume(nfs={"server": "10.0.0.1", "path": "/"})),
    ("an image as a volume", MOUNTS, volume(image={"reference": IMAGE})),
    ("what the API knows of it", MOUNTS, volume(downwardAPI={"items": []})),
    ("a part of a volume", WHOLE, {"c.volumeMounts.0.subPath": "x"}),
    ("a part of a volume, by a variable", WHOLE, {"c.volumeMounts.0.subPathExpr": "$(PATH)"}),
    ("a service account's token", TOKEN, {"spec.automountServiceAccountToken": True}),
    ("a token by default", TOKEN, {"spec.automountServiceAccountToken": None}),
    ("another service account", TOKEN, {"spec.serviceAccountName": "another"}),
    ("a Secret as a variable", WRITTEN, {"c.env+": {"name": "S", "valueFrom": {
        "secretKeyRef": {"name": "ur-two", "key": "key"}}}}),
    ("its node's name as a variable", WRITTEN, {"c.env+": {"name": "S", "valueFrom": {
        "fieldRef": {"fieldPath": "spec.nodeName"}}}}),
    ("a Secret as all variables", WRITTEN, {"c.envFrom": [{"secretRef": {"name": "ur-two"}}]}),
    ("all privileges", PRIVILEGES, {"c.securityContext": {
        **CONTAINER["securityContext"], "privileged": True, "allowPrivilegeEscalation": True}}),
    ("setuid programs", PRIVILEGES, {"c.securityContext.allowPrivilegeEscalation": True}),
    ("setuid programs by default", PRIVILEGES, {
        "c.securityContext.allowPrivilegeEscalation": None}),
    ("no security context", PRIVILEGES, {"c.securityContext": None}),
    ("a capability of the node's", CAPABILITIES, {"c.securityContext.capabilities.add+": "BPF"}),
    ("NET_RAW", CAPABILITIES, {"c.securityContext.capabilities.add+": "NET_RAW"}),
    ("all capabilities", CAPABILITIES, {"c.securityContext.capabilities.add": ["ALL"]}),
    ("a capability in lower case", CAPABILITIES, {
        "c.securityContext.capabilities.add": ["net_raw"]}),
    ("the runtime's capabilities", CAPABILITIES, {"c.securityContext.capabilities": None}),
    ("no seccomp", SECCOMP, {"spec.securityContext.seccompProfile.type": "Unconfined"}),
    ("no seccomp by default", SECCOMP, {"spec.securityContext.seccompProfile": None}),
    ("no seccomp for its container", SECCOMP, {
        "c.securityContext.seccompProfile": {"type": "Unconfined"}}),
    ("a seccomp profile of the node's", SECCOMP, {"c.securityContext.seccompProfile": {
        "type": "Localhost", "localhostProfile": "open.json"}}),
    ("no AppArmor", PROFILES, {"c.securityContext.appArmorProfile": {"type": "Unconfined"}}),
    ("no AppArmor for all of it", PROFILES, {
        "spec.securityContext.appArmorProfile": {"type": "Unconfined"}}),
    ("an SELinux type", PROFILES, {"spec.securityContext.seLinuxOptions": {"type": "spc_t"}}),
    ("an SELinux role", PROFILES, {"c.securityContext.seLinuxOptions": {"role": "system_r"}}),
    ("a sysctl", PROFILES, {"spec.securityContext.sysctls": [
        {"name": "kernel.shm_rmid_forced", "value": "1"}]}),
    ("to be another user of Windows", PROFILES, {
        "spec.securityContext.windowsOptions": {"runAsUserName": "ContainerAdministrator"}}),
    ("to run on Windows", PRIVILEGES, {
        "spec.os": {"name": "windows"}, "spec.hostPID": None, "spec.hostIPC": None,
        "spec.shareProcessNamespace": None, "spec.securityContext": None,
        "c.securityContext": None}),
    ("a port of the node", PORTS, {"c.ports": [{"containerPort": 80, "hostPort": 80}]}),
    ("a request of the kubelet's", PROBES, {"c.livenessProbe": _ELSEWHERE}),
    ("one when it is ready", PROBES, {"c.readinessProbe": _ELSEWHERE}),
    ("a hook", PROBES, {"c.lifecycle": {"postStart": _EXEC}}),
    ("a hook of the kubelet's", PROBES, {"c.lifecycle": {"preStop": _ELSEWHERE}}),
    ("a device", DEVICES, {"c.resources.limits": {
        **CONTAINER["resources"]["limits"], "devices.kubevirt.io/kvm": "1"}}),
    ("huge pages", DEVICES, {"c.resources": {side: {
        **CONTAINER["resources"][side], "hugepages-2Mi": "2Mi"}
        for side in ("limits", "requests")}}),
    ("huge pages for all of it", DEVICES, {"spec.resources": {side: {"hugepages-2Mi": "2Mi"}
                                           for side in ("limits", "requests")}}),
    ("a claimed device", DEVICES, {"spec.resourceClaims": [
        {"name": "gpu", "resourceClaimName": "gpu"}]}),
    ("a node of its choice", NODE, {"spec.nodeName": "control-plane"}),
    ("every node", NODE, {"spec.tolerations": [{"operator": "Exists"}]}),
    ("the control plane", NODE, {"spec.tolerations": [
        {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}]}),
    ("to come before all others", PRIORITY, {"spec.priorityClassName": "system-node-critical"}),
    ("an image by its tag", DIGEST, {"c.image": "registry.invalid/builder:1"}),
    ("a digest in the tag's place", DIGEST, {"c.image": "registry.invalid/builder"}),
    ("a mount by Kata's annotation", NOTES, {
        "metadata.annotations.io~katacontainers~config~hypervisor~kernel_params": "x"}),
    ("a flag of runsc", NOTES, {"metadata.annotations.dev~gvisor~flag~network": "host"}),
    ("another network", NOTES, {
        "metadata.annotations.k8s~v1~cni~cncf~io/networks": "default/host"}),
    ("a device by its annotation", NOTES, {"metadata.annotations.cdi~k8s~io/x": "v/c=all"}),
]  # fmt: skip


def test_what_runner_asks_for_is_let_in(guarded: Api) -> None:
    assert submit(guarded, pod()) == (201, "")


@pytest.mark.parametrize(
    ("wanted", "changes"),
    [each[1:] for each in ATTACKS], ids=[each[0] for each in ATTACKS],
)  # fmt: skip
def test_the_cluster_refuses_a_pod_that_wants(
    guarded: Api, wanted: str, changes: Mapping[str, object]
) -> None:
    status, message = submit(guarded, pod(**changes))
    assert (status, "ValidatingAdmissionPolicy" in message) == (422, True), message
    assert wanted in message


def test_annotations_of_kueue_are_let_in(guarded: Api) -> None:
    document = pod(**{"metadata.annotations.kueue~x-k8s~io/workload": "job-x"})
    assert submit(guarded, document) == (201, "")


@pytest.mark.parametrize(
    ("wanted", "subresource", "change"),
    [
        pytest.param(ONE, "/ephemeralcontainers", {"spec": {"ephemeralContainers": [
            {"name": "look", "image": IMAGE}]}}, id="a container to look into it"),
        pytest.param(ONE, "/ephemeralcontainers", {"spec": {"ephemeralContainers": [
            {**OTHER, "resources": None, "targetContainerName": "builder"}]}}, id="one like its own"),
        pytest.param(DIGEST, "", {"spec": {"containers": [
            {"name": "builder", "image": "registry.invalid/other:1"}]}}, id="another image"),
        pytest.param(NODE, "", [{"op": "add", "path": "/spec/tolerations/-", "value": {
            "operator": "Exists"}}], id="every node"),
        pytest.param(NOTES, "", {"metadata": {"annotations": {
            "dev.gvisor.flag.network": "host"}}}, id="a flag of runsc"),
    ],
)  # fmt: skip
def test_a_pod_that_was_let_in_is_not_given(
    waiting: Api, wanted: str, subresource: str, change: object
) -> None:
    kind = "json-patch" if isinstance(change, list) else "strategic-merge-patch"
    path = f"/api/v1/namespaces/{BUILDS}/pods/ur-one{subresource}"
    status, answer = waiting.ask("PATCH", path, change, f"application/{kind}+json")
    assert status == 422, answer
    assert wanted in answer["message"]


def test_a_pod_of_before_the_rules_may_still_go(waiting: Api, guarded: Api) -> None:
    """Its Job's controller takes a finalizer off: an update, which says nothing new."""
    path = f"/api/v1/namespaces/{BUILDS}/pods/ur-one"
    another = pod(**{"metadata.name": "ur-two"})
    stricter = copy.deepcopy(_policy())
    stricter["spec"]["validations"] = [{"expression": "false", "message": "nobody at all"}]
    guarded.apply(stricter)
    try:
        assert until(lambda: "nobody at all" in submit(guarded, another)[1])
        mark = {"metadata": {"finalizers": ["untrusted-runner/test"]}}
        kind = "application/merge-patch+json"
        assert waiting.ask("PATCH", path, mark, kind)[0] == 200
        assert waiting.ask("PATCH", path, {"metadata": {"finalizers": None}}, kind)[0] == 200
    finally:
        guarded.apply(_policy())
        assert until(lambda: submit(guarded, another)[0] == 201)


@pytest.fixture
def waiting(guarded: Api) -> Iterator[Api]:
    """With runner's pod in the API, for which there is no node."""
    pods = f"/api/v1/namespaces/{BUILDS}/pods"
    document = pod(**{
        "metadata.ownerReferences": None, "c.env": [],
        "spec.volumes.1": {"name": "session", "emptyDir": {}},
    })  # fmt: skip
    status, answer = guarded.ask("POST", pods, document)
    assert status == 201, answer
    yield guarded
    guarded.ask("DELETE", f"{pods}/ur-one", gracePeriodSeconds="0")
    assert until(lambda: guarded.ask("GET", f"{pods}/ur-one")[0] == 404)


def test_who_may_make_jobs_gets_no_pod_of_another_kind(guarded: Api, runner: Api) -> None:
    """Runner's own token, in the hands of somebody who stole it."""
    template = pod(**volume(hostPath={"path": "/"}))
    jobs = f"/apis/batch/v1/namespaces/{BUILDS}/jobs"
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "ur-stolen"},
        "spec": {"backoffLimit": 0, "template": {"spec": template["spec"]}},
    }
    assert runner.ask("POST", jobs, job)[0] == 201
    events: list[str] = []

    def told() -> bool:
        _, answer = runner.ask("GET", f"/api/v1/namespaces/{BUILDS}/events")
        ours = [e for e in answer["items"] if e["involvedObject"]["name"] == "ur-stolen"]
        events[:] = [each["message"] for each in ours if each["reason"] == "FailedCreate"]
        return bool(events)

    assert until(told)
    assert MOUNTS in events[0]
    _, answer = runner.ask("GET", f"/api/v1/namespaces/{BUILDS}/pods")
    assert answer["items"] == []
    assert runner.ask("DELETE", f"{jobs}/ur-stolen", {"propagationPolicy": "Foreground"})[0] == 200


@pytest.mark.parametrize(
    ("wanted", "changed"),
    [
        pytest.param(ONE, "Object{spec: Object.spec{containers: [Object.spec.containers{"
                     "name: 'injected', image: 'registry.invalid/x'}]}}", id="a sidecar"),
        pytest.param(SHARES, "Object{spec: Object.spec{hostPID: true}}", id="the node's processes"),
        pytest.param(NOTES, "Object{metadata: Object.metadata{annotations: {"
                     "'dev.gvisor.flag.network': 'host'}}}", id="a flag of runsc"),
    ],
)  # fmt: skip
def test_what_changes_pods_on_their_way_adds_nothing(
    guarded: Api, wanted: str, changed: str
) -> None:
    """A MutatingAdmissionPolicy stands in for a webhook: both come before the rules."""
    group = "admissionregistration.k8s.io/v1"
    if guarded.ask("GET", f"/apis/{group}/mutatingadmissionpolicies")[0] != 200:
        pytest.skip("a cluster without MutatingAdmissionPolicy v1, which is of Kubernetes 1.36")
    name = {"name": f"{_TAG}-changes"}
    policy: Document = {
        "apiVersion": group,
        "kind": "MutatingAdmissionPolicy",
        "metadata": name,
        "spec": {
            "matchConstraints": {"resourceRules": [{
                "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"],
                "resources": ["pods"],
            }]},
            "reinvocationPolicy": "Never",
            "mutations": [{
                "patchType": "ApplyConfiguration", "applyConfiguration": {"expression": changed},
            }],
        },
    }  # fmt: skip
    binding: Document = {
        "apiVersion": group,
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": name,
        "spec": {"policyName": name["name"], "matchResources": {"namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": BUILDS}}}},
    }  # fmt: skip
    message = ""

    def refused() -> bool:
        nonlocal message
        status, message = submit(guarded, pod())
        return status != 201

    try:
        for each in (policy, binding):
            status, answer = guarded.apply(each)
            assert status == 201, answer
        assert until(refused)
    finally:
        for each in (binding, policy):
            guarded.ask("DELETE", place_of(each))
        assert until(lambda: submit(guarded, pod())[0] == 201)
    assert wanted in message


# -- what Kubernetes itself does with the rest of the manifests ---------------------------------------


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
    deployment = next(each for each in manifests() if each["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    document = {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {**template["metadata"], "name": "gateway"}, "spec": template["spec"],
    }  # fmt: skip
    assert submit(applied, document, SYSTEM) == (201, "")


def test_a_sandbox_counts_with_what_its_runtime_needs(guarded: Api) -> None:
    _, answer = guarded.ask("POST", f"/api/v1/namespaces/{BUILDS}/pods", pod(), dryRun="All")
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
    guarded: Api, wanted: str, changes: Mapping[str, object]
) -> None:
    quota = f"/api/v1/namespaces/{BUILDS}/resourcequotas/builds"
    kind = "application/merge-patch+json"
    full = {"spec": {"hard": {"limits.cpu": "500m" if wanted == "exceeded quota" else "48"}}}
    assert guarded.ask("PATCH", quota, full, kind)[0] == 200
    assert until(lambda: wanted in submit(guarded, pod(**changes))[1])
    guarded.ask("PATCH", quota, {"spec": {"hard": {"limits.cpu": "48"}}}, kind)
    assert until(lambda: submit(guarded, pod())[0] == 201)


# -- what runner's token may do ----------------------------------------------------------------------


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


_RBAC = "rbac.authorization.k8s.io/v1"
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
    return _identity(applied, "runner")


def _identity(applied: Api, account: str) -> Api:
    path = f"/api/v1/namespaces/{SYSTEM}/serviceaccounts/{account}/token"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    found: list[Document] = []

    def asked() -> bool:
        status, answer = applied.ask("POST", path, request)
        found.append(answer)
        return status == 201

    assert until(asked)
    return applied.as_token(found[-1]["status"]["token"])


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
    nobody = _identity(applied, "default")
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
    body = {} if method in {"POST", "PATCH"} else None
    assert runner.ask(method, path, body, "application/merge-patch+json"
                      if method == "PATCH" else "application/json")[0] == 403  # fmt: skip


def _policy() -> Document:
    kind = "ValidatingAdmissionPolicy"
    return next(each for each in manifests() if each["kind"] == kind)

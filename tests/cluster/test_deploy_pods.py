"""What ``deploy/kubernetes`` lets into the builds' namespace of a real cluster, and what not."""

import copy
from collections.abc import Iterator, Mapping

import pytest

from tests.support.deployed import (
    BUILDS,
    FOREIGN,
    IMAGE,
    MERGE,
    TAG,
    Api,
    Document,
    asked_for,
    deployed,
    identity,
    manifests,
    place_of,
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


@pytest.fixture(scope="module")
def guarded(applied: Api) -> Api:
    """The builds' namespace without Pod Security, so that the policy stands alone."""
    labels = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}}
    assert applied.ask("PATCH", f"/api/v1/namespaces/{BUILDS}", labels, MERGE)[0] == 200
    # It is enforced a moment after the API has it.
    assert until(lambda: submit(applied, pod(**{"spec.runtimeClassName": None}))[0] == 422)
    return applied


def policy() -> Document:
    kind = "ValidatingAdmissionPolicy"
    return next(each for each in manifests() if each["kind"] == kind)


CONTAINER = asked_for()["spec"]["containers"][0]
OTHER = {**CONTAINER, "name": "other"}


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
            {**OTHER, "resources": None, "targetContainerName": "builder"}]}},
            id="one like its own"),
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
    stricter = copy.deepcopy(policy())
    stricter["spec"]["validations"] = [{"expression": "false", "message": "nobody at all"}]
    guarded.apply(stricter)
    try:
        assert until(lambda: "nobody at all" in submit(guarded, another)[1])
        mark = {"metadata": {"finalizers": ["untrusted-runner/test"]}}
        assert waiting.ask("PATCH", path, mark, MERGE)[0] == 200
        assert waiting.ask("PATCH", path, {"metadata": {"finalizers": None}}, MERGE)[0] == 200
    finally:
        guarded.apply(policy())
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


def test_who_may_make_jobs_gets_no_pod_of_another_kind(guarded: Api) -> None:
    """Runner's own token, in the hands of somebody who stole it."""
    runner = identity(guarded, "runner")
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
    name = {"name": f"{TAG}-changes"}
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

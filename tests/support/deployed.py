"""``deploy/kubernetes`` in a real cluster, under names of a test's own, for as long as it takes.

No sandbox is started: any cluster of Kubernetes 1.34 or newer will do, whatever its nodes can run.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml
from kubernetes import client, config

from tests.support.hosts import REPOSITORY

PLAIN = REPOSITORY / "deploy/kubernetes/plain"
WAIT_SECONDS = 20.0
GONE_SECONDS = 90.0
TAG = f"deploy-{secrets.token_hex(3)}"
BUILDS, SYSTEM, GVISOR, KATA = f"{TAG}-builds", f"{TAG}-system", f"{TAG}-gvisor", f"{TAG}-kata"
BARE = f"{TAG}-bare"
"""Has the Pod Security labels that the builds' namespace has, and no policy of ours."""
FOREIGN = f"{TAG}-foreign"
"""A RuntimeClass that the cluster has for others."""
NO_CLUSTER = (
    "KUBECONFIG names no cluster: `kind create cluster --kubeconfig FILE`, or any other of "
    "Kubernetes 1.34 or newer whose administrator you are, then KUBECONFIG=FILE make test-cluster"
)
IMAGE = "registry.invalid/builder@sha256:" + 64 * "0"
MERGE = "application/merge-patch+json"

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
        if token := self._settings.api_key.get("BearerToken"):
            headers["Authorization"] = token
        url = f"{self._settings.host}{path}?{urlencode(query)}"
        data = None if body is None else json.dumps(body)
        answer = self._pool.request(method, url, body=data, headers=headers, timeout=30, retries=0)
        text = answer.data.decode()
        return answer.status, json.loads(text) if text.startswith("{") and "\n{" not in text else {}

    def as_token(self, token: str) -> "Api":
        settings = client.Configuration(host=self._settings.host)
        settings.ssl_ca_cert = self._settings.ssl_ca_cert
        settings.verify_ssl = self._settings.verify_ssl
        settings.api_key["BearerToken"] = f"Bearer {token}"
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
        if document["kind"] == "StatefulSet":
            document["spec"]["replicas"] = 0
    return found


def until(holds: Callable[[], bool], seconds: float = WAIT_SECONDS) -> bool:
    """Whether it does before the time is over: what the API has is enforced a moment later."""
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.1)
    return held


@contextmanager
def deployed() -> Iterator[Api]:
    """The API as its administrator has it, with everything of deploy/kubernetes applied."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip(NO_CLUSTER)
    settings = client.Configuration()
    config.load_kube_config(client_configuration=settings)  # type: ignore[no-untyped-call] # the SDK's
    admin, documents = Api(settings), _documents()
    try:
        for document in documents:
            status, answer = admin.apply(document)
            assert status in {200, 201}, answer
        yield admin
    finally:
        for document in reversed(documents):
            admin.ask("DELETE", place_of(document))
        for document in documents:
            assert until(partial(_is_gone, admin, document), GONE_SECONDS), place_of(document)


def _is_gone(admin: Api, document: Document) -> bool:
    return admin.ask("GET", place_of(document))[0] == 404


def _documents() -> list[Document]:
    ours = manifests()
    builds = next(each for each in ours if each["metadata"]["name"] == BUILDS)
    bare = {**builds, "metadata": {**builds["metadata"], "name": BARE}}
    foreign = {
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": FOREIGN},
        "handler": "runc",
    }  # fmt: skip
    another = {
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": "another", "namespace": BUILDS},
    }  # fmt: skip
    return [bare, foreign, *ours, another]


def identity(admin: Api, account: str) -> Api:
    """The API as a service account of the system namespace has it."""
    path = f"/api/v1/namespaces/{SYSTEM}/serviceaccounts/{account}/token"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    found: list[Document] = []

    def asked() -> bool:
        status, answer = admin.ask("POST", path, request)
        found.append(answer)
        return status == 201

    assert until(asked)
    return admin.as_token(found[-1]["status"]["token"])


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
    status, answer = api.ask("POST", f"/api/v1/namespaces/{namespace}/pods", document, dryRun="All")
    return status, answer.get("message", "")


def volume(**source: object) -> dict[str, object]:
    """What ``pod`` takes for one volume more."""
    return {"spec.volumes+": {"name": "v", **source}}

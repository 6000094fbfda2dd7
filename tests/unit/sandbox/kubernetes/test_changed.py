"""What is seen of a pod that somebody changed on its way in: one row for each change."""

from collections.abc import Callable
from typing import Any

import pytest

from sandbox.kubernetes import manifests
from sandbox.kubernetes.backend import changed
from sandbox.kubernetes.objects import Pod
from tests.support.golden import SPEC, pod

ASKED = pod("gvisor")
DIGEST = ASKED.image.rpartition("@")[2]
Change = Callable[[dict[str, Any]], object]


def admitted(change: Change, image: str = DIGEST) -> Pod:
    found: dict[str, Any] = manifests.job(SPEC, ASKED)["spec"]["template"]["spec"]
    change(found)
    statuses = [{"name": "builder", "imageID": f"registry.example.com/runner/buildah@{image}"}]
    return Pod.model_validate({"spec": found, "status": {"containerStatuses": statuses}})


def volume(**source: object) -> Change:
    return lambda spec: spec["volumes"].append({"name": "aws-iam-token", **source})


def test_a_pod_that_was_left_alone_is_as_asked_for() -> None:
    # The API server adds defaults, and the scheduler a node.
    def as_the_api_does(spec: dict[str, Any]) -> None:
        spec |= {"nodeName": "n", "serviceAccountName": "default", "schedulerName": "s"}
        spec["containers"][0]["terminationMessagePath"] = "/dev/termination-log"

    assert list(changed(admitted(as_the_api_does), ASKED)) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda spec: spec.update(runtimeClassName="runc"), "its RuntimeClass is 'runc'"),
        (lambda spec: spec.pop("runtimeClassName"), "its RuntimeClass is ''"),
        (lambda spec: spec.update(hostNetwork=True), "shares namespaces"),
        (lambda spec: spec.update(hostPID=True), "shares namespaces"),
        (lambda spec: spec.update(hostIPC=True), "shares namespaces"),
        (lambda spec: spec["containers"].append({"name": "proxy"}), "builder, proxy"),
        (lambda spec: spec.update(initContainers=[{"name": "first"}]), "builder, first"),
        (lambda spec: spec.update(ephemeralContainers=[{"name": "late"}]), "builder, late"),
        (volume(projected={"sources": [{"serviceAccountToken": {}}]}), "'aws-iam-token'"),
        (volume(hostPath={"path": "/"}), "'aws-iam-token'"),
        (volume(secret={"secretName": "registry-login"}), "'aws-iam-token'"),
    ],
)
def test_one_change_is_enough(change: Change, says: str) -> None:
    first, *_ = changed(admitted(change), ASKED)
    assert says in first


def test_another_image_is_a_change() -> None:
    other = admitted(lambda _: None, image=f"sha256:{'b' * 64}")
    assert [each[:12] for each in changed(other, ASKED)] == ["its image is"]

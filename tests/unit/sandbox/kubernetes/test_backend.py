"""The kubernetes backend: what it offers, and what it takes for the pod that it asked for."""

import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.model import Isolation
from sandbox import doors
from sandbox.errors import (
    ClusterUnreachable,
    IsolationMismatch,
    IsolationUnavailable,
    RuntimeUnknown,
    SandboxFailed,
)
from sandbox.kubernetes import backend as kubernetes
from sandbox.kubernetes import manifests
from sandbox.kubernetes.backend import Classes, KubernetesBackend, Reach, changed
from sandbox.kubernetes.manifests import Pool
from sandbox.kubernetes.objects import Pod, PodSpec
from sandbox.model import Provided
from tests.support import golden
from tests.support.cluster import Answer, Asked, Fault, Recording, kubeconfig
from tests.support.pods import GATEWAY, Stand, standing

TEMPLATE = manifests.job(*golden.CASES["gvisor"])["spec"]["template"]["spec"]
ASKED = PodSpec.model_validate(TEMPLATE)
BUILDER = TEMPLATE["containers"][0]
CLASSES = Classes()


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    with standing("succeeds", tmp_path) as found:
        yield found


def admitted(**spec: Any) -> PodSpec:
    """The pod that was asked for, but for some of its specification."""
    return PodSpec.model_validate({**TEMPLATE, **spec})


# -- the pod that was asked for --------------------------------------------------------------------


def test_the_pod_that_was_asked_for_is_taken() -> None:
    assert list(changed(admitted(), ASKED)) == []


@pytest.mark.parametrize("name", ["succeeds", "fails", "out-of-memory"])
def test_what_a_real_cluster_makes_of_a_pod_is_taken(name: str) -> None:
    recording = Recording.read(name)
    last = Pod.model_validate(recording.pods[-1])
    assert list(changed(last.spec, PodSpec.model_validate(recording.pod_spec))) == []


SIDECAR = {"name": "istio-proxy"}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"containers": [BUILDER, SIDECAR]}, "its containers are builder, istio-proxy"),
        ({"containers": [{**BUILDER, "name": "istio-proxy"}]}, "its containers are istio-proxy"),
        ({"containers": []}, "its containers are "),
        ({"initContainers": [SIDECAR]}, "its containers are builder, istio-proxy"),
        ({"ephemeralContainers": [{"name": "debugger"}]}, "its containers are builder, debugger"),
        ({"containers": [BUILDER, {"name": "x" * 500}]}, "its containers are builder"),
        ({"runtimeClassName": "runc"}, "its RuntimeClass is 'runc'"),
        ({"runtimeClassName": None}, "its RuntimeClass is ''"),
        ({"hostNetwork": True}, "it shares namespaces with its node"),
        ({"hostPID": True}, "it shares namespaces with its node"),
        ({"hostIPC": True}, "it shares namespaces with its node"),
    ],
)
def test_another_pod_is_seen(spec: dict[str, Any], words: str) -> None:
    fault, *_ = changed(admitted(**spec), ASKED)
    assert fault.startswith(words)
    assert len(fault) < 250


def test_another_image_is_seen(stand: Stand) -> None:
    def exchanged(lines: Iterator[bytes]) -> Iterator[bytes]:
        for each in lines:
            yield re.sub(rb'("imageID": *"[^"]*sha256:)[0-9a-f]{8}', rb"\g<1>00000000", each)

    stand.cluster.faults.append(Fault(lambda asked: asked.is_watch, stream=exchanged, times=99))
    with pytest.raises(IsolationMismatch, match="made a pod of image"):
        stand.build()
    assert stand.first.files == {}
    assert stand.left() == []


def test_a_pod_that_a_webhook_changed_is_not_given_anything(stand: Stand) -> None:
    def crowded(lines: Iterator[bytes]) -> Iterator[bytes]:
        for each in lines:
            yield each.replace(b'"containers": [{', b'"containers": [{"name": "spy"}, {')

    stand.cluster.faults.append(Fault(lambda asked: asked.is_watch, stream=crowded, times=99))
    with pytest.raises(IsolationMismatch, match=r"made another pod: its containers are .*spy"):
        stand.build()
    assert stand.first.files == {}
    assert stand.left() == []


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ({"log": "<6>[    0.000000] Linux version 6.1\n"}, "not gVisor's"),
        ({"release": "6.1.0-1-amd64"}, "the kernel is the host's"),
        ({"boot_id": "00000000-0000-4000-8000-000000000001\n"}, "the kernel is the host's"),
        ({"ids": "7:7"}, "runs as uid 7"),
        ({"net_dev": "  lo: 0\n  eth0: 0\n  eth1: 0\n"}, "eth1"),
        ({"reached": f"{kubernetes.METADATA}\n"}, "it must not|the sandbox reaches"),
    ],
)
def test_a_sandbox_that_is_another_is_not_given_anything(
    stand: Stand, shown: dict[str, str], words: str
) -> None:
    stand.first.shown |= shown
    with pytest.raises(IsolationMismatch, match=words):
        stand.build()
    assert stand.first.files == {}
    assert stand.left() == []


def test_a_sandbox_tries_what_it_must_not_reach(stand: Stand) -> None:
    stand.build()
    plan = stand.first.secret().plan
    assert kubernetes.METADATA in plan
    assert any(each.endswith(":443") and each.startswith("192.0.2.") for each in plan)
    assert f"tls:{GATEWAY}/host" in plan


def test_a_node_that_is_gone_vouches_for_nothing(stand: Stand) -> None:
    gone = Answer(404, {"reason": "NotFound"})
    stand.cluster.faults.append(Fault(lambda asked: "/nodes/" in asked.what, gone))
    with pytest.raises(SandboxFailed, match="node is gone"):
        stand.build()


# -- what is offered -------------------------------------------------------------------------------


def test_what_the_cluster_has_is_offered(stand: Stand) -> None:
    offer = stand.backend.offer()
    assert offer.isolations == {Isolation.GVISOR}
    assert offer.rootless is False
    assert stand.backend.provides(Isolation.GVISOR) is Provided.PULLED


def test_a_class_that_the_cluster_has_not_is_told(stand: Stand) -> None:
    gone = Answer(404, {"reason": "NotFound"})
    stand.cluster.faults.append(Fault(lambda asked: "runtimeclasses" in asked.what, gone, times=9))
    error = stand.backend.offer().refused[Isolation.GVISOR]
    assert isinstance(error, RuntimeUnknown)
    assert "'gvisor'" in error.message


def test_no_class_at_all_is_for_what_policy_trusts_alone(tmp_path: Path) -> None:
    backend = unreached(tmp_path, GATEWAY, Classes(gvisor="", kata=""))
    with backend.connect() as cluster:  # which nobody asks
        assert backend.handler(cluster, Isolation.CONTAINER) == ""
        for isolation in (Isolation.GVISOR, Isolation.KATA):
            with pytest.raises(RuntimeUnknown, match=f"configured for {isolation}"):
                backend.handler(cluster, isolation)


def test_a_cluster_that_does_not_answer_offers_nothing(stand: Stand) -> None:
    stand.cluster.goes_down()
    offer = stand.backend.offer()
    assert offer.isolations == frozenset()
    assert isinstance(offer.refused[Isolation.GVISOR], ClusterUnreachable)


def unreached(
    directory: Path, gateway: str | None, classes: Classes = CLASSES
) -> KubernetesBackend:
    reach = Reach(
        kubeconfig=kubeconfig(directory, "http://127.0.0.1:1"),
        context=None,
        gateway=gateway,
        state=directory / "gateway",
    )
    return KubernetesBackend(
        directory / "sandboxes", reach=reach, classes=classes, pool=Pool(), probe_image=str
    )


@pytest.mark.parametrize(
    ("gateway", "words"), [(None, "where pods find the gateway"), (GATEWAY, "was never started")]
)
def test_without_a_port_for_pods_nothing_is_offered_and_nobody_is_asked(
    tmp_path: Path, gateway: str | None, words: str
) -> None:
    refused = unreached(tmp_path, gateway).offer().refused
    assert all(words in refused[each].message for each in Isolation)


def test_where_nobody_builds_in_a_cluster_nothing_is_swept(tmp_path: Path) -> None:
    assert list(unreached(tmp_path, None).sweep(())) == []


def test_a_sweep_without_the_cluster_is_no_error(tmp_path: Path) -> None:
    assert list(unreached(tmp_path, GATEWAY).sweep(())) == []


def test_a_place_that_no_cluster_was_told_of_is_cleaned_without_one(tmp_path: Path) -> None:
    place = tmp_path / "sandboxes" / "b"
    place.mkdir(parents=True)
    unreached(tmp_path, GATEWAY).clean(place)
    assert not place.exists()


def test_what_a_cluster_cannot_show_is_not_promised(stand: Stand) -> None:
    place = stand.backend.reserve(stand.name)
    with pytest.raises(IsolationUnavailable, match="rootless"):
        stand.backend.launch(place, replace(stand.spec, rootless=True), stand.log.extend)
    with pytest.raises(SandboxFailed, match="in no registry"):
        stand.backend.launch(place, replace(stand.spec, image=""), stand.log.extend)
    place.release()
    assert not stand.cluster.saw(f"POST {stand.jobs}")


def test_no_socket_is_left_of_a_launch_that_fails(stand: Stand) -> None:
    def refused(asked: Asked) -> bool:
        return asked.what.startswith("POST")

    stand.cluster.faults.append(Fault(refused, Answer(422, b"no"), times=9))
    place = stand.backend.reserve(stand.name)
    with pytest.raises(IsolationUnavailable):
        stand.backend.launch(place, stand.spec, stand.log.extend, lambda _: None)
    for name in ("host", "outlet"):
        with pytest.raises(OSError, match=r"refused|No such"):
            doors.connect(stand.first.doors, doors.hidden(place.key.secret), name)
    place.release()


def test_a_door_is_opened_by_its_key_alone(stand: Stand) -> None:
    place = stand.backend.reserve(stand.name)
    directory = stand.directory / "gateway" / "doors"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.door / "gateway.sock"))
        listener.listen()
        doors.connect(directory, doors.hidden(place.key.secret), "gateway").close()
        for wrong in ("", "x", place.key.secret[:-1], place.key.secret.upper() + "A"):
            with pytest.raises(OSError, match="No such"):
                doors.connect(directory, doors.hidden(wrong), "gateway")
        place.key.revoke()
        place.key.revoke()
        with pytest.raises(OSError, match="No such"):
            doors.connect(directory, doors.hidden(place.key.secret), "gateway")
    place.release()

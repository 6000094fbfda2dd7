"""What is read of a cluster's objects."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from sandbox.kubernetes import objects
from sandbox.kubernetes.objects import (
    ContainerStatus,
    Event,
    Node,
    Part,
    Pod,
    Pods,
    Service,
    Status,
)
from tests.support.cluster import RECORDINGS, Recording

PARTS = [each for each in vars(objects).values()
         if isinstance(each, type) and issubclass(each, Part) and each is not Part]  # fmt: skip


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"containerStatuses": [{"imageID": "r@sha256:0"}]}, "r@sha256:0"),
        ({"containerStatuses": [{"imageId": "r@sha256:0"}]}, ""),
    ],
)
def test_members_go_by_the_names_that_the_api_gives_them(
    document: dict[str, Any], expected: str
) -> None:
    assert Pod.model_validate({"status": document}).builder.image_id == expected


@pytest.mark.parametrize("name", ["hostPID", "hostIPC", "hostNetwork"])
def test_what_a_pod_shares_with_its_node_is_seen(name: str) -> None:
    spec = Pod.model_validate({"spec": {name: True}}).spec
    assert [spec.host_network, spec.host_pid, spec.host_ipc].count(True) == 1


def test_addresses_and_boots_are_seen() -> None:
    assert Service.model_validate({"spec": {"clusterIP": "192.0.2.1"}}).spec.cluster_ip
    info = {"nodeInfo": {"bootID": "b", "kernelVersion": "k", "containerRuntimeVersion": "c"}}
    node = Node.model_validate({"status": info}).status.node_info
    assert (node.boot_id, node.kernel_version, node.container_runtime_version) == ("b", "k", "c")


def members(kind: type[BaseModel]) -> list[str]:
    return [str(each.validation_alias or each.alias) for each in kind.model_fields.values()]


@pytest.mark.parametrize("kind", PARTS, ids=lambda it: it.__name__)
def test_a_null_is_what_is_not_there(kind: type[Part]) -> None:
    assert kind.model_validate(dict.fromkeys(members(kind))) == kind.model_validate({})


def test_a_bookmark_is_a_pod() -> None:
    """As API servers send it each minute: of the specification of a pod that is none."""
    document = {"metadata": {"resourceVersion": "7"}, "spec": {"containers": None}, "status": {}}
    assert Pod.model_validate(document).metadata.resource_version == "7"


def test_a_list_without_items_is_an_empty_one() -> None:
    document = b'{"metadata":{"resourceVersion":"1"},"items":null}'
    assert Pods.model_validate_json(document).items == ()


def test_a_container_that_runs_since_nobody_knows_when_is_read() -> None:
    state = {"running": {"startedAt": None}}
    assert ContainerStatus.model_validate({"state": state}).state.waiting is None


@pytest.mark.parametrize("wrong", [[], "pod", 7, {"metadata": []}, {"status": {"phase": {}}}])
def test_what_is_no_pod_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Pod.model_validate(wrong)


@given(st.text(max_size=3000))
def test_texts_are_short_and_in_one_line_whatever_they_are(text: str) -> None:
    event = Event.model_validate({"message": text, "reason": text})
    for found in (event.message, event.reason):
        assert len(found) <= 1000
        assert found.splitlines() in ([], [found])


def test_a_huge_text_is_cut() -> None:
    assert len(Status.model_validate({"message": "x" * (1 << 20)}).message) == 1000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["metadata", "status", "spec", "name", "containerStatuses", "state"]),
            inner,
        )
    ),
    max_leaves=8,
)


@given(JSON)
def test_whatever_is_sent_is_a_pod_or_refused(document: object) -> None:
    data = json.dumps(document).encode()
    try:
        pod = Pod.model_validate_json(data)
    except ValueError:
        return
    assert isinstance(pod.builder, ContainerStatus)
    assert pod.condition("Ready") is None or pod.status.conditions


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDINGS.glob("*.json")))
def test_every_pod_that_was_recorded_is_read(name: str) -> None:
    for document in Recording.read(name).pods:
        pod = Pod.model_validate(document)
        assert pod.metadata.resource_version
        assert pod.status.phase or not pod.metadata.name

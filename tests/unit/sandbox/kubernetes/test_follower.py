"""What is known of a pod, whatever its watch is told in between."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.kubernetes.cluster import Cluster
from sandbox.kubernetes.follower import Follower
from tests.support.cluster import (
    NAMESPACE,
    Answer,
    Fault,
    PlayedCluster,
    Recording,
    kubeconfig,
    line,
    status_of,
)

BOOKMARK = {"metadata": {"resourceVersion": "1"}, "spec": {"containers": None}, "status": {}}


@pytest.fixture
def played() -> Iterator[PlayedCluster]:
    """A pod that somebody deletes, as soon as it is looked at."""
    recording = Recording.read("pod-deleted")
    cluster = PlayedCluster(recording)
    for step in recording.steps:
        if step.cause:
            cluster.happens(step.cause)
    with cluster.playing():
        yield cluster


def following(cluster: Cluster, played: PlayedCluster) -> Follower:
    (owner,) = played.recording.pods[0]["metadata"]["ownerReferences"]
    return Follower(cluster, NAMESPACE, {"a": "b"}, owner=owner["uid"])


@pytest.fixture
def follower(played: PlayedCluster, tmp_path: Path) -> Iterator[Follower]:
    with Cluster.connect(kubeconfig(tmp_path, played.url), None) as cluster:
        follower = following(cluster, played)
        yield follower
        follower.close()
        follower.close()
        follower._thread.join(5)
        assert not follower._thread.is_alive()


def is_gone(follower: Follower) -> bool:
    return follower.gone


def test_a_pod_that_was_there_and_is_not_is_gone(played: PlayedCluster, follower: Follower) -> None:
    assert follower.wait(is_gone, 5)
    assert follower.pod is not None
    assert follower.pod.metadata.name.startswith("ur-pod-deleted-")
    assert follower.unheard_seconds == 0.0
    assert played.asked[0].query == {"labelSelector": "a=b"}


def test_a_pod_that_is_gone_when_everything_is_looked_at_anew_is_gone(
    played: PlayedCluster, follower: Follower
) -> None:
    def forgets_at_the_end(lines: Iterator[bytes]) -> Iterator[bytes]:
        for each in lines:
            if b'"DELETED"' in each:
                yield line("ERROR", status_of(410, "Expired"))
                return
            yield each

    played.faults.append(Fault(lambda asked: asked.is_watch, stream=forgets_at_the_end, times=99))
    assert follower.wait(is_gone, 5)


def test_a_bookmark_is_no_pod(played: PlayedCluster, tmp_path: Path) -> None:
    def with_a_bookmark(lines: Iterator[bytes]) -> Iterator[bytes]:
        yield line("BOOKMARK", BOOKMARK)
        yield line("BOOKMARK", BOOKMARK)

    nothing = Answer(200, {"metadata": {"resourceVersion": "1"}, "items": []})
    played.faults += [
        Fault(lambda asked: asked.is_watch, stream=with_a_bookmark, times=3),
        Fault(lambda asked: not asked.is_watch, nothing),
    ]
    with Cluster.connect(kubeconfig(tmp_path, played.url), None) as cluster:
        follower = following(cluster, played)
        assert follower.wait(is_gone, 5)
        assert follower.pod is not None
        assert follower.pod.metadata.name
        follower.close()


def test_a_pod_of_nobodys_or_of_another_job_is_not_ours(
    played: PlayedCluster, tmp_path: Path
) -> None:
    metadata = {"uid": "u", "name": "other", "resourceVersion": "1"}
    others = [
        {"metadata": metadata, "status": {"phase": "Failed"}},
        {"metadata": {**metadata, "ownerReferences": [{"kind": "Job", "uid": "another"}]}},
    ]
    listed = Answer(200, {"metadata": {"resourceVersion": "1"}, "items": others})
    played.faults.append(Fault(lambda asked: not asked.is_watch, listed))
    with Cluster.connect(kubeconfig(tmp_path, played.url), None) as cluster:
        follower = following(cluster, played)
        assert follower.wait(lambda it: it.pod is not None, 5)
        assert follower.pod is not None
        assert follower.pod.metadata.name != "other"
        follower.close()


def test_a_version_that_is_forgotten_is_not_asked_for_again(
    played: PlayedCluster, tmp_path: Path
) -> None:
    old = Answer(200, {"metadata": {"resourceVersion": "1"}, "items": []})
    expired = Answer(410, status_of(410, "Expired"))
    played.faults += [
        Fault(lambda asked: not asked.is_watch, old),
        Fault(lambda it: it.query.get("resourceVersion") == "1", expired, times=999),
    ]
    with Cluster.connect(kubeconfig(tmp_path, played.url), None) as cluster:
        follower = following(cluster, played)
        assert follower.wait(lambda it: it.pod is not None, 5)
        follower.close()


def test_who_does_not_hear_says_since_when(played: PlayedCluster, follower: Follower) -> None:
    assert follower.wait(is_gone, 5)
    played.goes_down()
    end = time.monotonic() + 5
    while not follower.unheard_seconds:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_nobody_waits_for_a_follower_that_is_closed(follower: Follower) -> None:
    follower.close()
    assert follower.wait(lambda _: False, 5)

"""What becomes of sandboxes in a real cluster, as it was recorded. See ``tests.record_cluster``."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.errors import (
    AdmissionRefused,
    ClusterQuotaExceeded,
    Evicted,
    ImagePullFailed,
    IsolationError,
    PodDeleted,
    Preempted,
    RuntimeUnknown,
    Unschedulable,
)
from sandbox.kubernetes import conversation
from sandbox.model import ClusterView, Ending, Sandbox
from tests.support.cluster import NODE, RECORDINGS
from tests.support.pods import Stand, standing

ENDINGS = {
    "succeeds": (Ending.EXITED, 0),
    "fails": (Ending.EXITED, 7),
    "out-of-memory": (Ending.MEMORY, None),
    "volume-over-its-limit": (Ending.DISK, None),
    "deadline": (Ending.TIME, None),
}
ERRORS: dict[str, tuple[type[IsolationError], str]] = {
    "too-much-cpu": (Unschedulable, "Insufficient cpu"),
    "no-such-node": (Unschedulable, "node affinity/selector"),
    "no-handler": (RuntimeUnknown, 'no runtime for "nobody-has-this" is configured'),
    "class-goes-away": (RuntimeUnknown, "RuntimeClass"),
    "quota": (ClusterQuotaExceeded, "exceeded quota: builds"),
    "no-image": (ImagePullFailed, "ImagePullBackOff"),
    "pod-security": (AdmissionRefused, 'violates PodSecurity "restricted'),
    "policy": (AdmissionRefused, "denied request: no pods today"),
    "pod-deleted": (PodDeleted, "somebody deleted pod ur-pod-deleted-"),
    "pod-deleted-by-force": (PodDeleted, f"on node {NODE}"),
    "job-deleted": (PodDeleted, "somebody deleted"),
    "drained": (Evicted, "Eviction API"),
    "preempted": (Preempted, "higher priority pod"),
}


@pytest.fixture
def stand(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stand]:
    with standing(request.param, tmp_path) as found:
        if found.cluster.recording.said.startswith("unschedulable"):
            found.pending_seconds = 1
        yield found


def test_every_recording_is_played() -> None:
    recorded = {path.stem for path in RECORDINGS.glob("*.json")}
    assert recorded == ENDINGS.keys() | ERRORS.keys()


@pytest.mark.parametrize(("stand", "name"), [(each, each) for each in ENDINGS], indirect=["stand"])
def test_a_build_ends_as_the_cluster_says(stand: Stand, name: str) -> None:
    ending, status = ENDINGS[name]
    outcome = stand.build()
    assert outcome.ending is ending
    if status is not None:
        assert outcome.status == status
    assert stand.log.startswith(b"hello\n")
    assert stand.left() == []


@pytest.mark.parametrize(("stand", "name"), [(each, each) for each in ERRORS], indirect=["stand"])
def test_what_goes_wrong_is_an_error_of_its_own_and_leaves_nothing(stand: Stand, name: str) -> None:
    kind, words = ERRORS[name]
    with pytest.raises(kind, match=re.escape(words)) as raised:
        stand.build()
    assert raised.type is kind
    assert stand.left() == []


@pytest.mark.parametrize("stand", ["succeeds"], indirect=True)
def test_evidence_has_the_clusters_view(stand: Stand) -> None:
    seen = stand.build().evidence
    assert isinstance(seen.outside, ClusterView)
    assert (seen.outside.node, seen.outside.handler) == (NODE, "runsc")
    assert seen.outside.runtime_class == "gvisor"
    assert seen.outside.image == stand.spec.image
    assert seen.runtime_version.startswith("containerd://")
    assert seen.interfaces == ("lo", "eth0")


@pytest.mark.parametrize("stand", ["succeeds"], indirect=True)
def test_files_come_by_the_door_and_nothing_untrusted_by_the_api(stand: Stand) -> None:
    stand.build()
    assert stand.first.files == {"config/greeting": b"hello\n"}
    assert not any(b"hello" in repr(each.body).encode() for each in stand.cluster.asked)


@pytest.mark.parametrize("stand", ["succeeds"], indirect=True)
def test_inputs_come_by_the_door_too(stand: Stand, tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.write_bytes(b"tar")
    stand.inputs = {"context.tar": context}
    stand.build()
    assert stand.first.files["door/context.tar"] == b"tar"


@pytest.mark.parametrize("stand", ["succeeds"], indirect=True)
def test_a_pod_that_is_over_is_removed_and_not_waited_for(stand: Stand) -> None:
    stand.build()
    # Once when it was made.
    assert len(stand.cluster.saw(f"GET {stand.jobs}/{stand.title}")) == 1


@pytest.mark.parametrize("stand", ["volume-over-its-limit"], indirect=True)
def test_of_a_pod_that_is_over_nobody_is_waited_for(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "PATIENCE_SECONDS", 30.0)
    began = time.monotonic()
    stand.build()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("stand", ["volume-over-its-limit"], indirect=True)
def test_a_build_that_is_cancelled_ends_at_once(stand: Stand) -> None:
    def cancel(sandbox: Sandbox) -> None:
        sandbox.cancel()
        assert stand.cluster.saw(f"DELETE {stand.jobs}/{stand.title}")

    stand.during = cancel
    assert stand.build().ending is Ending.CANCELLED
    assert stand.left() == []

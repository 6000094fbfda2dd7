"""A real cluster's recorded answers, with faults in between: none may end a build that goes on."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox import diagnostics
from sandbox.errors import (
    ClusterForbidden,
    ClusterUnreachable,
    Evicted,
    PodDeleted,
    SandboxFailed,
    SandboxLost,
    TimeInQueue,
    Unschedulable,
)
from sandbox.kubernetes import cluster as api
from sandbox.kubernetes import machine
from sandbox.kubernetes import place as places
from sandbox.model import Ending, Sandbox
from tests.support.cluster import (
    NAMESPACE,
    RELEASED,
    SAID,
    Answer,
    Asked,
    Fault,
    HangUp,
    Stream,
    line,
    status_of,
)
from tests.support.pods import Stand, standing

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
FORBIDDEN = 'pods is forbidden: User "u" cannot list resource "pods"'


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    with standing("succeeds", tmp_path) as found:
        yield found


def watches(asked: Asked) -> bool:
    return asked.is_watch


def lists(asked: Asked) -> bool:
    return asked.what == f"GET {PODS}" and not asked.is_watch


def anything(asked: Asked) -> bool:
    return not asked.is_watch


def of(what: str) -> Callable[[Asked], bool]:
    return lambda asked: asked.what.startswith(what) and not asked.is_watch


def succeeds(stand: Stand) -> None:
    outcome = stand.build()
    assert (outcome.ending, outcome.status) == (Ending.EXITED, 0)
    assert bytes(stand.log).rstrip() == b"hello\ndone"
    assert stand.left() == []


# -- what becomes of a watch's lines ---------------------------------------------------------------


def ends_at_once(lines: Iterator[bytes]) -> Iterator[bytes]:
    return iter(())


def ends_after_one(lines: Iterator[bytes]) -> Iterator[bytes]:
    yield next(lines)


def breaks_in_a_line(lines: Iterator[bytes]) -> Iterator[bytes]:
    first = next(lines)
    yield first[: len(first) // 2]
    raise HangUp


def breaks_in_a_list_of_lines(lines: Iterator[bytes]) -> Iterator[bytes]:
    yield next(lines)
    second = next(lines)
    yield second[:1]
    raise HangUp


def drips(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Some bytes at a time, cut anywhere."""
    for each in lines:
        for start in range(0, len(each), 997):
            yield each[start : start + 997]
            time.sleep(0.001)


def in_one_piece(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Each line twice, and half of it alone."""
    for each in lines:
        yield each + each + each[: len(each) // 2]
        yield each[len(each) // 2 :]


def forgets(lines: Iterator[bytes]) -> Iterator[bytes]:
    yield next(lines)
    yield line("ERROR", status_of(410, "Expired", "too old resource version"))


def forbids(lines: Iterator[bytes]) -> Iterator[bytes]:
    yield line("ERROR", status_of(403, "Forbidden", FORBIDDEN))


def says_nonsense(lines: Iterator[bytes]) -> Iterator[bytes]:
    yield b'{"type": "MODIFIED"}\n'


def says_no_json(lines: Iterator[bytes]) -> Iterator[bytes]:
    yield b"<html>\n"


def says_no_pod(lines: Iterator[bytes]) -> Iterator[bytes]:
    yield b'{"type": "MODIFIED", "object": {"metadata": []}}\n'


def goes_on_and_on(lines: Iterator[bytes]) -> Iterator[bytes]:
    while True:
        yield b"x" * (1 << 20)


def tells_of_another_pod(lines: Iterator[bytes]) -> Iterator[bytes]:
    """That was there before, or is made after: of the same labels, and not ours."""
    first = next(lines)
    yield first
    other = {
        "metadata": {"uid": "other", "name": "other", "resourceVersion": "9999"},
        "status": {"phase": "Failed", "reason": "Evicted"},
    }
    yield line("ADDED", other)
    yield line("DELETED", other)
    yield from lines


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize(
    "stream",
    [
        ends_at_once,
        ends_after_one,
        breaks_in_a_line,
        breaks_in_a_list_of_lines,
        drips,
        in_one_piece,
        forgets,
        forbids,
        says_nonsense,
        says_no_json,
        says_no_pod,
        goes_on_and_on,
        tells_of_another_pod,
    ],
    ids=lambda it: it.__name__,
)
def test_a_build_succeeds_whatever_becomes_of_its_watch(
    stand: Stand, stream: Stream, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "LINE_BYTES", 64 << 10)
    stand.cluster.faults.append(Fault(watches, stream=stream, times=times))
    succeeds(stand)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(410, status_of(410, "Expired")),
        Answer(429, status_of(429, "TooManyRequests"), {"Retry-After": "1"}),
        Answer(500, status_of(500, "InternalError")),
        Answer(503, b"no upstream"),
        Answer(401, status_of(401, "Unauthorized")),
        Answer(403, status_of(403, "Forbidden", FORBIDDEN)),
        Answer(200, b"", length=10),
        None,
    ],
    ids=["410", "429", "500", "503", "401", "403", "half", "reset"],
)
def test_a_build_succeeds_where_a_watch_does_not_begin_at_first(
    stand: Stand, answer: Answer | None
) -> None:
    stand.cluster.faults.append(Fault(watches, answer, times=3))
    succeeds(stand)


# -- what becomes of other requests ----------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        Answer(429, status_of(429, "TooManyRequests"), {"Retry-After": "1"}),
        Answer(500, status_of(500, "InternalError")),
        Answer(504, b"<html>"),
        Answer(200, b'{"half":', length=100),
        None,
    ],
    ids=["429", "500", "504", "half", "reset"],
)
@pytest.mark.parametrize(
    "what",
    ["GET /apis/node.k8s.io", "POST /apis/batch", "GET /apis/batch", "POST /api/v1", f"GET {PODS}",
     "GET /api/v1/nodes", "DELETE /apis/batch", "DELETE /api/v1"],
)  # fmt: skip
def test_a_request_that_fails_twice_is_made_again(
    stand: Stand, what: str, answer: Answer | None
) -> None:
    stand.cluster.faults.append(Fault(of(what), answer, times=2))
    succeeds(stand)


@pytest.mark.parametrize("what", ["POST /apis/batch", "POST /api/v1"])
def test_an_object_that_was_made_without_a_word_is_taken_for_ours(stand: Stand, what: str) -> None:
    """The first answer was lost, and the second says that it is there."""
    made = threading.Event()

    def lost(asked: Asked) -> bool:
        if asked.what.startswith(what) and not made.is_set():
            stand.cluster.answer(asked)
            made.set()
            return True
        return False

    exists = Answer(409, status_of(409, "AlreadyExists"))
    stand.cluster.faults += [Fault(lost), Fault(of(what), exists)]
    succeeds(stand)


def test_a_conflict_that_is_none_of_ours_ends_it(stand: Stand) -> None:
    conflict = Answer(409, status_of(409, "Conflict", "namespace is being terminated"))
    stand.cluster.faults.append(Fault(of("POST /apis/batch"), conflict))
    with pytest.raises(ClusterUnreachable, match="being terminated"):
        stand.build()
    assert stand.left() == []


def test_an_answer_over_the_bound_is_not_read(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "ANSWER_BYTES", 1000)
    big = Answer(200, {"x": "y" * 2000})
    stand.cluster.faults.append(Fault(of("GET /apis/node"), big))
    with pytest.raises(SandboxFailed, match="answered more than 1000 bytes"):
        stand.build()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"metadata": 7}', b"\xff\xfe"])
def test_a_list_that_is_none_is_asked_for_again(stand: Stand, body: bytes) -> None:
    stand.cluster.faults.append(Fault(lists, Answer(200, body), times=2))
    succeeds(stand)


def test_a_list_of_another_version_is_gone_on_from(stand: Stand) -> None:
    stand.cluster.faults += [
        Fault(watches, stream=forgets),
        Fault(lists, Answer(200, {"metadata": {"resourceVersion": "1"}, "items": []})),
    ]
    succeeds(stand)
    versions = [each.query["resourceVersion"] for each in stand.cluster.asked if each.is_watch]
    assert "1" in versions


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(401, status_of(401, "Unauthorized")), ClusterForbidden),
        (Answer(403, status_of(403, "Forbidden", FORBIDDEN)), ClusterForbidden),
        (Answer(500, status_of(500, "InternalError")), ClusterUnreachable),
        (None, ClusterUnreachable),
    ],
    ids=["401", "403", "500", "reset"],
)
def test_what_does_not_pass_is_told_and_leaves_nothing_that_can_be_removed(
    stand: Stand, answer: Answer | None, kind: type[Exception]
) -> None:
    stand.cluster.faults.append(Fault(of("POST /apis/batch"), answer, times=1000))
    with pytest.raises(kind):
        stand.build()
    assert not (stand.sandboxes / stand.name).exists()
    # A definite refusal made nothing; whoever did not answer may have.
    removes = [each.what for each in stand.cluster.asked if each.what.startswith("DELETE")]
    assert bool(removes) is (kind is ClusterUnreachable)


def test_who_ends_watches_at_once_is_not_asked_without_a_break(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.kubernetes.follower._AGAIN_SECONDS", (0.05, 0.1))
    stand.cluster.faults.append(Fault(watches, stream=ends_at_once, times=1000))
    stand.pending_seconds = 1
    with pytest.raises(SandboxFailed):
        stand.build()
    assert sum(each.is_watch for each in stand.cluster.asked) < 25


def test_a_watch_goes_on_from_what_it_told_when_it_broke(stand: Stand) -> None:
    stand.cluster.faults.append(Fault(watches, stream=breaks_in_a_list_of_lines))
    succeeds(stand)
    first, second, *_ = [
        int(each.query["resourceVersion"]) for each in stand.cluster.asked if each.is_watch
    ]
    assert second > first


# -- without the API -------------------------------------------------------------------------------


def test_a_build_that_nobody_heard_of_while_it_ran_succeeds_when_the_api_is_back(
    stand: Stand,
) -> None:
    def between(number: int) -> None:
        if number == 0:
            stand.cluster.goes_down()

    stand.first.between = between
    back = threading.Timer(0.6, stand.cluster.comes_back)
    stand.during = lambda _: back.start()
    succeeds(stand)
    back.join()


def test_an_api_that_is_gone_for_good_is_what_the_error_says(stand: Stand) -> None:
    place = stand.backend.reserve(stand.name)
    with stand.first.living():
        sandbox = stand.backend.launch(place, stand.spec, stand.log.extend)
        stand.cluster.goes_down()
        with pytest.raises(SandboxLost, match=r"API at \S+ does not answer"):
            sandbox.wait()
    with pytest.raises(ClusterUnreachable):
        place.release()
    # What is left is for gc.
    directory = stand.sandboxes / stand.name
    assert directory.is_dir()
    with pytest.raises(ClusterUnreachable):
        stand.backend.clean(directory)
    assert directory.is_dir()
    stand.cluster.comes_back()
    stand.backend.clean(directory)
    assert stand.left() == []


def test_a_build_is_not_left_by_whoever_cancels_it_without_the_api(stand: Stand) -> None:
    def cancel(sandbox: Sandbox) -> None:
        stand.cluster.goes_down()
        threading.Timer(0.2, stand.cluster.comes_back).start()
        sandbox.cancel()

    stand.during = cancel
    assert stand.build().ending is Ending.CANCELLED
    assert stand.left() == []


def test_a_cluster_that_makes_no_pod_is_waited_for_only_so_long(tmp_path: Path) -> None:
    with standing("quota", tmp_path) as stand:
        empty = Answer(200, {"items": []})
        stand.cluster.faults.append(Fault(of(f"GET {PODS[:-5]}/events"), empty, times=1000))
        stand.pending_seconds = 1
        with pytest.raises(TimeInQueue, match="made no pod in 1 s"):
            stand.build()
        assert stand.left() == []


def test_whoever_waits_may_end_it(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    heard: list[str] = []

    def waiting(words: str) -> None:
        heard.append(words)
        if "Insufficient cpu" in words:
            raise Enough

    with standing("too-much-cpu", tmp_path) as stand:
        with pytest.raises(Enough):
            stand.build(waiting)
        assert stand.left() == []
    assert heard[-1].startswith("a node: 0/1 nodes are available")


def test_a_job_that_stays_is_told_and_left_to_gc(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_GONE_SECONDS", 0.2)
    job = {"metadata": {"name": stand.title, "uid": "u"}}
    stays = Fault(of(f"GET {stand.jobs}/{stand.title}"), Answer(200, job), times=0)
    stand.cluster.faults.append(stays)
    place = stand.backend.reserve(stand.name)
    place.announce()
    stays.times = 1000
    with pytest.raises(SandboxFailed, match="does not remove job ur-succeeds"):
        place.release()
    assert (stand.sandboxes / stand.name).is_dir()
    stays.times = 0
    stand.backend.clean(stand.sandboxes / stand.name)
    assert stand.left() == []


def test_no_key_or_plan_is_said_to_whoever_diagnoses(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(diagnostics, "_listeners", [lambda *words: said.append(repr(words))])
    succeeds(stand)
    key = stand.first.secret().key
    assert said
    assert not any(key in words for words in said)


def test_a_pod_whose_image_shows_too_late_is_not_taken(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_SHOW_SECONDS", 0.1)

    def blind(lines: Iterator[bytes]) -> Iterator[bytes]:
        for each in lines:
            yield each.replace(b'"imageID"', b'"image-id"')

    stand.cluster.faults.append(Fault(watches, stream=blind, times=1000))
    with pytest.raises(SandboxFailed, match="does not show its pod running"):
        stand.build()
    assert stand.left() == []


# -- before its first process speaks ---------------------------------------------------------------


def launches_alone(stand: Stand) -> None:
    """Without a first process, whatever the recording waits for of it."""
    stand.cluster.happens(RELEASED)
    stand.cluster.happens(SAID)
    place = stand.backend.reserve(stand.name)
    try:
        stand.backend.launch(place, stand.spec, stand.log.extend)
    finally:
        place.release()


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("fails", SandboxFailed, "had not come to the gateway's port"),
        ("drained", Evicted, "Eviction API"),
        ("pod-deleted", PodDeleted, "somebody deleted"),
    ],
)
def test_a_pod_that_ends_before_it_speaks_is_told_by_how_it_ended(
    tmp_path: Path, name: str, kind: type[Exception], words: str
) -> None:
    with standing(name, tmp_path) as stand:
        with pytest.raises(kind, match=words):
            launches_alone(stand)
        assert stand.left() == []


def test_a_job_that_is_gone_a_moment_after_it_was_made_is_told(stand: Stand) -> None:
    gone = Answer(404, status_of(404, "NotFound"))
    stand.cluster.faults.append(Fault(of(f"GET {stand.jobs}"), gone))
    with pytest.raises(SandboxFailed, match="job ur-succeeds is gone"):
        stand.build()
    assert stand.left() == []


def test_without_events_a_pod_itself_tells_what_it_waits_for(tmp_path: Path) -> None:
    with standing("too-much-cpu", tmp_path) as stand:
        stand.cluster.faults.append(Fault(lambda it: it.what.endswith("/events"), times=1000))
        stand.pending_seconds = 1
        with pytest.raises(Unschedulable, match="Insufficient cpu"):
            stand.build()


def test_a_sandbox_that_cannot_be_ended_now_is_ended_by_its_release(stand: Stand) -> None:
    """Who cancels is not told that the API does not answer: who releases is, and then gc."""

    def cancel(sandbox: Sandbox) -> None:
        stand.cluster.goes_down()
        sandbox.cancel()
        stand.cluster.comes_back()

    stand.during = cancel
    assert stand.build().ending is Ending.CANCELLED
    assert stand.left() == []


def test_each_limit_says_who_keeps_it(stand: Stand) -> None:
    enforced = stand.build().enforced
    assert enforced["memory_bytes"] == "cgroup of the kubelet"
    assert enforced["pids"].startswith("not enforced")
    assert {"cpu_millis", "disk_bytes", "wall_seconds", "log_bytes"} <= enforced.keys()

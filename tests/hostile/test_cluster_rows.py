"""Attacks on the kubernetes backend that need no cluster, by their row in the list of threats.

Beside each test stands the line whose removal makes it fail.
"""

import copy
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sandbox import sockets
from sandbox.errors import ClusterUnreachable, IsolationMismatch, SandboxFailed
from sandbox.kubernetes import cluster as api
from sandbox.kubernetes.cluster import Cluster
from sandbox.kubernetes.conversation import Conversation
from sandbox.kubernetes.files import Files
from sandbox.kubernetes.objects import Pods
from sandbox.model import Ending
from tests.support.cluster import NAMESPACE, Asked, Fault, kubeconfig, line
from tests.support.pods import Stand, standing

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    # The played pod ends with what its first process says, which is not heard out here.
    monkeypatch.setattr("sandbox.kubernetes.machine._END_SECONDS", 0.3)
    with standing("succeeds", tmp_path) as found:
        yield found


def watches(asked: Asked) -> bool:
    return asked.is_watch


def builder(pod: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = pod["spec"]["containers"][0]
    return container


def covered(pod: dict[str, Any]) -> None:
    """Another volume lies over the directory of our first process."""
    pod["spec"]["volumes"].append({"name": "x", "emptyDir": {}})
    builder(pod)["volumeMounts"].append({"name": "x", "mountPath": "/.runner"})


def lent_an_identity(pod: dict[str, Any]) -> None:
    """As clouds' webhooks do (GKE, EKS, AKS): a token of the cloud's."""
    sources = [{"serviceAccountToken": {"path": "token", "audience": "cloud"}}]
    pod["spec"]["volumes"].append({"name": "identity", "projected": {"sources": sources}})


def swapped(pod: dict[str, Any]) -> None:
    """The same name, and what is in it is the node's."""
    pod["spec"]["volumes"][0] = {"name": "writable-0", "hostPath": {"path": "/"}}


CHANGES: list[tuple[str, Change]] = [
    ("another program", lambda it: builder(it).update(command=["/bin/sh", "-c", "lie"])),
    ("arguments", lambda it: builder(it).update(args=["send"])),
    ("a variable", lambda it: builder(it)["env"].append({"name": "LD_PRELOAD", "value": "/x"})),
    ("many variables", lambda it: builder(it).update(envFrom=[{"secretRef": {"name": "x"}}])),
    (
        "a hook",
        lambda it: builder(it).update(lifecycle={"postStart": {"exec": {"command": ["x"]}}}),
    ),
    ("a probe", lambda it: builder(it).update(livenessProbe={"exec": {"command": ["x"]}})),
    ("a volume over ours", covered),
    ("a cloud's identity", lent_an_identity),
    ("a directory of the node", swapped),
    ("a token", lambda it: it["spec"].update(automountServiceAccountToken=True)),
    ("privileges", lambda it: builder(it)["securityContext"].update(privileged=True)),
    (
        "a capability",
        lambda it: builder(it)["securityContext"]["capabilities"]["add"].append("BPF"),
    ),
    ("another Secret", lambda it: it["spec"]["volumes"][2]["secret"].update(secretName="x")),
    ("the node's processes", lambda it: it["spec"].update(hostPID=True)),
]


def changing(change: Change, after: int = 0) -> Fault:
    """Changes the pod in each event but the first few."""

    def stream(lines: Iterator[bytes]) -> Iterator[bytes]:
        for number, each in enumerate(lines):
            document = json.loads(each)
            if number >= after:
                change(document["object"])
            yield json.dumps(document).encode() + b"\n"

    return Fault(watches, stream=stream, times=1000)


@pytest.mark.parametrize("change", [each for _, each in CHANGES], ids=[name for name, _ in CHANGES])
def test_row_28_a_pod_that_was_changed_on_its_way_in_gets_nothing(
    stand: Stand, change: Change
) -> None:
    """``backend.changed``: each of its lines. The pod shows the best of canaries."""
    stand.cluster.faults.append(changing(change))
    with pytest.raises(IsolationMismatch, match="the cluster made another pod"):
        stand.build()
    assert stand.first.files == {}
    assert stand.left() == []


def test_row_28_a_container_that_joins_a_running_build_ends_it(stand: Stand) -> None:
    """``machine.watch_over``: ``kubectl debug`` shares the sandbox's kernel and its files."""

    def joined(pod: dict[str, Any]) -> None:
        pod["spec"]["ephemeralContainers"] = [{"name": "debugger", "image": "x"}]

    told = threading.Event()

    def stream(lines: Iterator[bytes]) -> Iterator[bytes]:
        last: dict[str, Any] = {}
        for each in lines:
            document = json.loads(each)
            last = copy.deepcopy(document["object"])
            yield each
            if "running" in json.dumps(last["status"].get("containerStatuses", "")):
                break
        told.wait(10)
        joined(last)
        yield line("MODIFIED", last)
        time.sleep(5)

    stand.cluster.faults.append(Fault(watches, stream=stream))

    def between(number: int) -> None:
        told.set()
        time.sleep(2.5)

    stand.first.between = between
    with pytest.raises(IsolationMismatch, match=r"while it ran: .*debugger"):
        stand.build()
    assert stand.left() == []


def test_row_21_a_pod_of_somebody_elses_with_our_labels_stands_for_nothing(stand: Stand) -> None:
    """``Follower._is_ours``: its owner. It would be judged in the place of the real one."""

    def stream(lines: Iterator[bytes]) -> Iterator[bytes]:
        first = next(lines)
        decoy = json.loads(first)["object"]
        decoy["metadata"] |= {"uid": "decoy", "name": "decoy", "ownerReferences": []}
        decoy["status"] = {"phase": "Failed", "reason": "Evicted"}
        yield line("ADDED", decoy)
        yield first
        yield from lines

    stand.cluster.faults.append(Fault(watches, stream=stream, times=1000))
    assert stand.build().ending is Ending.EXITED


def nests(lines: Iterator[bytes]) -> Iterator[bytes]:
    yield b'{"type": "ADDED", "object": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


def test_row_13_a_watch_of_deep_json_is_an_event_that_is_none(stand: Stand) -> None:
    """``cluster._event``: RecursionError. Whoever follows the pod died of it, unseen."""
    stand.cluster.faults.append(Fault(watches, stream=nests, times=2))
    assert stand.build().ending is Ending.EXITED


# -- an API that does not end ----------------------------------------------------------------------


@contextmanager
def an_api(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """On loopback: reads a request, and does what it likes."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer, suppress(OSError):
                    peer.recv(1 << 16)
                    answer(peer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def drips_its_body(peer: socket.socket) -> None:
    peer.sendall(OK + b"Content-Length: 100000\r\n\r\n")
    drip(peer, b" ")


def drips_its_head(peer: socket.socket) -> None:
    peer.sendall(OK)
    drip(peer, b"x")


def goes_on(peer: socket.socket) -> None:
    drip(peer, b"HTTP/1.1 100 Continue\r\n\r\n")


def drip(peer: socket.socket, data: bytes) -> None:
    while True:
        peer.sendall(data)
        time.sleep(0.02)


@pytest.mark.parametrize("answer", [drips_its_body, drips_its_head, goes_on])
def test_row_20_an_api_that_never_ends_an_answer_holds_nobody(
    answer: Callable[[socket.socket], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``cluster._ended_after``: a runner waited for ever, and could not be cancelled."""
    for name in ("HEADS_SECONDS", "ANSWER_SECONDS", "PATIENCE_SECONDS"):
        monkeypatch.setattr(api, name, 0.3)
    began = time.monotonic()
    with (
        an_api(answer) as url,
        Cluster.connect(kubeconfig(tmp_path, url), None) as cluster,
        pytest.raises((ClusterUnreachable, SandboxFailed)),
    ):
        cluster.get(Pods, PODS)
    assert time.monotonic() - began < 5


def test_row_10_no_redirect_of_the_apis_is_followed(tmp_path: Path) -> None:
    """``settings.retries = False``: the token would go to another port or host."""
    seen: list[bytes] = []
    with an_api(lambda peer: seen.append(b"")) as other:

        def elsewhere(peer: socket.socket) -> None:
            head = f"HTTP/1.1 302 Found\r\nLocation: {other}/\r\nContent-Length: 0\r\n\r\n"
            peer.sendall(head.encode())

        with (
            an_api(elsewhere) as url,
            Cluster.connect(kubeconfig(tmp_path, url), None) as cluster,
            pytest.raises(ClusterUnreachable, match="302"),
        ):
            cluster.get(Pods, PODS)
    assert seen == []


# -- what neighbours of one runner share -----------------------------------------------------------


def test_row_33_descriptors_of_other_builds_do_not_end_a_conversation(tmp_path: Path) -> None:
    """``conversation._is_ready``: select(2) takes no descriptor beyond 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("this user may have no 1200 descriptors: ulimit -n 4096")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    conversation = Conversation(tmp_path, peer_uid=os.geteuid(), nonce="n")
    try:
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(tmp_path / "host.sock"))
            assert conversation.begin(1)
            first.sendall(b"a canary\n")
            assert conversation.read() == b"a canary\n"
    finally:
        conversation.dispose()
        for each in held:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_row_20_files_end_though_somebody_came_at_that_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``Files._serve``: ``_closed``. Whoever takes nothing would be waited for, for minutes."""
    accepted, closing_now = threading.Event(), threading.Event()
    listen = sockets.listen

    class Late:
        """Its connection is accepted, and nobody was told of it when the end comes."""

        def __init__(self, listener: socket.socket) -> None:
            self._listener = listener

        def accept(self) -> tuple[socket.socket, object]:
            found = self._listener.accept()
            accepted.set()
            closing_now.wait(10)
            return found

        def shutdown(self, how: int) -> None:
            self._listener.shutdown(how)
            closing_now.set()

        def close(self) -> None:
            self._listener.close()

    monkeypatch.setattr(sockets, "listen", lambda *words, **more: Late(listen(*words, **more)))
    files = Files(tmp_path, peer_uid=os.geteuid(), data={"x": bytes(8 << 20)}, paths={})
    with socket.socket(socket.AF_UNIX) as thief:
        thief.connect(str(tmp_path / "files.sock"))
        assert accepted.wait(10)
        ending = threading.Thread(target=files.close, daemon=True)
        ending.start()
        ending.join(5)
        assert not ending.is_alive()

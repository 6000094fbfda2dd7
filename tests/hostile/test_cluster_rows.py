"""Attacks on the kubernetes backend that need no cluster, by their row in the list of threats.

Beside each test stands the line whose removal makes it fail.
"""

import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from sandbox import sockets
from sandbox.errors import ClusterUnreachable, SandboxFailed
from sandbox.kubernetes import cluster as api
from sandbox.kubernetes.cluster import Cluster
from sandbox.kubernetes.conversation import Conversation
from sandbox.kubernetes.files import Files
from sandbox.kubernetes.objects import Pods
from sandbox.model import Ending
from tests.support.cluster import NAMESPACE, Asked, Fault, kubeconfig
from tests.support.pods import Stand, standing

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    with standing("succeeds", tmp_path) as found:
        yield found


def watches(asked: Asked) -> bool:
    return asked.is_watch


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

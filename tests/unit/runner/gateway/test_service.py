"""Sessions opened over the control socket, by whoever builds."""

import http.client
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.model import Network, canonical_json, plain
from policies.reference import Digest
from runner.errors import DiskExceeded, UsageError
from runner.gateway import service
from runner.gateway.listen import SharedDoor, tcp
from runner.gateway.listen import plain as unsecured
from runner.gateway.service import Control, Hall, read_decision
from runner.gateway.session import Session
from runner.registry.auth import Anonymous
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from tests.support.doors import Client, basic
from tests.support.gateway import PUSH, connect, decision, statuses
from tests.support.images import MemoryBlobs, make_image


@dataclass
class Builds:
    """A service, and those who build with it."""

    home: Path
    address: tuple[str, int]

    @property
    def path(self) -> Path:
        return self.home / "control.sock"

    def connect(self) -> socket.socket:
        return connect(self.path)

    def directory(self, name: str) -> Path:
        made = self.home / name
        made.mkdir()
        return made

    def opening(self, name: str, **fields: Any) -> dict[str, Any]:
        return {
            "do": "open",
            "decision": plain(decision(**fields)),
            "hosts": ["r.example"],
            "directory": str(self.directory(name)),
        }


@pytest.fixture
def builds(tmp_path: Path) -> Iterator[Builds]:
    listener = tcp("127.0.0.1", 0)
    door = SharedDoor(listener, unsecured)
    cache = BlobStore(tmp_path / "cache")
    hall = Hall(door, "gateway.example:8443", "PEM", Settings(), Anonymous(), cache)
    control = Control(tmp_path / "control.sock", hall)
    yield Builds(tmp_path, listener.getsockname())
    control.close()
    door.close()


@pytest.fixture
def lines(builds: Builds) -> Iterator[BinaryIO]:
    with builds.connect() as peer, peer.makefile("rwb") as stream:
        yield cast("BinaryIO", stream)


def raw(lines: BinaryIO, data: bytes) -> dict[str, Any]:
    lines.write(data + b"\n")
    lines.flush()
    answer: dict[str, Any] = json.loads(lines.readline())
    return answer


def ask(lines: BinaryIO, **request: Any) -> dict[str, Any]:
    answer = raw(lines, json.dumps(request).encode())
    assert list(answer) == ["ok"], answer
    ok: dict[str, Any] = answer["ok"]
    return ok


def builder(builds: Builds, opened: dict[str, Any]) -> Client:
    return Client(builds.address, basic(f"session:{opened['token']}"))


def push_image(client: Client, tag: str = "latest") -> Digest:
    blobs = MemoryBlobs()
    root = make_image(blobs=blobs).root
    manifest = blobs.blobs.pop(root.digest)
    for digest, data in blobs.blobs.items():
        assert client.ask("POST", f"{PUSH}/blobs/uploads/?digest={digest}", data).status == 201
    kind = {"Content-Type": root.media_type}
    assert client.ask("PUT", f"{PUSH}/manifests/{tag}", manifest, kind).status == 201
    return root.digest


# -- decisions -----------------------------------------------------------------------------------


def test_a_decision_is_read_back_as_it_was() -> None:
    for fields in ({}, {"network": Network.EGRESS}, {"base_images": (("a.b/**",), ("a.b/c",))}):
        made = decision(**fields)
        assert read_decision(json.loads(canonical_json(made))) == made


@pytest.mark.parametrize(
    "change",
    [{"isolation": "strongest"}, {"isolation": 2}, {"more": 1}, {"grant": {}}, {"trust": None},
     {"tenant": 7}, {"builder_digest": "sha256:0"}, {"policies": [["a"]]}],
)  # fmt: skip
def test_a_decision_of_other_words_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        read_decision({**plain(decision()), **change})


@pytest.mark.parametrize(
    ("member", "value"),
    [("nonroot", 1), ("nonroot", "yes"), ("rootless", 1), ("priority", "50"), ("priority", 50.0),
     ("base_images", [["a"], "b"]), ("egress", None), ("network", "everything"), ("extra", [])],
)  # fmt: skip
def test_a_grant_is_not_read_more_loosely_than_it_was_written(member: str, value: object) -> None:
    document = plain(decision())
    document["grant"][member] = value
    with pytest.raises(UsageError):
        read_decision(document)


# -- sessions ------------------------------------------------------------------------------------


def test_a_build_pushes_through_a_session_and_what_it_staged_is_its_own(
    builds: Builds, lines: BinaryIO
) -> None:
    opened = ask(lines, **builds.opening("build"))
    assert (opened["address"], opened["ca"]) == ("gateway.example:8443", "PEM")
    assert opened["aliases"] == {"r.example": "r.example"}
    client = builder(builds, opened)
    digest = push_image(client)
    sealed = ask(lines, do="seal", session=opened["session"])
    assert sealed["root"]["digest"] == digest
    assert (builds.home / "build/staged/blobs/sha256" / digest.hex).exists()
    assert client.ask("GET", "/v2/").status == 401
    ledger = (builds.home / "build/ledger.jsonl").read_text().splitlines()
    assert len(ledger) >= 4
    assert sealed["ledger"].startswith("sha256:")
    assert ask(lines, do="close", session=opened["session"]) == {}
    assert (builds.home / "build/staged/blobs/sha256" / digest.hex).exists()


def test_sessions_see_nothing_of_each_other(builds: Builds, lines: BinaryIO) -> None:
    one, two = (ask(lines, **builds.opening(name)) for name in ("one", "two"))
    assert one["token"] != two["token"]
    digest = push_image(builder(builds, one))
    other = builder(builds, two)
    for target in (f"manifests/{digest}", f"blobs/{digest}", "manifests/latest"):
        assert other.ask("GET", f"{PUSH}/{target}").status == 404
    location = builder(builds, one).ask("POST", f"{PUSH}/blobs/uploads/").headers["Location"]
    for method in ("GET", "PATCH", "DELETE"):
        assert other.ask(method, location).status == 404
    assert raw(lines, json.dumps({"do": "seal", "session": two["session"]}).encode())["error"][
        "code"
    ] == ("nothing-staged")


def test_a_session_that_closes_leaves_the_others_alone(builds: Builds, lines: BinaryIO) -> None:
    one, two = (ask(lines, **builds.opening(name)) for name in ("one", "two"))
    ask(lines, do="close", session=one["session"])
    assert builder(builds, one).ask("GET", "/v2/").status == 401
    assert builder(builds, two).ask("GET", "/v2/").status == 200


def still_answers(client: Client) -> bool:
    try:
        return client.ask("GET", "/v2/").status != 401
    except (OSError, http.client.HTTPException):  # ended while it answered
        return True


def test_sessions_end_with_the_connection_that_opened_them(builds: Builds, lines: BinaryIO) -> None:
    staying = ask(lines, **builds.opening("staying"))
    with builds.connect() as peer, peer.makefile("rwb") as stream:
        leaving = ask(cast("BinaryIO", stream), **builds.opening("leaving"))
        assert builder(builds, leaving).ask("GET", "/v2/").status == 200
    end = time.monotonic() + 5
    while still_answers(builder(builds, leaving)):
        assert time.monotonic() < end
    assert builder(builds, staying).ask("GET", "/v2/").status == 200
    assert list((builds.home / "cache/held").iterdir()) != []


def test_a_session_that_fails_to_close_does_not_keep_the_others_open(
    builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Session.close

    def failing(session: Session) -> None:
        close(session)
        if session.aliases == {"full": "full"}:
            raise DiskExceeded("the file system is full")

    monkeypatch.setattr(Session, "close", failing)
    with builds.connect() as peer, peer.makefile("rwb") as stream:
        lines = cast("BinaryIO", stream)
        opened = [
            ask(lines, **{**builds.opening(name), "hosts": [name]})
            for name in ("first", "full", "last")
        ]
    end = time.monotonic() + 5
    for one in opened:
        while still_answers(builder(builds, one)):
            assert time.monotonic() < end


@pytest.mark.parametrize("scheme", ["basic", "BASIC", "bearer", "BEARER"])
def test_a_token_may_be_shown_by_a_scheme_in_any_case(
    scheme: str, builds: Builds, lines: BinaryIO
) -> None:
    opened = ask(lines, **builds.opening("build", network=Network.EGRESS))
    basics = basic(f"session:{opened['token']}")["Authorization"].partition(" ")[2]
    shown = basics if scheme.lower() == "basic" else opened["token"]
    client = Client(builds.address, {"Authorization": f"{scheme} {shown}"})
    assert client.ask("GET", "/v2/").status == 200
    proxied = client.head("GET", "http://a.example/", f"Proxy-Authorization: {scheme} {shown}")
    denied = {"basic": 403, "bearer": 407}[scheme.lower()]  # a proxy takes no bearers
    assert statuses(client.speak(proxied)) == [denied]


def test_one_connection_cannot_name_the_sessions_of_another(
    builds: Builds, lines: BinaryIO
) -> None:
    opened = ask(lines, **builds.opening("build"))
    with builds.connect() as peer, peer.makefile("rwb") as stream:
        for what in ("seal", "close"):
            request = json.dumps({"do": what, "session": opened["session"]}).encode()
            assert "no such session" in raw(cast("BinaryIO", stream), request)["error"]["message"]
    assert builder(builds, opened).ask("GET", "/v2/").status == 200


def test_there_are_so_many_sessions_and_no_more(builds: Builds) -> None:
    full = service.Controller(None, threading.Semaphore(0))  # type: ignore[arg-type] # not asked
    answer = json.loads(full.answer(json.dumps(builds.opening("late")).encode()))
    assert "already" in answer["error"]["message"]


# -- descriptors ---------------------------------------------------------------------------------


@contextmanager
def descriptors(most: int) -> Iterator[None]:
    """So many may be had, in this process, until the end of the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_those_who_come_while_no_descriptors_are_left_are_answered_later(builds: Builds) -> None:
    directory = os.open(builds.home, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as early:
        early.settimeout(5)
        with descriptors(3):  # the first three are taken
            early.connect(f"/proc/self/fd/{directory}/control.sock")
            time.sleep(0.2)
        early.sendall(b"{}\n")
        assert early.recv(1000).startswith(b'{"error"')
    os.close(directory)
    with builds.connect() as late:
        late.sendall(b"{}\n")
        assert late.recv(1000).startswith(b'{"error"')


def test_no_session_is_opened_on_the_descriptors_of_others(builds: Builds, lines: BinaryIO) -> None:
    request = builds.opening("build")
    with descriptors(service.DESCRIPTORS):
        error = raw(lines, json.dumps(request).encode())["error"]
    assert (error["code"], "descriptors are left" in error["message"]) == ("usage", True)
    assert builder(builds, ask(lines, **request)).ask("GET", "/v2/").status == 200


def test_a_service_takes_all_the_descriptors_that_it_may_have() -> None:
    with descriptors(500):
        service.take_descriptors()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == hard


# -- the protocol --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"[]", b"null", b'"open"', b"\xff", b'{"do": "open"}', b'{"do": "close"}',
     b'{"do": "close", "session": 1}', b'{"do": "close", "session": "x", "more": 1}',
     b'{"do": "close", "do": "seal", "session": "x"}', b'{"do": "stop", "session": "x"}',
     b'{"do": "open", "decision": {}, "hosts": [], "directory": "/"}',
     b'{"do": "open", "decision": {}, "hosts": [1], "directory": "/"}', b"[" * 10_000],
)  # fmt: skip
def test_a_line_that_says_something_else_is_answered_with_an_error(
    line: bytes, lines: BinaryIO
) -> None:
    answer = raw(lines, line)
    assert list(answer) == ["error"]
    assert set(answer["error"]) == {"code", "message"}
    assert answer["error"]["code"] != "internal"


@pytest.mark.parametrize("directory", ["", "relative", "/nonexistent/at/all"])
def test_a_directory_has_to_be_there(directory: str, builds: Builds, lines: BinaryIO) -> None:
    request = {**builds.opening("build"), "directory": directory}
    assert "error" in raw(lines, json.dumps(request).encode())


def test_a_directory_is_for_one_session(builds: Builds, lines: BinaryIO) -> None:
    request = builds.opening("build")
    opened = ask(lines, **request)
    again = raw(lines, json.dumps(request).encode())["error"]
    assert again == {"code": "usage", "message": "no session can be made there: File exists"}
    assert builder(builds, opened).ask("GET", "/v2/").status == 200


def test_a_line_without_end_ends_the_connection(
    builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LINE_BYTES", 1000)
    with builds.connect() as peer:
        peer.sendall(b" " * 2000)
        assert peer.recv(10) == b""


@given(st.binary(max_size=300))
def test_no_line_breaks_the_one_who_answers(line: bytes) -> None:
    controller = service.Controller(None, None)  # type: ignore[arg-type] # never gets that far
    answer = json.loads(controller.answer(line))
    assert answer["error"]["code"] != "internal"


def test_the_socket_is_for_our_user_alone(builds: Builds) -> None:
    assert builds.path.stat().st_mode & 0o777 == 0o600
    assert builds.path.stat().st_uid == os.geteuid()


def test_another_uid_is_not_answered(builds: Builds) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can take another uid: run as root")
    builds.path.chmod(0o666)
    for parent in builds.path.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o711)
    child = os.fork()
    if child == 0:
        os.setresuid(12345, 12345, 12345)
        try:
            with builds.connect() as peer:
                peer.sendall(b"{}\n")
                os._exit(1 if peer.recv(10) else 0)
        except OSError:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_one_service_has_the_socket_and_the_next_one_takes_it_over(
    builds: Builds, tmp_path: Path
) -> None:
    hall = Hall(None, "", "", Settings(), Anonymous(), None)  # type: ignore[arg-type] # not asked
    with pytest.raises(OSError):
        Control(builds.path, hall)
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        directory = os.open(tmp_path, os.O_PATH)
        killed.bind(f"/proc/self/fd/{directory}/left.sock")
        os.close(directory)
    Control(left, hall).close()
    assert not left.exists()

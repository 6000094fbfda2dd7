"""The engine's words and ours, against a server that answers what a test has it answer."""

import fcntl
import io
import json
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.docker import engine as engine_module
from sandbox.docker.engine import Attached, Engine, Info, Runtime
from sandbox.errors import EngineLost, EngineUnavailable, RuntimeUnknown, SandboxFailed
from tests.support.spoken import HANG_UP, INFO, Answer, SpokenEngine, frame, speaking

LABELS = {"a": "1", "b": "2"}
STATE = {"Pid": 7, "Running": True, "OOMKilled": False, "ExitCode": 0, "Error": ""}


@pytest.fixture
def spoken(tmp_path: Path) -> Iterator[SpokenEngine]:
    with speaking(tmp_path / "docker.sock") as engine:
        yield engine


@pytest.fixture
def engine(spoken: SpokenEngine) -> Iterator[Engine]:
    with spoken.client() as client:
        yield client


# -- connecting ------------------------------------------------------------------------------------


def test_an_engine_as_old_as_can_be_is_connected_to(spoken: SpokenEngine) -> None:
    with spoken.client() as client:
        assert client.info().version == "20.10.24+dfsg1"
    client.close()


@pytest.mark.parametrize("version", ["1.40", "1.24"])
def test_an_older_one_is_refused_with_what_is_needed(spoken: SpokenEngine, version: str) -> None:
    spoken.says("GET /version", {"ApiVersion": version})
    with pytest.raises(EngineUnavailable, match=f"too old.*{version}") as raised:
        Engine.connect(spoken.socket)
    assert "20.10" in raised.value.advice


@pytest.mark.parametrize("version", ["1.41", "1.51", "2.0"])
def test_a_newer_one_is_taken(spoken: SpokenEngine, version: str) -> None:
    spoken.says("GET /version", {"ApiVersion": version})
    with Engine.connect(spoken.socket):
        pass


@pytest.mark.parametrize(
    "answer",
    [
        HANG_UP,
        Answer(500, {"message": "no"}),
        Answer(404, b"<html>"),
        Answer(200, b"<html>"),
        Answer(200, {}),
        Answer(200, []),
        Answer(200, {"ApiVersion": "new"}),
        Answer(200, {"ApiVersion": None}),
        Answer(200, {"ApiVersion": "1.x"}),
        Answer(200, {"ApiVersion": "1.9"}),
    ],
)
def test_what_does_not_talk_like_an_engine_is_none(spoken: SpokenEngine, answer: Answer) -> None:
    spoken.answers["GET /version"] = answer
    with pytest.raises(EngineUnavailable, match=str(spoken.socket)):
        Engine.connect(spoken.socket)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="No such file"):
        Engine.connect(tmp_path / "none.sock")
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(left))
    with pytest.raises(EngineUnavailable, match="Connection refused"):
        Engine.connect(left)
    with pytest.raises(EngineUnavailable, match="too long"):
        Engine.connect(tmp_path / ("x" * 200))


# -- what it says of itself ------------------------------------------------------------------------


def info(**changed: Any) -> Info:
    return Info.model_validate({**INFO, **changed})


@pytest.mark.parametrize(
    ("arguments", "opens"),
    [
        (None, False),
        ([], False),
        (["--host-uds=open"], True),
        (["-host-uds=open"], True),
        (["--host-uds=all"], True),
        (["--network=none", "--host-uds=open"], True),
        (["--host-uds=none"], False),
        (["--host-uds=create"], False),
        (["--host-uds"], False),
        (["--debug-log=--host-uds=open"], False),
    ],
)
def test_sockets_of_mounts_are_for_a_runtime_that_was_told_so(
    arguments: list[str] | None, opens: bool
) -> None:
    entry = {} if arguments is None else {"runtimeArgs": arguments}
    assert Runtime.model_validate(entry).opens_host_sockets is opens


def test_a_security_option_is_found_by_its_whole_name() -> None:
    found = info(SecurityOptions=["name=seccomp,profile=builtin", "name=userns", "name=apparmorx"])
    assert [found.has(name) for name in ("seccomp", "userns", "apparmor", "user")] == [
        True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "root", "uid"),
    [
        ([], "/var/lib/docker", 0),
        ([], "/var/lib/docker/100000.100000", 0),
        (["name=userns"], "/var/lib/docker/100000.100000", 100_000),
        (["name=userns"], "/data/231072.0", 231_072),
    ],
)
def test_a_containers_root_is_the_first_of_the_remapped_range(
    options: list[str], root: str, uid: int
) -> None:
    assert info(SecurityOptions=options, DockerRootDir=root).root_uid == uid


@pytest.mark.parametrize("root", ["/var/lib/docker", "/var/lib/docker/100000", "/x/1.a", "/x/-1.1"])
def test_a_remapped_range_that_is_not_shown_is_not_guessed(root: str) -> None:
    with pytest.raises(EngineUnavailable, match="userns-remap"):
        _ = info(SecurityOptions=["name=userns"], DockerRootDir=root).root_uid


@pytest.mark.parametrize(
    ("version", "major"),
    [("20.10.24+dfsg1", 20), ("28.2.2", 28), ("library-import", 0), ("", 0), ("v23", 0)],
)
def test_a_version_that_cannot_be_read_is_an_old_one(version: str, major: int) -> None:
    assert info(ServerVersion=version).major == major


def test_a_limit_that_is_not_named_is_not_kept() -> None:
    said = {k: v for k, v in INFO.items() if not k.endswith("Limit")}
    found = Info.model_validate(said)
    assert found.limits == {"memory": False, "cpu": True, "pids": False}


@pytest.mark.parametrize(
    "answer",
    [HANG_UP, Answer(200, b"{"), Answer(200, {}), Answer(200, []), Answer(500, {"message": "no"}),
     Answer(200, {**INFO, "Runtimes": 7})],
)  # fmt: skip
def test_an_engine_that_says_nothing_sound_of_itself_is_not_available(
    engine: Engine, spoken: SpokenEngine, answer: Answer
) -> None:
    spoken.answers["GET /info"] = answer
    with pytest.raises(EngineUnavailable):
        engine.info()


# -- errors ----------------------------------------------------------------------------------------

CALLS: dict[str, tuple[str, Callable[[Engine], object]]] = {
    "image": ("GET /images/i:1/json", lambda e: e.image("i:1")),
    "import": ("POST /images/create", lambda e: e.import_image(io.BytesIO(b"x"), "i:1", LABELS)),
    "images": ("GET /images/json", lambda e: e.images(LABELS)),
    "remove image": ("DELETE /images/i:1", lambda e: e.remove_image("i:1")),
    "create": ("POST /containers/create", lambda e: e.create("n", {})),
    "attach": ("POST /containers/c/attach", lambda e: e.attach("c")),
    "start": ("POST /containers/c/start", lambda e: e.start("c")),
    "wait": ("POST /containers/c/wait", lambda e: e.wait("c")),
    "state": ("GET /containers/c/json", lambda e: e.state("c")),
    "address": ("GET /containers/c/json", lambda e: e.address("c", "n")),
    "kill": ("POST /containers/c/kill", lambda e: e.kill("c")),
    "remove": ("DELETE /containers/c", lambda e: e.remove("c")),
    "labelled": ("GET /containers/json", lambda e: e.labelled(LABELS)),
    "create network": ("POST /networks/create", lambda e: e.create_network("n", {})),
    "networks": ("GET /networks", lambda e: e.networks(LABELS)),
    "remove network": ("DELETE /networks/n", lambda e: e.remove_network("n")),
}
ALL = pytest.mark.parametrize("call", CALLS)


@ALL
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(500, {"message": "it\nis   full"}), SandboxFailed),
        (Answer(400, {"message": "unknown or invalid runtime name: runsc"}), RuntimeUnknown),
        (Answer(400, {"message": "Unknown runtime specified runsc"}), RuntimeUnknown),
        (Answer(500, b"\xff"), SandboxFailed),
        (HANG_UP, EngineLost),
    ],
    ids=["refused", "no runtime", "no runtime either", "bytes", "gone"],
)
def test_every_call_tells_the_engines_errors_as_ours(
    engine: Engine, spoken: SpokenEngine, call: str, answer: Answer, error: type[Exception]
) -> None:
    path, ask = CALLS[call]
    spoken.answers[path] = answer
    with pytest.raises(SandboxFailed if error is SandboxFailed else error) as raised:
        ask(engine)
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)


def test_what_an_engine_says_is_bounded(engine: Engine, spoken: SpokenEngine) -> None:
    spoken.says("POST /containers/c/start", {"message": "x" * 9999}, status=500)
    with pytest.raises(SandboxFailed) as raised:
        engine.start("c")
    assert len(str(raised.value)) < 600


def test_an_engine_that_hangs_is_told_from_one_that_is_gone(
    spoken: SpokenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken.answers["POST /containers/c/start"] = Answer(200, delay_seconds=1)
    monkeypatch.setattr(engine_module, "CALL_SECONDS", 0.1)
    with spoken.client() as client, pytest.raises(SandboxFailed, match="did not answer") as raised:
        client.start("c")
    assert type(raised.value) is SandboxFailed


@pytest.mark.parametrize("call", ["create", "wait", "state", "address", "labelled", "images",
                                  "networks", "create network"])  # fmt: skip
@pytest.mark.parametrize("body", [b"", b"{", {}, [], [{}], None, {"State": {}}, {"Id": 5}])
def test_an_odd_answer_is_an_engine_that_is_lost_and_nothing_worse(
    engine: Engine, spoken: SpokenEngine, call: str, body: Any
) -> None:
    path, ask = CALLS[call]
    spoken.answers[path] = Answer(200, body)
    with suppress(EngineLost):
        ask(engine)


# -- what may be gone ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["remove image", "kill", "remove", "remove network"])
def test_what_is_gone_already_needs_no_removing(engine: Engine, call: str) -> None:
    CALLS[call][1](engine)


@pytest.mark.parametrize("call", ["kill", "remove"])
def test_what_is_going_needs_no_removing_either(
    engine: Engine, spoken: SpokenEngine, call: str
) -> None:
    path, ask = CALLS[call]
    spoken.says(path, {"message": "is not running"}, status=409)
    ask(engine)


@pytest.mark.parametrize("call", ["image", "state"])
def test_nothing_is_known_of_what_is_not_there(engine: Engine, call: str) -> None:
    assert CALLS[call][1](engine) is None


@pytest.mark.parametrize("call", ["start", "wait", "attach", "create", "address"])
def test_what_has_to_be_there_is_missed(engine: Engine, call: str) -> None:
    with pytest.raises(SandboxFailed, match="no such thing"):
        CALLS[call][1](engine)


# -- what it is asked for --------------------------------------------------------------------------


def test_things_are_found_by_all_their_labels(engine: Engine, spoken: SpokenEngine) -> None:
    things = [{"Id": "1", "Labels": {"a": "1"}}, {"Id": "2", "Labels": None}]
    for call in ("labelled", "networks", "images"):
        path, ask = CALLS[call]
        spoken.says(path, things)
        assert ask(engine) == [("1", {"a": "1"}), ("2", {})]
        (asked,) = spoken.saw(path)
        assert json.loads(asked.query["filters"][0]) == {"label": ["a=1", "b=2"]}
    (asked,) = spoken.saw("GET /containers/json")
    assert asked.query["all"] == ["1"]  # those that ended too


def test_an_image_is_imported_with_its_labels_and_nothing_to_run(
    engine: Engine, spoken: SpokenEngine
) -> None:
    spoken.says("POST /images/create", {"status": "sha256:1"})
    engine.import_image(io.BytesIO(b"tar" * 9999), "our/builder:5", {"a": 'say "b"'})
    (asked,) = spoken.saw("POST /images/create")
    assert asked.query["fromSrc"] == ["-"]
    assert (asked.query["repo"], asked.query["tag"]) == (["our/builder"], ["5"])
    assert asked.query["changes"] == ['LABEL a="say \\"b\\""']
    assert asked.body == b"tar" * 9999


def test_an_import_that_fails_half_way_is_no_image(engine: Engine, spoken: SpokenEngine) -> None:
    said = b'{"status":"Importing"}\r\n{"error":"no space left","errorDetail":{}}\r\n'
    spoken.answers["POST /images/create"] = Answer(200, said)
    with pytest.raises(SandboxFailed, match="no space left"):
        engine.import_image(io.BytesIO(b""), "our/builder:5", {})


@pytest.mark.parametrize("config", [None, {}, {"Labels": None}, {"Labels": {}}])
def test_an_image_without_labels_is_an_image(
    engine: Engine, spoken: SpokenEngine, config: Any
) -> None:
    spoken.says("GET /images/i:1/json", {"Config": config})
    assert engine.image("i:1") == {}


def test_a_container_is_made_of_what_was_rendered(engine: Engine, spoken: SpokenEngine) -> None:
    spoken.says("POST /containers/create", {"Id": "c", "Warnings": []}, status=201)
    assert engine.create("name", {"Image": "i"}) == "c"
    (asked,) = spoken.saw("POST /containers/create")
    assert (asked.query["name"], asked.json) == (["name"], {"Image": "i"})


def test_its_state_its_end_and_its_address_are_read(engine: Engine, spoken: SpokenEngine) -> None:
    networks = {"of-two": {"IPAddress": "10.0.0.2"}}
    spoken.says(
        "GET /containers/c/json", {"State": STATE, "NetworkSettings": {"Networks": networks}}
    )
    spoken.says("POST /containers/c/wait", {"StatusCode": 137})
    state = engine.state("c")
    assert state is not None
    assert (state.pid, state.out_of_memory) == (7, False)
    assert engine.wait("c") == 137
    assert engine.address("c", "of-two") == "10.0.0.2"


def test_removing_takes_what_runs_and_its_volumes(engine: Engine, spoken: SpokenEngine) -> None:
    spoken.says("DELETE /containers/c", status=204)
    spoken.says("POST /containers/c/kill", status=204)
    engine.kill("c")
    engine.remove("c")
    (killed,) = spoken.saw("POST /containers/c/kill")
    (removed,) = spoken.saw("DELETE /containers/c")
    assert killed.query["signal"] == ["SIGKILL"]
    assert (removed.query["force"], removed.query["v"]) == (["True"], ["True"])


def test_a_network_is_made_of_what_was_rendered(engine: Engine, spoken: SpokenEngine) -> None:
    spoken.says("POST /networks/create", {"Id": "n"}, status=201)
    spoken.says("DELETE /networks/n", status=204)
    assert engine.create_network("of-two", {"driver": "bridge", "internal": True}) == "n"
    engine.remove_network("n")
    (asked,) = spoken.saw("POST /networks/create")
    assert (asked.json["Name"], asked.json["Driver"], asked.json["Internal"]) == (
        "of-two", "bridge", True,
    )  # fmt: skip


# -- both ways to a process ------------------------------------------------------------------------


def attached() -> tuple[socket.socket, Attached]:
    """The engine's end, and what the SDK gives for the other one."""
    theirs, own = socket.socketpair()
    with own:
        return theirs, Attached(cast("IO[bytes]", own.makefile("rwb", buffering=0)))


def taken(socket_: socket.socket) -> bool:
    """Whether the other side has read all that was sent."""
    (left,) = struct.unpack("i", fcntl.ioctl(socket_, termios.TIOCOUTQ, b"\0\0\0\0"))
    return bool(left == 0)


def read_all(streams: Attached) -> list[bytes]:
    return list(iter(streams.read, b""))


@given(
    frames=st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40)), max_size=6),
    cuts=st.lists(st.integers(0, 400), max_size=5),
    left=st.integers(0, 20),
)
def test_frames_may_be_cut_anywhere_and_the_last_one_short(
    frames: list[tuple[int, bytes]], cuts: list[int], left: int
) -> None:
    whole = b"".join(frame(data, stream) for stream, data in frames)
    sent = whole + frame(b"the last one")[:left]
    bounds = sorted({0, len(sent), *(min(cut, len(sent)) for cut in cuts)})
    theirs, streams = attached()

    def send() -> None:
        with theirs:
            for a, b in pairwise(bounds):
                theirs.sendall(sent[a:b])
                while not taken(theirs):
                    time.sleep(0)

    sender = threading.Thread(target=send)
    sender.start()
    read = read_all(streams)
    sender.join()
    streams.close()
    expected = b"".join(data for _, data in frames) + b"the last one"[: max(0, left - 8)]
    assert b"".join(read) == expected


def test_a_frame_larger_than_a_read_comes_in_pieces() -> None:
    theirs, streams = attached()
    data = bytes(100_000)
    with theirs:
        theirs.sendall(frame(data))
    pieces = read_all(streams)
    streams.close()
    assert len(pieces) > 1
    assert b"".join(pieces) == data


def test_closing_wakes_whoever_reads_and_tells_the_process() -> None:
    theirs, streams = attached()
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(streams.read()))
    reader.start()
    streams.close()
    reader.join(10)
    assert read == [b""]
    with theirs:
        assert theirs.recv(1) == b""
    streams.close()
    assert streams.read() == b""


def test_a_connection_that_was_reset_is_at_its_end() -> None:
    theirs, streams = attached()
    streams.write(b"never read")
    theirs.close()  # with something unread, which is a reset
    assert streams.read() == b""
    with pytest.raises(BrokenPipeError):
        streams.write(b"x")
    streams.close()


def test_an_attached_connection_goes_both_ways(engine: Engine, spoken: SpokenEngine) -> None:
    spoken.pieces = (frame(b"out")[:5], frame(b"out")[5:], frame(b"err", 2))
    spoken.says("POST /containers/c/start", status=204)
    streams = engine.attach("c")
    engine.start("c")
    streams.write(b"go\n")
    assert b"".join(read_all(streams)) == b"outerr"
    streams.close()
    assert spoken.detached.wait(10)
    assert spoken.written == b"go\n"
    (asked,) = spoken.saw("POST /containers/c/attach")
    assert {name: asked.query[name] for name in ("stdin", "stdout", "stderr", "stream")} == {
        name: ["1"] for name in ("stdin", "stdout", "stderr", "stream")
    }

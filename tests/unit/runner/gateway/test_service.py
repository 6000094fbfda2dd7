"""The port that leads to doors: who is led where, and who gets how much of it."""

import contextlib
import os
import re
import resource
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.gateway import service
from runner.gateway.listen import tcp
from runner.gateway.service import Service, Shares, take_descriptors
from runner.gateway.tlspeer import context
from sandbox.doors import NAMES, Key
from tests.support.egress import certificate
from tests.support.port import (
    SECONDS,
    Pods,
    everything,
    exchange,
    is_over,
    line,
    listening,
    say_no_more,
)

MIB = 1 << 20


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("keys"), "a.example")


@dataclass
class Port:
    """A port, those who come to it, and the doors that it may lead to."""

    service: Service
    pods: Pods
    home: Path
    stack: contextlib.ExitStack
    accept: dict[str, Callable[[], socket.socket]] = field(default_factory=dict)

    @property
    def links(self) -> Path:
        return self.home / "doors"

    def door(self, name: str, *sockets: str) -> Key:
        """A door with sockets; ``accept`` takes who was led to the first of them."""
        directory = self.home / name
        directory.mkdir()
        accepts = [self.stack.enter_context(listening(directory, each)) for each in sockets]
        self.accept[name] = accepts[0] if accepts else lambda: pytest.fail("no socket")
        return Key.to(directory, self.links)

    def meet(self, name: str, key: Key) -> tuple[ssl.SSLSocket, socket.socket]:
        """A pod, and where it was led to."""
        pod = self.stack.enter_context(self.pods.come(key.secret))
        return pod, self.stack.enter_context(self.accept[name]())


Opener = Callable[..., Port]


@pytest.fixture
def ports(tmp_path: Path, keys: tuple[Path, Path]) -> Iterator[Opener]:
    with contextlib.ExitStack() as stack:

        def make(**shares: float) -> Port:
            listener = tcp("127.0.0.1", 0)
            pods = Pods(listener.getsockname(), keys[0])
            made = Service(listener, context(*keys), tmp_path / "doors", Shares(**shares))  # type: ignore[arg-type] # counts are whole
            stack.callback(made.close)
            return Port(made, pods, tmp_path, stack)

        yield make


@pytest.fixture
def port(ports: Opener) -> Port:
    return ports()


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(peers: Sequence[socket.socket]) -> int:
    """How many of those who were told nothing the port has ended."""
    return len(select.select(peers, [], [], 0)[0])


# -- who is led where ----------------------------------------------------------------------------


def test_a_key_leads_to_the_sockets_of_its_door_and_to_no_other_doors(port: Port) -> None:
    for name in sorted(NAMES):
        for which in ("one", "two"):
            key = port.door(f"{which}-{name}", name)
            with port.pods.come(key.secret, name) as pod, port.accept[f"{which}-{name}"]() as led:
                pod.sendall(which.encode())
                assert led.recv(10) == which.encode()
                led.sendall(b"heard")
                assert pod.recv(10) == b"heard"


def test_what_comes_with_the_line_is_carried_and_so_is_the_end(port: Port) -> None:
    key = port.door("one", "gateway")
    with port.pods.come(key.secret, more=b"x" * 50_000) as pod, port.accept["one"]() as led:
        say_no_more(pod)
        assert everything(led) == b"x" * 50_000
    with port.pods.greet() as pod:
        pod.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)  # all in one segment
        pod.sendall(line(key.secret))
        say_no_more(pod)
        pod.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        with port.accept["one"]() as led:
            assert led.recv(10) == b""
            led.sendall(b"an answer all the same")
            led.shutdown(socket.SHUT_WR)
            assert everything(pod) == b"an answer all the same"


def test_the_line_may_come_byte_by_byte(port: Port) -> None:
    key = port.door("one", "host")
    with port.pods.greet() as pod:
        for byte in line(key.secret, "host"):
            pod.sendall(bytes([byte]))
        port.accept["one"]().close()


KEY = "k" * 43


@pytest.mark.parametrize(
    "said",
    [b"\n", b"GET / HTTP/1.1\r\n\r\n", line(KEY).replace(b"\n", b"\r\n"), b" " + line(KEY),
     line(KEY).replace(b" 1 ", b" 2 "), line(KEY).replace(b"\n", b" \n"), line(KEY).upper(),
     line(KEY, "gateway/../host"), line(KEY, "docker"), line(KEY, ""), line("", "host"),
     line("short"), line("k" * 129), line("../" * 10), line("\0" * 43), line(KEY)[:-1] + b" " * 300,
     b"x" * 100_000],
)  # fmt: skip
def test_who_says_anything_else_is_ended_without_a_word(said: bytes, port: Port) -> None:
    with port.pods.greet() as pod:
        with contextlib.suppress(OSError):  # it may be over by then
            pod.sendall(said)
        assert is_over(pod)


@given(st.binary(max_size=200))
def test_only_one_line_is_understood(said: bytes) -> None:
    found = service._LINE.fullmatch(said)
    words = re.fullmatch(rb"runner-door 1 ([\w-]*) (\w*)\n", said, re.ASCII)
    assert found is None or (words is not None and words[2].decode() in NAMES)


def test_the_longest_line_is_as_long_as_one_may_be() -> None:
    longest = max((line("k" * 128, name) for name in NAMES), key=len)
    assert service._LINE.fullmatch(longest)
    assert len(longest) <= service._LINE_BYTES


@pytest.mark.parametrize(
    "how", ["guessed", "revoked", "no such socket", "nobody listens", "a file"]
)
def test_where_there_is_nobody_to_be_led_to_the_connection_ends(how: str, port: Port) -> None:
    key = port.door("one")
    secret = KEY if how == "guessed" else key.secret
    if how == "revoked":
        port.stack.enter_context(listening(port.home / "one"))
        key.revoke()
    elif how == "nobody listens":
        with listening(port.home / "one"):
            pass
    elif how == "a file":
        (port.home / "one/gateway.sock").touch()
    with port.pods.come(secret) as pod, pytest.raises((ssl.SSLError, ConnectionError)):
        pod.recv(1)


def test_a_runner_that_starts_again_is_found_again(port: Port) -> None:
    key = port.door("one")
    for _ in range(2):
        with (
            listening(port.home / "one") as accept,
            port.pods.come(key.secret) as pod,
            accept() as led,
        ):
            led.sendall(b"here")
            assert pod.recv(10) == b"here"
        (port.home / "one/gateway.sock").unlink()


def test_the_port_may_start_again_and_the_doors_are_as_they_were(
    ports: Opener, keys: tuple[Path, Path]
) -> None:
    port = ports()
    key = port.door("one", "gateway")
    pod, led = port.meet("one", key)
    port.service.close()
    assert is_over(pod)
    assert led.recv(1) == b""
    again = Service(tcp(*port.pods.address), context(*keys), port.links)
    with contextlib.closing(again):
        _, led = port.meet("one", key)
        led.close()


# -- how connections end -------------------------------------------------------------------------


def test_a_pod_that_stopped_sending_still_receives(port: Port) -> None:
    pod, led = port.meet("one", port.door("one", "gateway"))
    pod.sendall(b"a question")
    say_no_more(pod)
    assert everything(led) == b"a question"
    led.sendall(b"an answer")
    led.close()
    assert everything(pod) == b"an answer"


def test_a_pod_that_is_gone_without_a_word_gets_no_answer(port: Port) -> None:
    pod, led = port.meet("one", port.door("one", "gateway"))
    pod.sendall(b"half of")
    assert led.recv(10) == b"half of"
    socket.socket.close(pod)
    assert led.recv(10) == b""
    with pytest.raises(BrokenPipeError):
        led.sendall(b"x")


def test_what_is_answered_in_the_middle_of_an_upload_arrives(port: Port) -> None:
    """A registry refuses the rest of it, and closes."""
    key = port.door("one", "gateway")
    for _ in range(5):
        pod, led = port.meet("one", key)
        with ThreadPoolExecutor(1) as pool:
            speaking = pool.submit(exchange, pod, bytes(64 * MIB))
            assert led.recv(10)
            led.sendall(b"413" + b"x" * 100_000)
            led.close()
            assert len(speaking.result(30)) == 100_003


def test_who_sends_on_to_nobody_is_listened_to_for_a_while_only(ports: Opener) -> None:
    port = ports(linger_seconds=0.2)
    pod, led = port.meet("one", port.door("one", "gateway"))
    led.close()
    assert everything(pod) == b""
    with pytest.raises((ConnectionError, ssl.SSLError)):
        pod.sendall(bytes(1 << 30))


def test_nothing_stays_open_when_connections_end(port: Port) -> None:
    key = port.door("one", "gateway")
    port.meet("one", key)[0].close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with port.pods.come(key.secret), port.accept["one"]():
            pass
        with port.pods.come(KEY) as lost:
            assert is_over(lost)
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)
    eventually(lambda: not port.service._visitors and not port.service._strangers)


def test_the_end_of_the_port_ends_every_connection(port: Port) -> None:
    pod, led = port.meet("one", port.door("one", "gateway"))
    with port.pods.knock() as silent, port.pods.greet() as greeted:
        port.service.close()
        assert all(is_over(peer) for peer in (pod, led, silent, greeted))
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"gateway", "gateway-connection", "gateway-strangers"}


def test_a_peer_whose_host_died_is_found_out(port: Port) -> None:
    pod, _ = port.meet("one", port.door("one", "gateway"))
    (connection,) = port.service._acceptor._connections
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
    pod.close()


# -- shares --------------------------------------------------------------------------------------


def test_a_door_has_its_share_of_connections_and_others_have_theirs(ports: Opener) -> None:
    port = ports(of_door=2)
    greedy, modest = port.door("greedy", "gateway"), port.door("modest", "gateway")
    first, _ = port.meet("greedy", greedy)
    port.meet("greedy", greedy)
    with port.pods.come(greedy.secret) as third:
        assert is_over(third)
    port.meet("modest", modest)
    first.close()
    eventually(lambda: port.service._visitors.total() == 2)
    port.meet("greedy", greedy)


def test_however_many_connections_others_have_a_door_can_have_some(ports: Opener) -> None:
    port = ports(connections=2, always=2, of_door=3)
    names = ("greedy", "greedier", "modest")
    doors = {name: port.door(name, "gateway") for name in names}
    for name, most in (("greedy", 3), ("greedier", 3), ("modest", 2)):
        for _ in range(most):
            port.meet(name, doors[name])
        with port.pods.come(doors[name].secret) as refused:
            assert is_over(refused)


def test_one_door_may_have_what_a_sandbox_needs(port: Port) -> None:
    key = port.door("one", "gateway")
    for _ in range(Shares().of_door):
        port.meet("one", key)


# -- strangers -----------------------------------------------------------------------------------


def test_strangers_make_room_for_whoever_comes(ports: Opener) -> None:
    port = ports(of_address=4)
    key = port.door("one", "gateway")
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(port.pods.knock()) for _ in range(20)]
        eventually(lambda: ended(idle) == 16)
        pod, led = port.meet("one", key)
        more = [stack.enter_context(port.pods.knock()) for _ in range(20)]
        eventually(lambda: ended(idle) + ended(more) == 36)
        led.sendall(b"still here")  # who was led somewhere is no stranger any more
        assert pod.recv(20) == b"still here"


def test_strangers_of_many_addresses_make_room_too(ports: Opener) -> None:
    port = ports(strangers=4)
    key = port.door("one", "gateway")
    with contextlib.ExitStack() as stack:

        def knock(number: int) -> socket.socket:
            source = (f"127.0.0.{number}", 0)
            peer = socket.create_connection(port.pods.address, SECONDS, source)
            return stack.enter_context(peer)

        idle = [knock(number) for number in range(2, 12)]
        eventually(lambda: ended(idle) == 6)
        port.meet("one", key)
        eventually(lambda: ended(idle) == 7)


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01", b"runner-door 1 "])
def test_a_stranger_has_little_time(
    said: bytes, ports: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_REAP_SECONDS", 0.05)
    port = ports(stranger_seconds=0.3)
    pod, led = port.meet("one", port.door("one", "gateway"))
    is_greeted = said.startswith(b"runner")
    with port.pods.greet() if is_greeted else port.pods.knock() as stranger:
        stranger.sendall(said)
        assert is_over(stranger)
    led.sendall(b"still here")
    assert pod.recv(20) == b"still here"


def test_who_speaks_no_tls_is_not_heard_and_keeps_nobody_waiting(port: Port) -> None:
    key = port.door("one", "gateway")
    with port.pods.knock(), port.pods.knock() as plain:
        plain.sendall(line(key.secret))
        assert b"runner" not in exchange(plain, b"")
        port.meet("one", key)


def test_who_is_gone_before_the_port_looks_is_nobody(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = port.service._enter

    def late(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.recv(1)
        connection.shutdown(socket.SHUT_RDWR)
        enter(connection)

    monkeypatch.setattr(port.service, "_enter", late)
    port.pods.knock().close()
    eventually(lambda: not port.service._acceptor._connections)
    assert not port.service._strangers


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


def test_those_who_come_while_no_descriptors_are_left_are_led_later(port: Port) -> None:
    key = port.door("one", "gateway")
    with socket.socket() as early:
        early.settimeout(SECONDS)
        with descriptors(3):  # the first three are taken
            early.connect(port.pods.address)
            time.sleep(0.2)
        assert exchange(early, b"\n" * 100) is not None
    port.meet("one", key)


def test_the_port_takes_all_the_descriptors_that_it_may_have() -> None:
    with descriptors(500):
        take_descriptors()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == hard

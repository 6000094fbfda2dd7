"""One port for many sessions."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.gateway.http import Request, Response
from runner.gateway.listen import SharedDoor, Shares, plain, tcp, tls
from tests.support.doors import Client, basic
from tests.support.gateway import statuses

Opener = Callable[..., tuple[SharedDoor, tuple[str, int]]]


def named(name: str) -> Callable[[Request], Response]:
    """A session that says its name."""

    def answer(request: Request) -> Response:
        for _ in request.body:
            pass
        return Response(200, {}, name.encode())

    return answer


def unheard(error: Exception) -> None:
    raise AssertionError(error)


@pytest.fixture
def shared() -> Iterator[Opener]:
    with contextlib.ExitStack() as stack:

        def make(secured: Callable[..., object] = plain, **shares: float) -> object:
            listener = tcp("127.0.0.1", 0)
            door = SharedDoor(listener, secured, Shares(**shares))  # type: ignore[arg-type] # plain or tls()
            stack.callback(door.close)
            return door, listener.getsockname()

        yield make  # type: ignore[misc] # as Opener says


def answered(peer: socket.socket) -> list[int]:
    """The status of one answer, all of which has come."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += peer.recv(1000)
    head, _, body = got.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
    while len(body) < length:
        body += peer.recv(1000)
    return statuses(head)


def say(address: tuple[str, int], token: str) -> bytes:
    return Client(address, basic(f"session:{token}")).head("GET", "/v2/")


def test_a_token_leads_to_its_session_and_nothing_else_does(shared: Opener) -> None:
    door, address = shared()
    for token in ("one", "two"):
        door.open(token, named(token), unheard)
    client = Client(address)
    for token in ("one", "two"):
        shown = basic(f"session:{token}")["Authorization"]
        for login in (shown, shown.replace("Basic", "BASIC"), f"Bearer {token}", f"bearer {token}"):
            headers = {"Authorization": login}
            assert client.ask("GET", "/v2/", headers=headers).body == token.encode()
    for wrong in ("", "on", "one ", "One", "one\x00", "one:", "\xff"):
        assert client.ask("GET", "/v2/", headers=basic(f"session:{wrong}")).status == 401
    digest = basic("session:one")["Authorization"].replace("Basic", "Digest")
    for header in ("", "Basic", "Basic !", "Basic b25l", "Bearer", "\xff one", digest, "one"):
        answer = client.ask("GET", "/v2/", headers={"Authorization": header})
        assert (answer.status, answer.code) == (401, "UNAUTHORIZED")


def test_a_proxy_request_shows_its_token_where_proxies_want_it(shared: Opener) -> None:
    door, address = shared()
    door.open("one", named("one"), unheard)
    login = basic("session:one")["Authorization"]
    client = Client(address)
    proxied = client.head("GET", "http://a.example/", f"Proxy-Authorization: {login}")
    wrong_place = client.head("GET", "http://a.example/", f"Authorization: {login}")
    assert statuses(client.speak(proxied)) == [200]
    assert b"Proxy-Authenticate: Basic" in client.speak(wrong_place)
    misplaced = client.head("GET", "/v2/", f"Proxy-Authorization: {login}")
    assert statuses(client.speak(misplaced)) == [401]


def test_a_connection_stays_with_the_session_that_it_came_for(shared: Opener) -> None:
    door, address = shared()
    seen: list[str] = []

    def one(request: Request) -> Response:
        seen.append(request.headers["authorization"])
        return Response(200, {}, b"one")

    door.open("one", one, unheard)
    door.open("two", named("two"), unheard)
    client = Client(address)
    answers = client.speak(say(address, "one") + say(address, "two"))
    assert answers.count(b"\r\n\r\none") == 2  # whose handler refuses the other one's token
    assert len(seen) == 2


def test_a_session_that_ended_takes_its_connections_with_it_and_no_others(shared: Opener) -> None:
    door, address = shared()
    one, _ = door.open("one", named("one"), unheard), door.open("two", named("two"), unheard)
    with Client(address).connect() as first, Client(address).connect() as second:
        first.sendall(say(address, "one"))
        second.sendall(say(address, "two"))
        assert (answered(first), answered(second)) == ([200], [200])
        one.close()
        assert first.recv(1000) == b""
        second.sendall(say(address, "two"))
        assert answered(second) == [200]
    assert Client(address).ask("GET", "/", headers=basic("session:one")).status == 401


def test_a_session_has_its_share_of_connections_and_others_have_theirs(shared: Opener) -> None:
    door, address = shared(of_session=2)
    for token in ("greedy", "modest"):
        door.open(token, named(token), unheard)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Client(address).connect()) for _ in range(3)]
        for peer in peers:
            peer.sendall(say(address, "greedy"))
        answers = sorted(answered(peer)[0] for peer in peers)
        assert answers == [200, 200, 503]
        modest = Client(address, basic("session:modest"))
        assert [modest.ask("GET", "/").status for _ in range(3)] == [200] * 3
    free = Client(address, basic("session:greedy"))
    end = time.monotonic() + 5
    while free.ask("GET", "/").status != 200:
        assert time.monotonic() < end


def test_however_many_connections_others_have_a_session_can_have_some(shared: Opener) -> None:
    door, address = shared(connections=2, always=2, of_session=3)
    for token in ("greedy", "greedier", "modest"):
        door.open(token, named(token), unheard)
    with contextlib.ExitStack() as stack:

        def ask(token: str) -> list[int]:
            peer = stack.enter_context(Client(address).connect())
            peer.sendall(say(address, token))
            return answered(peer)

        for token in ("greedy", "greedier"):
            assert [ask(token) for _ in range(4)] == [[200]] * 3 + [[503]]
        assert [ask("modest") for _ in range(3)] == [[200], [200], [503]]


def test_strangers_make_room_for_whoever_comes(shared: Opener) -> None:
    door, address = shared(of_address=4)
    door.open("one", named("one"), unheard)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(Client(address).connect()) for _ in range(20)]
        known = stack.enter_context(Client(address).connect())
        known.sendall(say(address, "one"))
        assert answered(known) == [200]
        assert [peer.recv(10) for peer in idle[:10]] == [b""] * 10
        more = [stack.enter_context(Client(address).connect()) for _ in range(20)]
        assert more[0].recv(10) == b""
        known.sendall(say(address, "one"))  # who showed a token is no stranger any more
        assert answered(known) == [200]


def test_a_stranger_has_little_time(shared: Opener) -> None:
    door, address = shared(stranger_seconds=0.2)
    door.open("one", named("one"), unheard)
    with Client(address).connect() as stranger, Client(address).connect() as known:
        known.sendall(say(address, "one"))
        stranger.sendall(b"GET / HT")
        assert stranger.recv(10) == b""
        assert answered(known) == [200]
        known.sendall(say(address, "one"))
        assert answered(known) == [200]


def test_tokens_cannot_be_guessed_in_bulk_over_one_connection(shared: Opener) -> None:
    door, address = shared(refusals=3)
    door.open("one", named("one"), unheard)
    guesses = b"".join(say(address, f"guess{number}") for number in range(100))
    assert statuses(Client(address).speak(guesses + say(address, "one"))) == [401] * 3


def test_what_a_handler_raises_is_told_to_its_session(shared: Opener) -> None:
    door, address = shared()
    told: list[Exception] = []

    def broken(request: Request) -> Response:
        raise ZeroDivisionError

    door.open("one", broken, told.append)
    door.open("two", named("two"), unheard)
    assert Client(address, basic("session:one")).ask("GET", "/").status == 500
    assert [type(error) for error in told] == [ZeroDivisionError]
    assert Client(address, basic("session:two")).ask("GET", "/").status == 200


def test_the_end_of_a_session_waits_for_what_it_is_doing(shared: Opener) -> None:
    door, address = shared()
    begun, go_on = threading.Event(), threading.Event()
    over: list[str] = []

    def slow(request: Request) -> Response:
        begun.set()
        go_on.wait(5)
        over.append("answered")
        return Response(200)

    place = door.open("one", slow, unheard)
    with Client(address).connect() as peer:
        peer.sendall(say(address, "one"))
        assert begun.wait(5)

        def close() -> None:
            place.close()
            over.append("closed")

        closing = threading.Thread(target=close)
        closing.start()
        closing.join(0.2)
        assert over == []
        go_on.set()
        closing.join(5)
    assert over == ["answered", "closed"]


# -- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_tls_carries_large_bodies_both_ways(
    shared: Opener, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    data = bytes(range(256)) * (1 << 14)
    (tmp_path / "file").write_bytes(data)

    def echo(request: Request) -> Response:
        assert b"".join(request.body) == data
        file = (tmp_path / "file").open("rb")
        file.seek(100)
        return Response(200, {}, file, len(data) - 100)

    door, address = shared(tls(*certificate))
    door.open("one", echo, unheard)
    trusting = ssl.create_default_context(cafile=certificate[0])
    client = Client(address, basic("session:one"), trusting)
    assert client.ask("PUT", "/", data).body == data[100:]


def test_who_speaks_no_tls_is_not_heard_and_keeps_nobody_waiting(
    shared: Opener, certificate: tuple[Path, Path]
) -> None:
    door, address = shared(tls(*certificate))
    place = door.open("one", named("one"), unheard)
    trusting = ssl.create_default_context(cafile=certificate[0])
    client = Client(address, basic("session:one"), trusting)
    with Client(address).connect():  # silent
        assert b"HTTP" not in Client(address).speak(say(address, "one"))
        assert client.ask("GET", "/").body == b"one"
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            Client(address, {}, old).ask("GET", "/")
        with trusting.wrap_socket(Client(address).connect(), server_hostname="127.0.0.1") as peer:
            peer.sendall(say(address, "one"))
            assert answered(peer) == [200]
            place.close()
            with contextlib.suppress(ssl.SSLError, ConnectionError):  # no farewell
                while peer.recv(10):
                    pass


def test_a_port_of_the_other_family_can_be_listened_on() -> None:
    if not socket.has_ipv6:
        pytest.skip("this host has no IPv6")
    try:
        listener = tcp("::1", 0)
    except OSError:
        pytest.skip("this host has no IPv6 on loopback")
    with listener:
        assert listener.getsockname()[0] == "::1"

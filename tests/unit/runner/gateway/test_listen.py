"""Where connections come from: TCP ports, with TLS for whoever knows nothing of doors."""

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.gateway.http import Request, Response, Server
from runner.gateway.listen import Secured, over, plain, tcp, tls
from tests.support.doors import Client
from tests.support.egress import certificate

Opener = Callable[..., Client]


def named(request: Request) -> Response:
    """Says where it is."""
    for _ in request.body:
        pass
    return Response(200, {}, b"here")


def unheard(error: Exception) -> None:
    raise AssertionError(error)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("tls"), "localhost")


@pytest.fixture
def trusting(keys: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=keys[0])
    context.check_hostname = False
    return context


@pytest.fixture
def opened() -> Iterator[Opener]:
    with contextlib.ExitStack() as stack:

        def make(
            handler: Callable[[Request], Response] = named,
            secured: Secured = plain,
            tls: ssl.SSLContext | None = None,
        ) -> Client:
            listener = tcp("127.0.0.1", 0)
            welcome = over(secured, handler)
            server = Server(listener, handler, peer_uid=None, failed=unheard, welcome=welcome)
            stack.callback(server.close)
            return Client(listener.getsockname(), {}, tls)

        yield make


def test_tls_carries_large_bodies_both_ways(
    opened: Opener, keys: tuple[Path, Path], trusting: ssl.SSLContext, tmp_path: Path
) -> None:
    data = bytes(range(256)) * (1 << 14)
    (tmp_path / "file").write_bytes(data)

    def echo(request: Request) -> Response:
        assert b"".join(request.body) == data
        file = (tmp_path / "file").open("rb")
        file.seek(100)
        return Response(200, {}, file, len(data) - 100)

    client = opened(echo, tls(*keys), trusting)
    assert client.ask("PUT", "/", data).body == data[100:]


def test_who_speaks_no_tls_is_not_heard_and_keeps_nobody_waiting(
    opened: Opener, keys: tuple[Path, Path], trusting: ssl.SSLContext
) -> None:
    client = opened(secured=tls(*keys), tls=trusting)
    with client.connect():  # silent
        assert b"HTTP" not in client.speak(client.head("GET", "/"))
        assert client.ask("GET", "/").body == b"here"
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            Client(client.address, {}, old).ask("GET", "/")


def test_a_port_without_tls_answers_too(opened: Opener) -> None:
    assert opened().ask("GET", "/").body == b"here"


def test_a_port_of_the_other_family_can_be_listened_on() -> None:
    if not socket.has_ipv6:
        pytest.skip("this host has no IPv6")
    try:
        listener = tcp("::1", 0)
    except OSError:
        pytest.skip("this host has no IPv6 on loopback")
    with listener:
        assert listener.getsockname()[0] == "::1"

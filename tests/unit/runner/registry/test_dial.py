import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import AddressDenied, RegistryProtocol
from runner.registry import dial
from runner.settings import RegistrySettings, Settings

if TYPE_CHECKING:
    from tests.unit.runner.registry.conftest import Answer, Peer, Request


def sending(here: RegistrySettings, other: "Peer") -> RegistrySettings:
    """The same, for a registry whose redirects may lead to ``other``."""
    return here.model_copy(update={"redirect_hosts": (other.host,)})


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True),
        ("172.15.255.255", True),
        ("172.32.0.0", True),
        ("100.63.255.255", True),
        ("100.128.0.0", True),
        ("0.0.0.0", False),
        ("0.1.2.3", False),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("100.100.100.200", False),
        ("127.0.0.1", False),
        ("127.255.255.255", False),
        ("168.63.129.16", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("172.31.255.255", False),
        ("192.0.0.192", False),
        ("192.0.2.1", False),
        ("192.88.99.1", False),
        ("192.168.1.1", False),
        ("198.18.0.1", False),
        ("198.51.100.1", False),
        ("203.0.113.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("2606:4700::1111", True),
        ("2a00::1", True),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::8.8.8.8", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:1.1.1.1", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::101:101", True),
        ("64:ff9b:1::101:101", False),
        ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::1", False),
        ("2002:0101:0101::1", True),
        ("2001::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("100::1", False),
        ("5f00::1", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("2606:4700::1111%eth0", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("localhost", False),
        ("2130706433", False),
        ("", False),
    ],
)
def test_only_addresses_of_the_public_internet_are_public(address: str, public: bool) -> None:
    assert dial.is_public(address) is public


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_as_public_in_every_ipv6_wrapping(address: IPv4Address) -> None:
    number = int(address)
    wrapped = (
        IPv6Address(0xFFFF << 32 | number),
        IPv6Address(0x64FF9B << 96 | number),
        IPv6Address(0x2002 << 112 | number << 80),
    )
    assert {dial.is_public(form) for form in wrapped} == {dial.is_public(address)}


@given(st.ip_addresses())
def test_nothing_that_python_calls_private_is_public(address: IPv4Address | IPv6Address) -> None:
    wrapping = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if wrapping is None and (address.is_private or address.is_multicast or address.is_loopback):
        assert not dial.is_public(address)


@pytest.mark.parametrize(
    ("scheme", "host", "port", "found"),
    [
        ("https", "a.example", 443, "usual"),
        ("https", "A.EXAMPLE", 443, "usual"),
        ("http", "a.example", 80, "usual"),
        ("https", "a.example", 5000, "none"),
        ("http", "a.example", 443, "none"),
        ("https", "b.example", 5000, "port"),
        ("https", "b.example", 443, "none"),
        ("https", "c.example", 443, "port"),
        ("https", "::1", 5000, "port"),
    ],
)
def test_settings_are_those_of_exactly_the_authority(
    scheme: str, host: str, port: int, found: str
) -> None:
    usual, of_port = RegistrySettings(private_address=True), RegistrySettings(plain_http=True)
    settings = Settings(
        registries={
            "a.example": usual,
            "b.example:5000": of_port,
            "c.example:443": of_port,
            "[::1]:5000": of_port,
        }
    )
    expected = {"usual": usual, "port": of_port, "none": RegistrySettings()}[found]
    assert dial.settings_at(settings, scheme, host, port) == expected


def resolving_to(*addresses: str) -> Callable[..., list[Any]]:
    def getaddrinfo(host: str, port: int, **_: object) -> list[Any]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
            for address in addresses
        ]

    return getaddrinfo


def test_one_private_address_among_public_ones_is_enough_to_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to("1.1.1.1", "10.0.0.7"))
    with pytest.raises(AddressDenied, match=r"10\.0\.0\.7"):
        dial.connect("a.example", 443, private=(), connect_seconds=1, read_seconds=1)


def test_the_name_is_resolved_once_and_the_judged_address_is_used(
    peer: "Peer", monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def rebinding(host: str, port: int, **_: object) -> list[Any]:
        asked.append(host)
        return resolving_to("127.0.0.1" if len(asked) == 1 else "127.0.0.99")(host, port)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    here = RegistrySettings(plain_http=True, private_address=True)
    name = f"rebind.example:{peer.port}"
    peer.answer = lambda _: peer.reply(200)
    with dial.session(Settings(registries={name: here})) as session:
        response = session.follow("GET", f"http://{name}/", {})
        dial.release(response)
    assert asked == ["rebind.example"]
    assert peer.seen[0].headers["Host"] == name


def test_the_next_address_is_tried_when_one_refuses(
    peer: "Peer", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to("127.0.0.2", "127.0.0.1"))
    with dial.connect(
        "a.example", peer.port, private=dial.EVERYWHERE, connect_seconds=1, read_seconds=7
    ) as connection:
        assert connection.getpeername()[0] == "127.0.0.1"
        assert connection.gettimeout() == 7


def test_a_name_without_addresses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to())
    with pytest.raises(OSError, match="no address"):
        dial.connect("a.example", 443, private=(), connect_seconds=1, read_seconds=1)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]"]
)
def test_loopback_is_denied_however_it_is_written(host: str, peer: "Peer") -> None:
    port = peer.port
    here = RegistrySettings(plain_http=True)
    names = {f"{name}:{port}" for name in (host, "[::1]")}
    settings = Settings(registries=dict.fromkeys(names, here))
    with dial.session(settings) as session, pytest.raises(AddressDenied):
        session.follow("GET", f"http://{host}:{port}/", {})
    assert not peer.seen


def test_private_address_counts_for_its_own_port_only(
    peers: Callable[[], "Peer"],
) -> None:
    peer, other = peers(), peers()
    registries = {
        peer.host: RegistrySettings(plain_http=True, private_address=True),
        other.host: RegistrySettings(plain_http=True),
    }
    with dial.session(Settings(registries=registries)) as session:
        with pytest.raises(AddressDenied):
            session.follow("GET", f"{other.url}/", {})
        peer.answer = lambda _: peer.reply(302, Location=f"{other.url}/secret")
        with pytest.raises(AddressDenied):
            session.follow("GET", f"{peer.url}/", {})
    assert not other.seen


def test_plain_http_is_denied_unless_configured(peer: "Peer") -> None:
    settings = Settings(registries={peer.host: RegistrySettings(private_address=True)})
    with dial.session(settings) as session, pytest.raises(AddressDenied) as caught:
        session.follow("GET", f"{peer.url}/", {})
    assert "plain_http" in caught.value.advice


@pytest.mark.parametrize("same_origin", [True, False])
def test_authorization_stays_with_its_origin(
    same_origin: bool, peers: Callable[[], "Peer"]
) -> None:
    peer, other = peers(), peers()
    target = peer if same_origin else other
    here = RegistrySettings(plain_http=True, private_address=True)

    def redirecting(request: "Request") -> "Answer":
        return (
            peer.reply(200) if request.path == "/b" else peer.reply(307, Location=f"{target.url}/b")
        )

    peer.answer = other.answer = redirecting
    with dial.session(
        Settings(registries={peer.host: sending(here, other), other.host: here})
    ) as session:
        headers = {"Authorization": "Basic x", "Accept": "y"}
        dial.release(session.follow("GET", f"{peer.url}/a", headers))
    assert peer.seen[0].headers["Authorization"] == "Basic x"
    assert ("Authorization" in target.seen[-1].headers) is same_origin
    assert target.seen[-1].headers["Accept"] == "y"


def test_authorization_does_not_come_back_when_a_redirect_returns(
    peers: Callable[[], "Peer"],
) -> None:
    peer, other = peers(), peers()
    here = RegistrySettings(plain_http=True, private_address=True)
    other.answer = lambda _: peer.reply(302, Location=f"{peer.url}/end")
    peer.answer = lambda request: (
        peer.reply(200) if request.path == "/end" else peer.reply(302, Location=f"{other.url}/")
    )
    with dial.session(
        Settings(registries={peer.host: sending(here, other), other.host: here})
    ) as session:
        dial.release(session.follow("GET", f"{peer.url}/", {"Authorization": "Basic x"}))
    assert "Authorization" not in peer.seen[-1].headers


@pytest.mark.parametrize("answer", [301, 307])
def test_a_registry_cannot_send_us_to_another_that_is_configured(
    answer: int, peers: Callable[[], "Peer"]
) -> None:
    peer, other = peers(), peers()
    here = RegistrySettings(plain_http=True, private_address=True)
    peer.answer = lambda _: peer.reply(answer, Location=f"{other.url}/secret")
    with (
        dial.session(Settings(registries={peer.host: here, other.host: here})) as session,
        pytest.raises(AddressDenied),
    ):
        session.follow("GET", f"{peer.url}/", {})
    assert other.seen == []


def test_redirects_end(peer: "Peer") -> None:
    peer.answer = lambda _: peer.reply(302, Location="/again")
    with dial.session(peer.settings) as session, pytest.raises(RegistryProtocol, match="redirects"):
        session.follow("GET", f"{peer.url}/", {})
    assert len(peer.seen) == 4


def test_other_methods_never_follow(peer: "Peer") -> None:
    peer.answer = lambda _: peer.reply(307, b"x" * 100, Location="/again")
    with (
        dial.session(peer.settings) as session,
        session.request("PUT", f"{peer.url}/", data=b"data") as response,
    ):
        assert response.status_code == 307
    assert len(peer.seen) == 1


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://a.example/",
        "https://user:secret@a.example/",
        "https://a.example\\@b.example/",
        "https://a.example:99999/",
        "https://a.example:0/",
        "https://[::1/",
        "https://a.example/a b",
        "https://a.example/\x01",
        "https://\u0430.example/",
        "gopher:x",
    ],
)
def test_a_location_that_is_no_plain_url_is_refused(location: str) -> None:
    with pytest.raises(RegistryProtocol):
        dial.resolve("https://a.example/v2/", location)


def test_a_relative_location_is_resolved() -> None:
    assert dial.resolve("https://a.example/v2/x", "/y?z=1") == "https://a.example/y?z=1"
    assert dial.origin("https://A.example/v2") == ("https", "a.example", 443)


def test_nothing_ambient_is_used(
    peer: "Peer", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n", encoding="ascii")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    peer.answer = lambda _: peer.reply(200, Set_Cookie="a=b; Path=/")
    with dial.session(peer.settings) as session:
        for _ in range(2):
            dial.release(session.follow("GET", f"{peer.url}/", {}))
    assert not {"Authorization", "Cookie"} & set(peer.seen[-1].headers)
    assert peer.seen[-1].headers["Accept-Encoding"] == "identity"


def test_a_small_answer_is_bounded_in_bytes(peer: "Peer") -> None:
    peer.answer = lambda _: peer.reply(200, b"x" * 101)
    with dial.session(peer.settings) as session:
        with pytest.raises(RegistryProtocol, match="more than 100 bytes"):
            dial.read_small(session.follow("GET", f"{peer.url}/", {}), 100, 5)
        response = session.follow("GET", f"{peer.url}/", {})
        assert dial.read_small(response, 101, 5) == b"x" * 101


def test_a_small_answer_is_bounded_in_time(peer: "Peer") -> None:
    peer.answer = lambda _: peer.reply(200, b"x")
    with dial.session(peer.settings) as session, pytest.raises(RegistryProtocol, match="takes"):
        dial.read_small(session.follow("GET", f"{peer.url}/", {}), 100, -1)


def test_an_encoded_answer_is_refused(peer: "Peer") -> None:
    peer.answer = lambda _: peer.reply(200, b"x", Content_Encoding="gzip")
    with dial.session(peer.settings) as session, pytest.raises(RegistryProtocol, match="encodes"):
        dial.read_small(session.follow("GET", f"{peer.url}/", {}), 100, 5)


@given(st.text())
def test_a_peers_words_are_shown_without_controls(text: str) -> None:
    assert dial.shown(text, 50).isprintable()
    assert dial.shown(text, 50).isascii()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
        check=True, capture_output=True, env={**os.environ, "OPENSSL_CONF": "/dev/null"},
    )  # fmt: skip
    return cert, key


@pytest.fixture
def tls_port(certificate: tuple[Path, Path]) -> Iterator[tuple[int, list[str | None]]]:
    """A TLS server for one connection; the names that its client sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    names: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)

        def serve() -> None:
            with listener.accept()[0] as plain:
                plain.settimeout(5)
                try:
                    with context.wrap_socket(plain, server_side=True) as connection:
                        connection.recv(65536)
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                except OSError:
                    return  # the client did not like the certificate

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], names
        thread.join()


def fetch_over_tls(host: str, port: int) -> bytes:
    settings = Settings(registries={f"{host}:{port}": RegistrySettings(private_address=True)})
    with dial.session(settings) as session:
        return dial.read_small(session.follow("GET", f"https://{host}:{port}/", {}), 10, 5)


def test_a_certificate_of_the_systems_store_is_accepted(
    certificate: tuple[Path, Path],
    tls_port: tuple[int, list[str | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to("127.0.0.1"))
    port, names = tls_port
    assert fetch_over_tls("localhost", port) == b"ok"
    assert names == ["localhost"]


def test_a_certificate_for_another_host_is_refused(
    certificate: tuple[Path, Path],
    tls_port: tuple[int, list[str | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to("127.0.0.1"))
    with pytest.raises(requests.exceptions.SSLError):
        fetch_over_tls("other.example", tls_port[0])


def test_an_unknown_certificate_is_refused(
    tls_port: tuple[int, list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to("127.0.0.1"))
    with pytest.raises(requests.exceptions.SSLError):
        fetch_over_tls("localhost", tls_port[0])

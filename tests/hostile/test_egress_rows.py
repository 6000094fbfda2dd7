"""Attacks through the egress proxy, by their row in the list of threats.

Beside each test stands the line whose removal makes it fail. Names lead where a hostile name
server would send them; whatever is connected to in the end is on loopback.
"""

import base64
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from policies.model import EgressRule, Network
from runner.errors import AddressDenied, PolicyDenied, QuotaExceeded
from runner.gateway import ledger
from tests.support import egress as support
from tests.support.egress import HOST, OK, Names, Origin, hello, rule
from tests.support.gateway import Gate, Gates, connect, speak, statuses

METADATA = "169.254.169.254"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return support.only_names(monkeypatch)


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every address of the Internet's kind that this process connected to; it got nowhere."""
    addresses: list[Any] = []
    really = socket.socket.connect

    def note(this: socket.socket, address: Any) -> None:
        if this.family == socket.AF_UNIX or address[0] == "127.0.0.1":
            really(this, address)
            return
        addresses.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", note)
    return addresses


@pytest.fixture
def site() -> Iterator[Origin]:
    with support.origin() as made:
        yield made


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[Gates]:
    with Gates(tmp_path) as made:
        yield made


def having(gates: Gates, *rules: EgressRule, **fields: Any) -> Gate:
    """A session whose RUN steps may go where ``rules`` say."""
    return gates.open(network=Network.EGRESS, egress=(rules,), **fields)


def head(gate: Gate, method: str, target: str, *lines: str) -> bytes:
    login = f"Proxy-Authorization: {gate.login}"
    return "\r\n".join((f"{method} {target} HTTP/1.1", "Host: a", login, *lines, "", "")).encode()


def get(gate: Gate, target: str) -> bytes:
    return speak(gate.path, head(gate, "GET", target))


def connected(gate: Gate, target: str) -> bytes:
    return speak(gate.path, head(gate, "CONNECT", target))


def tunnelled(gate: Gate, target: str, data: bytes) -> bytes:
    """What comes out of a tunnel that ``data`` was sent into at once."""
    return speak(gate.path, head(gate, "CONNECT", target) + data, end=False)


# -- row 7: metadata and everything else that is not public ---------------------------------------


# Defence: ``if closed:`` in runner.registry.dial.connect.
@pytest.mark.parametrize("address", [METADATA, "10.0.0.1", "127.0.0.53", "192.168.1.1", "0.0.0.0"])
def test_row_7_an_allowed_name_that_leads_inwards(
    address: str, gates: Gates, names: Names, dialled: list[Any]
) -> None:
    gate = having(gates, EgressRule(hosts=(HOST,), ports=(80, 443)))
    names.known[HOST] = ("1.1.1.1", address)
    assert statuses(get(gate, f"http://{HOST}/latest/meta-data/")) == [403]
    assert statuses(connected(gate, f"{HOST}:443")) == [403]
    assert dialled == []
    assert isinstance(gate.session.failure, AddressDenied)


# Defence: ``_NUMBER`` in runner.gateway.authority, and ``is_address`` in policies.grants._names.
@pytest.mark.parametrize(
    "host",
    [METADATA, "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518", "0xa9.254.1",
     "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "169.254.169.254."],
)  # fmt: skip
def test_row_7_an_address_in_another_spelling(
    host: str, gates: Gates, names: Names, dialled: list[Any]
) -> None:
    wild = ("*.254", "*.169.254", "*.43518", "*.0376", "*.1", "2852039166", "0xa9fea9fe")
    gate = having(gates, EgressRule(hosts=wild, ports=(80, 443), private_ranges=("0.0.0.0/0",)))
    assert statuses(get(gate, f"http://{host}/")) in ([400], [403])
    assert statuses(connected(gate, f"{host}:443")) in ([400], [403])
    assert (names.asked, dialled) == ([], [])


# Defence: ``connection.connect(address)``, of the address that was judged, in dial.connect.
def test_row_7_a_name_that_leads_elsewhere_a_moment_later(
    gates: Gates, site: Origin, monkeypatch: pytest.MonkeyPatch, dialled: list[Any]
) -> None:
    answers = iter(["127.0.0.1", METADATA, METADATA, METADATA])

    def rebinding(host: str, port: int, *_: object, **__: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (next(answers), port))]

    gate = having(gates, rule(site.port))
    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert statuses(get(gate, f"http://{HOST}:{site.port}/")) == [200]
    assert dialled == []


# Defence: the proxy follows nothing: HttpExchange passes every status on.
@pytest.mark.parametrize("location", [f"http://{METADATA}/", "http://127.0.0.1:1/", "//evil/"])
def test_row_7_an_allowed_host_that_redirects_inwards(
    location: str, gates: Gates, site: Origin, names: Names, dialled: list[Any]
) -> None:
    site.says(f"HTTP/1.1 307 Go\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())
    gate = having(gates, rule(site.port))
    answer = get(gate, f"http://{HOST}:{site.port}/")
    assert statuses(answer) == [307]
    assert (names.asked, dialled) == ([HOST], [])
    assert statuses(get(gate, location)) in ([403], [404], [401]), "as the client would follow it"
    assert (names.asked, dialled) == ([HOST], [])


# Defence: ``_in_both`` in policies.grants.may_connect.
def test_row_7_a_policy_of_ones_own_that_opens_private_ranges(
    gates: Gates, names: Names, dialled: list[Any]
) -> None:
    theirs = EgressRule(hosts=(HOST,), ports=(80,))
    ours = EgressRule(hosts=(HOST,), ports=(80,), private_ranges=("0.0.0.0/0",))
    names.known[HOST] = (METADATA,)
    for sets in (((theirs,), (ours,)), ((ours,), (theirs,))):
        gate = gates.open(network=Network.EGRESS, egress=sets)
        assert statuses(get(gate, f"http://{HOST}/")) == [403]
    assert dialled == []


# -- row 8: names as messages ---------------------------------------------------------------------


SECRET = base64.b32encode(b"the context's secret").decode().strip("=").lower()


# Defence: ``if rule is None`` in Egress._rule, which stands before _dial.
@pytest.mark.parametrize("suffix", ["evil.example", f"{HOST}.evil.example", f"x.{HOST}", "org"])
def test_row_8_a_name_that_carries_a_secret_is_never_resolved(
    suffix: str, gates: Gates, names: Names
) -> None:
    gate = having(gates, EgressRule(hosts=(HOST,), ports=(80, 443)))
    assert statuses(get(gate, f"http://{SECRET}.{suffix}/")) == [403]
    assert statuses(connected(gate, f"{SECRET}.{suffix}:443")) == [403]
    assert names.asked == []


# Defence: ``Network.EGRESS`` in Egress._rule and in may_connect; one of them is enough.
@pytest.mark.parametrize("network", [Network.NONE, Network.REGISTRIES])
def test_row_8_no_name_is_resolved_without_egress(
    network: Network, gates: Gates, names: Names
) -> None:
    gate = gates.open(network=network, egress=((EgressRule(hosts=(HOST,), ports=(80, 443)),),))
    assert statuses(get(gate, f"http://{HOST}/")) == [403]
    assert statuses(connected(gate, f"{HOST}:443")) == [403]
    assert names.asked == []
    assert gate.session.proxy("127.0.0.1:5000") is None


# Defence: ``hmac.compare_digest`` in Egress._rule.
def test_row_8_the_token_of_another_session(gates: Gates, names: Names) -> None:
    ours, theirs = gates.open(), having(gates, EgressRule(hosts=(HOST,), ports=(80, 443)))
    stolen = head(ours, "GET", f"http://{HOST}/")
    assert statuses(speak(theirs.path, stolen)) == [407]
    assert names.asked == []


# -- row 30: one checked dialer for all -----------------------------------------------------------


# Defence: ``dial.connect`` in Egress._connected and in dial._dial: nothing else connects.
def test_row_30_every_way_out_refuses_an_address_that_is_not_public(
    gates: Gates, names: Names, dialled: list[Any]
) -> None:
    gate = having(gates, EgressRule(hosts=("r.example",), ports=(80, 443)), fake=False)
    names.known["r.example"] = (METADATA,)
    assert gate.ask("GET", "/v2/r.example/base/manifests/1").status in {403, 404}
    assert statuses(get(gate, "http://r.example/")) == [403]
    assert statuses(connected(gate, "r.example:443")) == [403]
    assert dialled == []
    assert names.asked == ["r.example"] * 3


# -- row 31: allowed hosts as a way to others -----------------------------------------------------


# Defence: ``hello.server_name != self._visit.host`` in TlsTunnel._first.
@pytest.mark.parametrize("server_name", ["evil.example", f"{SECRET}.{HOST}", f"{HOST}.evil", None])
def test_row_31_a_tunnel_to_an_allowed_host_for_another_one(
    server_name: str | None, gates: Gates, names: Names, site: Origin
) -> None:
    gate = having(gates, rule(site.port))
    tunnelled(gate, f"{HOST}:{site.port}", hello(server_name))
    assert site.seen in ([], [b""])
    assert isinstance(gate.session.failure, PolicyDenied)


# Defence: ``clienthello.read`` in TlsTunnel._first.
@pytest.mark.parametrize("first", [b"SSH-2.0-x\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0"])
def test_row_31_another_protocol_through_a_tunnel(
    first: bytes, gates: Gates, names: Names, site: Origin
) -> None:
    gate = having(gates, rule(site.port))
    assert statuses(tunnelled(gate, f"{HOST}:{site.port}", first)) == [200]
    assert site.seen in ([], [b""])


# Defence: ``target.header`` as Host in HttpExchange._ask, and ``host`` in _HOP_BY_HOP.
def test_row_31_a_host_header_for_another_tenant_of_the_same_address(
    gates: Gates, names: Names, site: Origin
) -> None:
    gate = having(gates, rule(site.port))
    data = head(gate, "GET", f"http://{HOST}:{site.port}/").replace(b"Host: a", b"Host: evil.org")
    assert statuses(speak(gate.path, data)) == [200]
    assert f"\r\nHost: {HOST}:{site.port}\r\n".encode() in site.seen[0]
    assert b"evil" not in site.seen[0]


# Defence: ``"@" in text`` in runner.gateway.authority, ``_without_secrets`` in the ledger, and
# ``_through``, which sets a visit's path only once it was read.
def test_row_31_nothing_secret_is_sent_along_or_written_down(
    gates: Gates, names: Names, site: Origin
) -> None:
    gate = having(gates, rule(site.port))
    authority = f"{HOST}:{site.port}"
    assert statuses(get(gate, f"http://user:hunter2@{authority}/")) == [400]
    assert statuses(connected(gate, f"user:hunter2@{authority}")) == [400]
    for unread in ("user:hunter2@h/", "ftp:hunter2@h/", "http:hunter2", "*hunter2"):
        assert statuses(get(gate, unread)) == [400]
    assert gate.ask("GET", "//user:hunter2@h/x").status == 404
    assert statuses(get(gate, f"http://{authority}/path?token=hunter2")) == [200]
    assert gate.session.token.encode() not in b"".join(site.seen)
    assert b"proxy-authorization" not in b"".join(site.seen).lower()
    gate.session.close()
    ledger = (gate.home / "ledger.jsonl").read_text()
    assert "hunter2" not in ledger
    assert gate.session.token not in ledger
    assert ledger.count('"denied"') == 7
    assert ledger.count('"allowed"') == 1


# Defence: ``reserve`` in Egress.answer, and the part of the ledger that registries cannot fill.
def test_row_31_a_ledger_that_was_filled_on_purpose_hides_nothing(
    gates: Gates, names: Names, site: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "REGISTRY_BYTES", 4 * ledger.LINE_BYTES)
    monkeypatch.setattr(ledger, "MOST_BYTES", 6 * ledger.LINE_BYTES)
    gate = having(gates, rule(site.port))
    for _ in range(100):
        gate.ask("GET", "/v2/")
    answered = [statuses(get(gate, f"http://{HOST}:{site.port}/")) for _ in range(40)]
    assert answered[0] == [200]
    assert answered[-1] == [503]
    assert isinstance(gate.session.failure, QuotaExceeded)
    gate.session.close()
    lines = (gate.home / "ledger.jsonl").read_text()
    assert len(site.seen) == lines.count('"http"') == answered.count([200])


# Defence: the wire of its own that each HttpExchange has, and its framing by h11.
def test_row_31_a_request_inside_a_request_gets_no_connection_of_its_own(
    gates: Gates, names: Names, site: Origin
) -> None:
    inner = b"GET /hidden HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    site.says(OK + OK)
    gate = having(gates, rule(site.port))
    lines = (f"Content-Length: {len(inner)}", "Connection: Content-Length, Host")
    data = head(gate, "POST", f"http://{HOST}:{site.port}/", *lines) + inner
    assert statuses(speak(gate.path, data)) == [200]
    assert len(site.seen) == 1
    assert f"content-length: {len(inner)}".encode() in site.seen[0].lower()


# Defence: ``self._egress.close()`` in Session.close.
def test_row_31_a_request_that_is_left_behind(gates: Gates, names: Names, site: Origin) -> None:
    asked, ended = threading.Event(), threading.Event()

    def hold(_: bytes, peer: socket.socket) -> None:
        asked.set()
        assert peer.recv(1) == b"", "the session's end is seen outside"
        ended.set()

    site.answer = hold
    gate = having(gates, rule(site.port))
    with connect(gate.path) as left_behind:
        left_behind.sendall(head(gate, "GET", f"http://{HOST}:{site.port}/"))
        assert asked.wait(5)
        begun = time.monotonic()
        gate.session.close()
        assert time.monotonic() - begun < 2
        assert ended.wait(2)

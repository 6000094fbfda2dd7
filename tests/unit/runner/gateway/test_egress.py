"""The egress proxy with real sockets: what it lets through, and what it refuses before it asks.

Every host is on loopback, which the rules of these tests open; names are known to this process.
"""

import base64
import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.model import EgressRule, Grant, Limits, Network
from runner.errors import AddressDenied, PolicyDenied, QuotaExceeded, RunnerError
from runner.gateway.authority import TargetRefused, of_absolute, of_tunnel
from runner.gateway.egress import LOOKUPS, Egress
from runner.gateway.forward import EgressBounds
from runner.gateway.http import Bounds, Server
from runner.gateway.ledger import Entry
from tests.support import egress as support
from tests.support.egress import HOST, OK, Names, Origin, headers_of, hello, rule
from tests.support.gateway import connect, decision, speak, statuses

LOGIN = b"Basic " + base64.b64encode(b"session:token")
BOUNDS = EgressBounds(connect_seconds=1, hello_seconds=0.3, idle_seconds=1, header_bytes=4096)
MIB = 1 << 20


def granted(*rules: EgressRule, **fields: Any) -> Grant:
    return decision(**{"network": Network.EGRESS, "egress": (rules,), **fields}).grant


class Proxy:
    """The proxy of one session on a Unix socket."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "proxy"
        self.entries: list[Entry] = []
        self.notes: list[RunnerError] = []
        self.failures: list[Exception] = []
        self.room = 1000
        self.egress = Egress(
            granted(),
            login=LOGIN,
            record=self.entries.append,
            note=self.notes.append,
            bounds=BOUNDS,
            reserve=self.reserve,
        )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        here = os.open(directory, os.O_PATH)
        listener.bind(f"/proc/self/fd/{here}/proxy")
        os.close(here)
        listener.listen(64)
        self.server = Server(
            listener,
            self.egress.answer,
            peer_uid=os.geteuid(),
            failed=self.failures.append,
            bounds=Bounds(idle_seconds=2, body_seconds=2, close_seconds=1),
        )

    def reserve(self) -> None:
        if not self.room:
            raise QuotaExceeded("the ledger is full")
        self.room -= 1

    def allow(self, *rules: EgressRule, **fields: Any) -> None:
        self.egress.decide(granted(*rules, **fields))

    def head(self, method: str, target: str, *lines: str, version: str = "1.1") -> bytes:
        fixed = (
            f"{method} {target} HTTP/{version}",
            "Host: proxy",
            f"Proxy-Authorization: {LOGIN.decode()}",
        )
        return "\r\n".join((*fixed, *lines, "", "")).encode()

    def ask(self, target: str, *lines: str, method: str = "GET", body: bytes = b"") -> bytes:
        """The whole answer to one request in absolute form, or to a CONNECT."""
        return speak(self.path, self.head(method, target, *lines) + body)

    def tunnel(self, authority: str) -> socket.socket:
        """A connection with a tunnel, which the caller closes."""
        peer = connect(self.path)
        peer.sendall(self.head("CONNECT", authority))
        assert statuses(peer.recv(1000)) == [200]
        return peer

    def entry(self) -> Entry:
        """The next one."""
        end = time.monotonic() + 5
        while not self.entries:
            assert time.monotonic() < end, "nothing was recorded"
            time.sleep(0.01)
        return self.entries.pop(0)

    def close(self) -> None:
        self.egress.close()
        self.server.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return support.only_names(monkeypatch)


@pytest.fixture
def proxy(tmp_path: Path, names: Names) -> Iterator[Proxy]:
    made = Proxy(tmp_path)
    yield made
    made.close()
    assert made.failures == []
    assert made.egress._connections == 0
    assert made.egress._wires == set()


@pytest.fixture
def site() -> Iterator[Origin]:
    with support.origin() as made:
        yield made


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return support.certificate(tmp_path_factory.mktemp("keys"), HOST)


@pytest.fixture
def tls_site(keys: tuple[Path, Path]) -> Iterator[Origin]:
    with support.origin(support.server_side(*keys)) as made:
        yield made


def holding(site: Origin) -> threading.Event:
    """Until this is set, the host says nothing."""
    release = threading.Event()

    def hold(_: bytes, __: socket.socket) -> None:
        release.wait(10)

    site.answer = hold
    return release


def received(peer: socket.socket) -> bytes:
    """Everything until the end of the connection."""
    data = b""
    with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
        while piece := peer.recv(65536):
            data += piece
    return data


# -- one spelling for each host -------------------------------------------------------------------

SPELLINGS = (
    "2130706433", "0x7f000001", "017700000001", "0177.0.0.1", "0x7f.0.0.1", "127.1", "127.0.1",
    "127.0.0.01", "127.0.0.0x1", "1.1", "0", "127.0.0.1.1", "256.0.0.1", "[::1]", "[::]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[::127.0.0.1]", "[::1%25lo]",
    "[fe80::1%lo]", "[127.0.0.1]", "[localhost]", "::1", "%31%32%37.0.0.1", "127%2e0%2e0%2e1",
    "127.0.0.1%00", "127.0.0.1..", ".127.0.0.1", "files.example.org..", "files..example.org",
    "files.example.org%00.evil", "files.example.org\\@evil", "files_x.example.org", "-x.org", "",
    "x" * 64 + ".org", ".".join(["x" * 60] * 5),
)  # fmt: skip


@pytest.mark.parametrize("host", SPELLINGS)
def test_an_unusual_spelling_reaches_nothing_and_is_never_resolved(
    host: str, proxy: Proxy, names: Names
) -> None:
    proxy.allow(
        EgressRule(hosts=("*.0.1", "*.1", "*.org", "127.0.0.1", "1"), ports=(80, 443)),
    )
    assert statuses(proxy.ask(f"http://{host}/")) == [400]
    assert statuses(proxy.ask(f"{host}:443", method="CONNECT")) == [400]
    assert names.asked == []
    assert [entry.decision for entry in proxy.entries] == ["denied", "denied"]
    assert "refused" in proxy.notes[0].message


@pytest.mark.parametrize("host", ["127\u30020\u30020\u30021", "\uff11.0.0.1", "\u212a.org"])
def test_a_name_that_is_not_ascii_is_refused(host: str) -> None:
    for read in (lambda: of_tunnel(f"{host}:1"), lambda: of_absolute(f"http://{host}/")):
        with pytest.raises(TargetRefused):
            read()


@pytest.mark.parametrize("spelling", ["127.0.0.1", "127.0.0.1."])
def test_an_address_matches_the_rule_that_names_it_and_no_other(
    spelling: str, proxy: Proxy, site: Origin, names: Names
) -> None:
    url = f"http://{spelling}:{site.port}/"
    proxy.allow(rule(site.port, "*.0.0.1", "*.1"))
    assert statuses(proxy.ask(url)) == [403]
    assert names.asked == []
    proxy.allow(rule(site.port, "127.0.0.1"))
    assert statuses(proxy.ask(url)) == [200]


@pytest.mark.parametrize("spelling", [HOST, HOST.upper(), f"{HOST}."])
def test_a_name_is_normalised_once(spelling: str, proxy: Proxy, site: Origin, names: Names) -> None:
    proxy.allow(rule(site.port))
    assert statuses(proxy.ask(f"HTTP://{spelling}:{site.port}/")) == [200]
    assert names.asked == [HOST]
    assert headers_of(site.seen[0])["host"] == f"{HOST}:{site.port}"


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40))
def test_whatever_is_read_is_its_own_only_spelling(text: str) -> None:
    try:
        target = of_tunnel(text)
    except TargetRefused:
        return
    assert of_tunnel(str(target)) == target
    assert target.host == target.host.lower()
    assert not set(target.host) - set("abcdefghijklmnopqrstuvwxyz0123456789-.")


@pytest.mark.parametrize(
    "target",
    [
        "http://user:secret@files.example.org/",
        "http://user@files.example.org/",
        "http://files.example.org:443@evil.example/",
        "http://files.example.org:0/",
        "http://files.example.org:65536/",
        "http://files.example.org:/",
        "http://files.example.org:80:80/",
        "http://files.example.org/#fragment",
        "http:files.example.org/",
        "http:///files.example.org/",
        "https://files.example.org/",
        "ftp://files.example.org/",
        "files.example.org:80",
        "*",
    ],
)
def test_a_target_that_is_no_plain_url_is_refused(target: str, proxy: Proxy, names: Names) -> None:
    proxy.allow(EgressRule(hosts=(HOST, "*.example"), ports=(80, 443)))
    assert statuses(proxy.ask(target)) == [400]
    assert names.asked == []
    assert "secret" not in proxy.notes[0].message
    assert proxy.entry().path == ""


@pytest.mark.parametrize(
    "target", ["files.example.org", "files.example.org:0", "u:p@files.example.org:443", ":443"]
)
def test_a_tunnel_needs_a_host_and_a_port(target: str, proxy: Proxy, names: Names) -> None:
    proxy.allow(EgressRule(hosts=(HOST,), ports=(443,)))
    assert statuses(proxy.ask(target, method="CONNECT")) == [400]
    assert names.asked == []


# -- what the decision allows ---------------------------------------------------------------------


def test_a_session_without_egress_answers_every_request_with_403(
    proxy: Proxy, names: Names
) -> None:
    proxy.allow(rule(80, HOST), network=Network.REGISTRIES)
    assert statuses(proxy.ask(f"http://{HOST}/")) == [403]
    assert statuses(proxy.ask(f"{HOST}:80", method="CONNECT")) == [403]
    assert statuses(speak(proxy.path, b"GET http://a.b/ HTTP/1.1\r\nHost: a\r\n\r\n")) == [403]
    assert names.asked == []
    assert [(e.kind, e.host, e.decision, e.status) for e in proxy.entries] == [
        ("http", HOST, "denied", 403),
        ("connect", HOST, "denied", 403),
        ("http", "a.b", "denied", 403),
    ]
    assert "this build has no egress" in proxy.notes[0].message


def test_a_host_that_no_rule_names_is_denied_unresolved_and_the_person_hears_how_to_mend_it(
    proxy: Proxy, names: Names
) -> None:
    proxy.allow(rule(443, "other.example.org"))
    answer = proxy.ask(f"{HOST}:443", method="CONNECT")
    assert answer.startswith(b"HTTP/1.1 403 egress to files.example.org:443 is not allowed")
    assert names.asked == []
    (note,) = proxy.notes
    assert isinstance(note, PolicyDenied)
    assert note.message == "egress to files.example.org:443 is not allowed by policy"
    assert "runner egress ID --suggest" in note.advice


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("a.example.org", 200),
        ("a.b.example.org", 200),
        ("example.org", 403),
        ("evilexample.org", 403),
        ("a.example.org.evil", 403),
    ],
)
def test_a_wildcard_is_of_what_lies_below_its_suffix(
    host: str, status: int, proxy: Proxy, site: Origin, names: Names
) -> None:
    names.known = {host: ("127.0.0.1",)}
    proxy.allow(rule(site.port, "*.example.org"))
    assert statuses(proxy.ask(f"http://{host}:{site.port}/")) == [status]
    assert names.asked == ([host] if status == 200 else [])


def test_a_port_that_the_rule_does_not_list_is_denied(proxy: Proxy, site: Origin) -> None:
    proxy.allow(rule(site.port))
    for port in (80, 22, site.port + 1):
        assert statuses(proxy.ask(f"{HOST}:{port}", method="CONNECT")) == [403]
        assert statuses(proxy.ask(f"http://{HOST}:{port}/")) == [403]


def test_a_rule_with_methods_allows_those_and_no_tunnel(proxy: Proxy, site: Origin) -> None:
    proxy.allow(rule(site.port, methods=("GET", "HEAD")))
    url = f"http://{HOST}:{site.port}/"
    assert statuses(proxy.ask(url)) == [200]
    assert statuses(proxy.ask(url, method="POST")) == [403]
    assert statuses(proxy.ask(f"{HOST}:{site.port}", method="CONNECT")) == [403]


def test_of_each_set_of_rules_one_has_to_allow_it(proxy: Proxy, site: Origin) -> None:
    ours, url = rule(site.port), f"http://{HOST}:{site.port}/"
    for egress, status in {
        (): 403,
        ((),): 403,
        ((ours,),): 200,
        ((ours,), ()): 403,
        ((ours,), (rule(site.port, "*.example.org"),)): 200,
        ((ours,), (rule(1),)): 403,
    }.items():
        proxy.allow(egress=egress)
        assert statuses(proxy.ask(url)) == [status], egress


def test_without_the_sessions_token_nothing_is_resolved(
    proxy: Proxy, names: Names, site: Origin
) -> None:
    proxy.allow(rule(site.port))
    url = f"http://{HOST}:{site.port}/"
    for lines in (
        (),
        ("Proxy-Authorization: Basic guess",),
        (f"Authorization: {LOGIN.decode()}",),
        (f"Proxy-Authorization: {LOGIN.decode()}", f"Proxy-Authorization: {LOGIN.decode()}"),
    ):
        data = "\r\n".join((f"GET {url} HTTP/1.1", "Host: a", *lines, "", "")).encode()
        answer = speak(proxy.path, data)
        assert statuses(answer) == [407]
        assert b"proxy-authenticate: basic" in answer.lower()
    assert names.asked == []


@pytest.mark.parametrize("address", ["10.0.0.7", "169.254.169.254", "127.0.0.1", "100.64.0.1"])
def test_a_name_that_leads_to_a_closed_address_is_denied(
    address: str, proxy: Proxy, names: Names
) -> None:
    names.known[HOST] = ("1.1.1.1", address)
    proxy.allow(EgressRule(hosts=(HOST,), ports=(443,), private_ranges=("192.168.0.0/16",)))
    assert statuses(proxy.ask(f"{HOST}:443", method="CONNECT")) == [403]
    (note,) = proxy.notes
    assert isinstance(note, AddressDenied)
    assert address in note.message
    assert "private_ranges" in note.advice


def test_a_private_range_has_to_be_opened_by_every_set(proxy: Proxy, site: Origin) -> None:
    closed = EgressRule(hosts=(HOST,), ports=(site.port,))
    half = replace(closed, private_ranges=("127.0.0.0/25", "10.0.0.0/8"))
    url = f"http://{HOST}:{site.port}/"
    for others, status in {closed: 403, half: 200}.items():
        proxy.allow(egress=((rule(site.port),), (others,)))
        assert statuses(proxy.ask(url)) == [status]


def test_a_name_is_resolved_once_for_each_request(proxy: Proxy, names: Names, site: Origin) -> None:
    proxy.allow(rule(site.port))
    proxy.ask(f"http://{HOST}:{site.port}/")
    assert names.asked == [HOST]


@pytest.mark.parametrize("method", ["GET", "CONNECT"])
def test_a_host_that_cannot_be_reached_is_a_bad_gateway_and_no_denial(
    method: str, proxy: Proxy, names: Names
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    proxy.allow(rule(port, HOST, "gone.example.org"))
    for host in (HOST, "gone.example.org"):
        target = f"{host}:{port}" if method == "CONNECT" else f"http://{host}:{port}/"
        assert statuses(proxy.ask(target, method=method)) == [502]
    assert proxy.notes == []


# -- absolute form --------------------------------------------------------------------------------


def test_a_request_arrives_as_the_client_meant_it_and_without_what_is_the_proxys(
    proxy: Proxy, site: Origin
) -> None:
    proxy.allow(rule(site.port))
    proxy.ask(
        f"http://{HOST}:{site.port}/a/%2e%2e/b?q=%00&x",
        "Proxy-Connection: keep-alive", "Connection: keep-alive, X-Hop", "X-Hop: 1", "TE: trailers",
        "Keep-Alive: 5", "Upgrade: h2c", "Accept: */*", "Authorization: Basic theirs",
        "X-Forwarded-For: 10.0.0.1",
    )  # fmt: skip
    (seen,) = site.seen
    assert seen.startswith(b"GET /a/%2e%2e/b?q=%00&x HTTP/1.1\r\n")
    assert headers_of(seen) == {
        "host": f"{HOST}:{site.port}",
        "accept": "*/*",
        "authorization": "Basic theirs",
        "x-forwarded-for": "10.0.0.1",
        "connection": "close",
    }


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (("Content-Length: 5",), b"hello"),
        (("Transfer-Encoding: chunked",), b"2\r\nhe\r\n3\r\nllo\r\n0\r\nTrailer: x\r\n\r\n"),
    ],
)
def test_a_body_is_carried_in_the_framing_that_it_had(
    lines: tuple[str, ...], body: bytes, proxy: Proxy, site: Origin
) -> None:
    arrived: list[bytes] = []

    def take(head: bytes, peer: socket.socket) -> None:
        received = head.partition(b"\r\n\r\n")[2]
        while not received.endswith((b"hello", b"0\r\n\r\n")):
            received += peer.recv(1000)
        arrived.append(received)
        peer.sendall(OK)

    site.answer = take
    proxy.allow(rule(site.port))
    answer = proxy.ask(f"http://{HOST}:{site.port}/", *lines, method="POST", body=body)
    assert statuses(answer) == [200]
    assert arrived in ([b"hello"], [b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"])
    entry = proxy.entry()
    assert (entry.sent_bytes, entry.received_bytes, entry.status) == (5, 2, 200)


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
         b"2\r\nok\r\n0\r\n\r\n"),
        (b"HTTP/1.0 200 OK\r\n\r\nok", b"2\r\nok\r\n0\r\n\r\n"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + OK, b"ok"),
        (OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"ok"),
    ],
)  # fmt: skip
def test_an_answer_is_passed_on_as_one_answer(
    answer: bytes, body: bytes, proxy: Proxy, site: Origin
) -> None:
    site.says(answer)
    proxy.allow(rule(site.port))
    request = proxy.head("GET", f"http://{HOST}:{site.port}/")
    given = speak(proxy.path, request * 2)
    assert given.split(b"\r\n\r\n", 1)[1].startswith(body + b"HTTP/1.1 200")
    assert statuses(given) == [200, 200]
    assert len(site.seen) == 2, "one connection for each request"


def test_headers_of_an_answer_are_kept_but_for_the_hop_by_hop_ones(
    proxy: Proxy, site: Origin
) -> None:
    site.says(
        b"HTTP/1.1 302 Found here\r\nLocation: http://elsewhere/\r\nSet-Cookie: a=1\r\n"
        b"Set-Cookie: b=2\r\nConnection: X-Hop\r\nX-Hop: 1\r\nProxy-Authenticate: Basic\r\n"
        b"Keep-Alive: 5\r\nX-Latin: \xe9\r\nContent-Length: 0\r\n\r\n"
    )
    proxy.allow(rule(site.port))
    answer = proxy.ask(f"http://{HOST}:{site.port}/")
    assert answer == (
        b"HTTP/1.1 302 Found here\r\nlocation: http://elsewhere/\r\nset-cookie: a=1\r\n"
        b"set-cookie: b=2\r\nx-latin: \xe9\r\nContent-Length: 0\r\n\r\n"
    )
    assert len(site.seen) == 1, "the client follows, and asks again"


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_an_answer_without_a_body_has_none(method: str, proxy: Proxy, site: Origin) -> None:
    status = b"200 OK" if method == "HEAD" else b"304 Not Modified"
    site.says(b"HTTP/1.1 " + status + b"\r\nContent-Length: 1000\r\nETag: x\r\n\r\n")
    proxy.allow(rule(site.port))
    request = proxy.head(method, f"http://{HOST}:{site.port}/")
    answers = speak(proxy.path, request * 2)
    assert answers.lower().count(b"content-length: 1000") == 2
    assert answers.count(b"\r\n\r\n") == 2


@pytest.mark.parametrize(
    "answer",
    {
        "two framings": b"HTTP/1.1 200\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
        "another coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        "no HTTP": b"SSH-2.0-OpenSSH\r\n",
        "nothing": b"",
        "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
        "switching": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: x\r\n\r\n",
        "endless interim": b"HTTP/1.1 102 Wait\r\n\r\n" * 100,
        "header bomb": b"HTTP/1.1 200 OK\r\nA: " + b"b" * 9000,
        "injected line": b"HTTP/1.1 200 OK\r\nA: b\rSet-Cookie: c\r\n\r\n",
    }.values(),
)
def test_an_answer_that_is_not_sound_is_a_bad_gateway(
    answer: bytes, proxy: Proxy, site: Origin
) -> None:
    site.says(answer)
    proxy.allow(rule(site.port))
    assert statuses(proxy.ask(f"http://{HOST}:{site.port}/")) == [502]
    assert proxy.entry().status == 502


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\nx\r\n",
    ],
)
def test_an_answer_that_breaks_off_does_so_for_the_client_too(
    answer: bytes, proxy: Proxy, site: Origin
) -> None:
    site.says(answer)
    proxy.allow(rule(site.port))
    given = proxy.ask(f"http://{HOST}:{site.port}/")
    assert statuses(given) == [200]
    assert given.partition(b"\r\n\r\n")[2] in {b"short", b"5\r\nshort\r\n"}
    assert proxy.entry().received_bytes == 5


def test_an_answer_in_crumbs_is_cut_off(proxy: Proxy, site: Origin) -> None:
    crumbs = b"1\r\na\r\n" * 20_000 + b"0\r\n\r\n"
    site.says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + crumbs)
    proxy.allow(rule(site.port))
    proxy.ask(f"http://{HOST}:{site.port}/")
    assert proxy.entry().received_bytes < 20_000


def test_a_host_that_is_silent_is_given_up(proxy: Proxy, site: Origin) -> None:
    release = holding(site)
    proxy.allow(rule(site.port))
    assert statuses(proxy.ask(f"http://{HOST}:{site.port}/")) == [504]
    release.set()


def test_an_answer_that_comes_before_the_body_was_read_is_passed_on(
    proxy: Proxy, site: Origin
) -> None:
    site.says(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
    proxy.allow(rule(site.port))
    length = 8 * MIB
    data = proxy.head("PUT", f"http://{HOST}:{site.port}/", f"Content-Length: {length}")
    given = speak(proxy.path, data + bytes(length))
    assert statuses(given) in ([413], [502]), "502 where the host's reset came before its answer"


def test_a_body_that_stops_ends_the_request_outside_too(proxy: Proxy, site: Origin) -> None:
    ended = threading.Event()

    def wait(_: bytes, peer: socket.socket) -> None:
        while peer.recv(1000):
            pass
        ended.set()

    site.answer = wait
    proxy.allow(rule(site.port))
    given = proxy.ask(f"http://{HOST}:{site.port}/", "Content-Length: 9", method="PUT", body=b"x")
    assert statuses(given) == [400]
    assert ended.wait(5)
    assert (proxy.entry().status, len(proxy.entries)) == (400, 0)


# -- tunnels --------------------------------------------------------------------------------------


def test_tls_goes_through_from_end_to_end(
    proxy: Proxy, tls_site: Origin, keys: tuple[Path, Path]
) -> None:
    size = 5 * MIB
    tls_site.answer = lambda _, peer: peer.sendall(b"x" * size)
    proxy.allow(rule(tls_site.port))
    trust = ssl.create_default_context(cafile=str(keys[0]))
    with (
        proxy.tunnel(f"{HOST}:{tls_site.port}") as plain,
        trust.wrap_socket(plain, server_hostname=HOST) as tls,
    ):
        tls.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert len(received(tls)) == size
    entry = proxy.entry()
    assert (entry.kind, entry.method, entry.host, entry.port) == (
        "connect", "CONNECT", HOST, tls_site.port,
    )  # fmt: skip
    assert (entry.decision, entry.rule, entry.status) == ("allowed", HOST, 200)
    assert entry.received_bytes > size
    assert entry.sent_bytes > 100
    assert tls_site.seen == [b"GET / HTTP/1.1\r\n\r\n"]


def test_a_tunnel_may_be_asked_for_in_the_older_version(proxy: Proxy, site: Origin) -> None:
    proxy.allow(rule(site.port))
    head = f"CONNECT {HOST}:{site.port} HTTP/1.0\r\nProxy-Authorization: {LOGIN.decode()}\r\n\r\n"
    site.answer = lambda received, peer: peer.sendall(received)
    data = hello(HOST) + b"\r\n\r\n"
    given = speak(proxy.path, head.encode() + data)
    assert statuses(given[:12]) == [200]
    assert given.endswith(b"\r\n\r\n" + data)


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (hello("evil.example"), "is for evil.example"),
        (hello(f"x.{HOST}"), f"is for x.{HOST}"),
        (hello(None), "no server name"),
        (b"GET / HTTP/1.1\r\nHost: files.example.org\r\n\r\n", "not TLS"),
        (b"SSH-2.0-OpenSSH\r\n", "not TLS"),
        (hello(HOST)[:50], "in time"),
        (b"", "in time"),
    ],
)
def test_a_tunnel_that_does_not_begin_with_tls_for_its_host_ends_and_nothing_got_out(
    first: bytes, why: str, proxy: Proxy, site: Origin
) -> None:
    proxy.allow(rule(site.port))
    with proxy.tunnel(f"{HOST}:{site.port}") as peer:
        peer.sendall(first)
        assert received(peer) == b""
    entry = proxy.entry()
    assert (entry.decision, entry.rule, entry.sent_bytes) == ("denied", "server name", 0)
    (note,) = proxy.notes
    assert why in note.message
    assert site.seen in ([], [b""])


def test_a_hello_may_come_with_the_head_and_in_pieces(proxy: Proxy, site: Origin) -> None:
    site.answer = lambda received, peer: peer.sendall(received)
    proxy.allow(rule(site.port))
    data = hello(HOST) + b"\r\n\r\n"
    with connect(proxy.path) as peer:
        peer.sendall(proxy.head("CONNECT", f"{HOST}:{site.port}") + data[:7])
        assert statuses(peer.recv(1000)) == [200]
        for at in range(7, len(data), 100):
            time.sleep(0.005)
            peer.sendall(data[at : at + 100])
        assert received(peer) == data


def test_a_side_that_stopped_sending_still_receives(proxy: Proxy, site: Origin) -> None:
    def late(_: bytes, peer: socket.socket) -> None:
        while peer.recv(65536):
            pass
        time.sleep(0.1)
        peer.sendall(b"y" * 3 * MIB)

    site.answer = late
    proxy.allow(rule(site.port))
    with proxy.tunnel(f"{HOST}:{site.port}") as peer:
        peer.sendall(hello(HOST) + b"\r\n\r\n" + b"x" * 3 * MIB)
        peer.shutdown(socket.SHUT_WR)
        assert len(received(peer)) == 3 * MIB
    assert proxy.entry().received_bytes == 3 * MIB


def test_both_ways_at_once_and_slowly(proxy: Proxy, site: Origin) -> None:
    size = 4 * MIB

    def echo(received: bytes, peer: socket.socket) -> None:
        peer.sendall(received)
        while piece := peer.recv(65536):
            peer.sendall(piece)

    site.answer = echo
    proxy.allow(rule(site.port))
    data = hello(HOST) + b"\r\n\r\n" + os.urandom(size)
    with proxy.tunnel(f"{HOST}:{site.port}") as peer:

        def send() -> None:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        time.sleep(0.3)
        assert received(peer) == data
        sender.join()


def test_a_client_that_is_gone_takes_the_tunnel_with_it(proxy: Proxy, site: Origin) -> None:
    ended = threading.Event()

    def wait(_: bytes, peer: socket.socket) -> None:
        while peer.recv(65536):
            pass
        ended.set()

    site.answer = wait
    proxy.allow(rule(site.port))
    with proxy.tunnel(f"{HOST}:{site.port}") as peer:
        peer.sendall(hello(HOST) + b"\r\n\r\n")
    assert ended.wait(0.8), "well before the tunnel is idle for too long"
    assert proxy.entry().decision == "allowed"


def test_an_idle_tunnel_ends(proxy: Proxy, site: Origin) -> None:
    release = holding(site)
    proxy.allow(rule(site.port))
    begun = time.monotonic()
    with proxy.tunnel(f"{HOST}:{site.port}") as peer:
        peer.sendall(hello(HOST) + b"\r\n\r\n")
        assert received(peer) == b""
    release.set()
    assert BOUNDS.idle_seconds <= time.monotonic() - begun < BOUNDS.idle_seconds + 2


@pytest.mark.parametrize("line", ["Content-Length: 5", "Transfer-Encoding: chunked"])
def test_a_request_for_a_tunnel_has_no_body(line: str, proxy: Proxy, names: Names) -> None:
    proxy.allow(rule(443))
    assert statuses(proxy.ask(f"{HOST}:443", line, method="CONNECT")) == [400]
    assert names.asked == []


def test_after_a_refused_tunnel_the_connection_goes_on(proxy: Proxy, site: Origin) -> None:
    proxy.allow(rule(site.port))
    refused = proxy.head("CONNECT", "evil.example:443")
    sound = proxy.head("GET", f"http://{HOST}:{site.port}/")
    assert statuses(speak(proxy.path, refused + sound)) == [403, 200]


# -- limits ---------------------------------------------------------------------------------------


def limited(**limits: int) -> dict[str, Limits]:
    return {"limits": replace(Limits(), **limits)}


def test_a_session_moves_no_more_bytes_than_it_may(proxy: Proxy, site: Origin) -> None:
    site.answer = lambda _, peer: peer.sendall(OK[:-4] + b"\r\n\r\n")
    site.says(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(400_000))
    proxy.allow(rule(site.port), **limited(egress_bytes=1_000_000))
    sizes = [len(proxy.ask(f"http://{HOST}:{site.port}/")) for _ in range(4)]
    assert sizes[0] > 400_000
    assert sizes[1] > 400_000
    assert sum(sizes) < 1_100_000
    assert statuses(proxy.ask(f"http://{HOST}:{site.port}/")) == [403]
    assert isinstance(proxy.notes[0], QuotaExceeded)


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_tunnel_ends_where_the_session_moved_what_it_may(
    way: str, proxy: Proxy, site: Origin
) -> None:
    def talk(_: bytes, peer: socket.socket) -> None:
        if way == "in":
            peer.sendall(bytes(2 * MIB))
        while peer.recv(65536):
            pass

    site.answer = talk
    proxy.allow(rule(site.port), **limited(egress_bytes=MIB))
    with proxy.tunnel(f"{HOST}:{site.port}") as peer, contextlib.suppress(BrokenPipeError):
        peer.sendall(hello(HOST) + b"\r\n\r\n")
        if way == "out":
            peer.sendall(bytes(2 * MIB))
        assert len(received(peer)) <= MIB
    entry = proxy.entry()
    assert entry.sent_bytes + entry.received_bytes <= MIB
    assert [type(note) for note in proxy.notes] == [QuotaExceeded]


def test_a_session_has_no_more_connections_than_it_may(proxy: Proxy, site: Origin) -> None:
    proxy.allow(rule(site.port), **limited(egress_connections=2))
    target = f"{HOST}:{site.port}"
    with proxy.tunnel(target), proxy.tunnel(target):
        assert statuses(proxy.ask(target, method="CONNECT")) == [503]
        assert statuses(proxy.ask(f"http://{target}/")) == [503]
    for _ in range(3):
        end = time.monotonic() + 5
        while statuses(proxy.ask(f"http://{target}/")) != [200]:
            assert time.monotonic() < end


def test_the_end_of_the_session_ends_every_connection_at_once(
    proxy: Proxy, site: Origin, names: Names
) -> None:
    stuck = holding(site)
    proxy.allow(rule(site.port))
    target = f"{HOST}:{site.port}"
    before = threading.active_count()
    with proxy.tunnel(target) as talking, proxy.tunnel(target), connect(proxy.path) as asking:
        talking.sendall(hello(HOST) + b"\r\n\r\n")
        asking.sendall(proxy.head("GET", f"http://{target}/"))
        while len(site.seen) < 2:
            time.sleep(0.01)
        begun = time.monotonic()
        proxy.close()
        assert time.monotonic() - begun < 0.4
        assert received(talking) == b""
        assert len(proxy.entries) == 3
    stuck.set()
    assert threading.active_count() <= before + 3


def test_a_connection_that_is_made_when_the_session_ends_is_not_used(
    proxy: Proxy, site: Origin, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(host: str, port: int, **options: object) -> list[Any]:
        proxy.egress.close()
        return names(host, port)

    dialled = []
    really = socket.socket.connect

    def note(this: socket.socket, address: Any) -> None:
        if this.family == socket.AF_INET:
            dialled.append(address)
        really(this, address)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    monkeypatch.setattr(socket.socket, "connect", note)
    proxy.allow(rule(site.port))
    assert statuses(proxy.ask(f"http://{HOST}:{site.port}/")) == [503]
    assert dialled == []


def test_a_session_looks_up_so_many_names_at_a_time_and_the_others_wait_their_turn(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, release = [], threading.Event()

    def slow(host: str, *_: object, **__: object) -> list[Any]:
        under_way.append(host)
        release.wait(10)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    proxy.allow(rule(80))
    target = f"http://{HOST}/"
    with contextlib.ExitStack() as stack:
        asking = [stack.enter_context(connect(proxy.path)) for _ in range(LOOKUPS)]
        for peer in asking:
            peer.sendall(proxy.head("GET", target))
        while len(under_way) < LOOKUPS:
            time.sleep(0.01)
        assert statuses(proxy.ask(target)) == [503]
        assert len(under_way) == LOOKUPS
        assert isinstance(proxy.notes[0], QuotaExceeded)
        waiting = stack.enter_context(connect(proxy.path))
        waiting.sendall(proxy.head("GET", target))
        time.sleep(0.1)
        release.set()
        for peer in (*asking, waiting):
            assert statuses(peer.recv(1000)) == [502]
    assert len(under_way) == LOOKUPS + 1
    assert proxy.egress._lookups == 0


def test_the_end_of_the_session_is_not_held_up_by_a_look_up(
    proxy: Proxy, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy.egress, "_lookups", LOOKUPS)
    proxy.allow(rule(80))
    with connect(proxy.path) as waiting:
        waiting.sendall(proxy.head("GET", f"http://{HOST}/"))
        begun = time.monotonic()
        while not proxy.egress._connections:
            assert time.monotonic() - begun < BOUNDS.connect_seconds / 2
            time.sleep(0.01)
        proxy.egress.close()
        assert statuses(waiting.recv(1000)) == [503]
        assert time.monotonic() - begun < BOUNDS.connect_seconds / 2
    assert names.asked == []


def test_what_cannot_be_recorded_is_not_let_out(proxy: Proxy, site: Origin, names: Names) -> None:
    proxy.allow(rule(site.port))
    proxy.room = 1
    target = f"{HOST}:{site.port}"
    assert statuses(proxy.ask(f"http://{target}/")) == [200]
    assert statuses(proxy.ask(f"http://{target}/")) == [503]
    assert statuses(proxy.ask(target, method="CONNECT")) == [503]
    assert names.asked == [HOST]
    assert len(proxy.entries) == 1
    assert [type(note) for note in proxy.notes] == [QuotaExceeded] * 2


@pytest.mark.parametrize("method", ["GET", "HEAD", "CONNECT"])
def test_each_request_that_had_room_becomes_one_entry(
    method: str, proxy: Proxy, site: Origin
) -> None:
    proxy.allow(rule(site.port))
    before = proxy.room
    for target in (f"{HOST}:{site.port}", f"{HOST}:1", f"x.{HOST}:80", "me:pw@h", "*"):
        proxy.ask(target if method == "CONNECT" else f"http://{target}/", method=method)
    end = time.monotonic() + 5
    while len(proxy.entries) < before - proxy.room and time.monotonic() < end:
        time.sleep(0.01)
    assert len(proxy.entries) == before - proxy.room == 5

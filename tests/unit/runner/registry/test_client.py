import hashlib
import io
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from policies.reference import Digest, ImageReference
from runner.errors import (
    AddressDenied,
    Cancelled,
    ImageNotFound,
    InvalidReference,
    RegistryError,
    RegistryProtocol,
    RegistryRefused,
    RegistryUnreachable,
    VerificationFailed,
)
from runner.registry.auth import Anonymous, Login, Secret
from runner.registry.client import RegistryClient
from runner.registry.exchange import Upload
from runner.registry.image import DOCKER_LIST, OCI_INDEX, OCI_MANIFEST
from runner.settings import HttpLimits, RegistrySettings, Settings

if TYPE_CHECKING:
    from tests.unit.runner.registry.conftest import Answer, Peer, Request

MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST}).encode()
BLOB = bytes(range(256)) * 4096
BLOB_DIGEST = Digest.of(BLOB)


def sending(here: RegistrySettings, other: "Peer") -> RegistrySettings:
    """The same, for a registry whose redirects may lead to ``other``."""
    return here.model_copy(update={"redirect_hosts": (other.host,)})


class Me:
    def for_host(self, host: str, repository: str = "") -> Login | None:
        return Login("me", Secret("hunter2"))


Clients = Callable[..., RegistryClient]


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def client_of(slept: list[float]) -> Iterator[Clients]:
    made: list[RegistryClient] = []

    def make(settings: Settings, login: bool = False) -> RegistryClient:
        made.append(RegistryClient(settings, Me() if login else Anonymous(), sleep=slept.append))
        return made[-1]

    yield make
    for client in made:
        client.close()


def image_at(peer: "Peer", tag: str | None = "1", digest: Digest | None = None) -> ImageReference:
    return ImageReference(peer.host, "acme/app", tag, digest)


def in_turn(*answers: "Answer") -> Callable[["Request"], "Answer"]:
    """One answer after another, the last one for ever."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def manifest_answer(peer: "Peer", data: bytes = MANIFEST, **headers: str) -> "Answer":
    return peer.reply(200, data, **{"Content_Type": OCI_MANIFEST, **headers})


# Manifests


def test_a_manifest_is_described_by_its_bytes(peer: "Peer", client_of: Clients) -> None:
    peer.answer = lambda _: manifest_answer(
        peer,
        Content_Type=f"{OCI_MANIFEST}; charset=utf-8",
        Docker_Content_Digest=Digest.of(MANIFEST),
    )
    descriptor, data = client_of(peer.settings).manifest(image_at(peer))
    assert data == MANIFEST
    assert (descriptor.media_type, descriptor.digest, descriptor.size) == (
        OCI_MANIFEST,
        Digest.of(MANIFEST),
        len(MANIFEST),
    )
    assert peer.seen[0].path == "/v2/acme/app/manifests/1"
    assert {OCI_MANIFEST, OCI_INDEX, DOCKER_LIST} <= set(peer.seen[0].headers["Accept"].split(", "))


def test_a_manifest_asked_for_by_sha512_has_it(peer: "Peer", client_of: Clients) -> None:
    digest = Digest(f"sha512:{hashlib.sha512(MANIFEST).hexdigest()}")
    peer.answer = lambda _: manifest_answer(peer)
    descriptor, _ = client_of(peer.settings).manifest(image_at(peer, "1", digest))
    assert descriptor.digest == digest
    assert peer.seen[0].path.endswith(digest)


@pytest.mark.parametrize(
    ("data", "headers", "message"),
    [
        (MANIFEST + b" ", {}, "answers for"),
        (MANIFEST, {"Docker_Content_Digest": Digest.of(b"lie")}, "claims"),
        (MANIFEST, {"Docker_Content_Digest": "md5:x\x1b[31m"}, "malformed"),
        (MANIFEST, {"Content_Type": OCI_INDEX}, "two media types"),
        (MANIFEST, {"Content_Type": "text/html"}, "text/html is no media type"),
        (MANIFEST, {"Content_Type": ""}, "nothing is no media type"),
        (b"no json", {}, "no JSON"),
        (b"[" * 100_000, {}, "no JSON"),
        (b"x" * ((4 << 20) + 1), {}, "more than"),
    ],
)
def test_a_lying_registry_is_not_believed(
    data: bytes, headers: dict[str, str], message: str, peer: "Peer", client_of: Clients
) -> None:
    peer.answer = lambda _: manifest_answer(peer, data, **headers)
    reference = image_at(peer, None, Digest.of(MANIFEST))
    with pytest.raises(RegistryProtocol, match=message) as caught:
        client_of(peer.settings).manifest(reference)
    assert "\x1b" not in caught.value.message
    assert len(peer.seen) == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, RegistryProtocol),
        (403, RegistryRefused),
        (404, ImageNotFound),
        (418, RegistryProtocol),
        (204, RegistryProtocol),
        (304, RegistryProtocol),
    ],
)
def test_statuses_have_their_errors_and_are_final(
    status: int, error: type[RegistryError], peer: "Peer", client_of: Clients
) -> None:
    peer.answer = lambda _: peer.reply(status)
    with pytest.raises(error) as caught:
        client_of(peer.settings).manifest(image_at(peer))
    assert type(caught.value) is error
    assert len(peer.seen) == 1


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"errors": [{"code": "DENIED", "message": "not\\u001b[31m you\\n"}]}', "not"),
        (b'{"errors": []}', "403"),
        (b"\x1b]0;owned\x07 <html>", "403"),
        (b"x" * 100_000, "403"),
        (json.dumps({"errors": [{"code": "A" * 999, "message": "B" * 9999}]}).encode(), "AAA"),
    ],
)
def test_what_a_registry_says_is_shown_bounded_and_escaped(
    body: bytes, shown: str, peer: "Peer", client_of: Clients
) -> None:
    peer.answer = lambda _: peer.reply(403, body)
    with pytest.raises(RegistryRefused, match=shown) as caught:
        client_of(peer.settings).manifest(image_at(peer))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


def test_a_reference_without_tag_and_digest_is_refused(peer: "Peer", client_of: Clients) -> None:
    with pytest.raises(InvalidReference):
        client_of(peer.settings).manifest(image_at(peer, None))


# Retries


def test_what_may_pass_is_tried_again(peer: "Peer", client_of: Clients, slept: list[float]) -> None:
    peer.answer = in_turn(peer.reply(429, Retry_After="7"), peer.raw(b""), manifest_answer(peer))
    assert client_of(peer.settings).manifest(image_at(peer))[1] == MANIFEST
    assert slept[0] == 7
    assert 0 <= slept[1] <= 2


@pytest.mark.parametrize("asked", ["999999", "99999999999", "-1", "soon", "²"])
def test_a_registry_cannot_make_us_wait_for_long(
    asked: str, peer: "Peer", client_of: Clients, slept: list[float]
) -> None:
    header = asked.encode("utf-8")
    raw = b"HTTP/1.1 429 X\r\nConnection: close\r\nContent-Length: 0\r\n"
    raw += b"Retry-After: " + header + b"\r\n\r\n"
    peer.answer = lambda _: peer.raw(raw)
    with pytest.raises(RegistryUnreachable, match="429"):
        client_of(peer.settings).manifest(image_at(peer))
    assert len(peer.seen) == 3
    assert len(slept) == 2
    assert max(slept) <= 30


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x1b[31mnonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 200 + b"\r\n",
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n"
            b"Content-Type: application/vnd.oci.image.manifest.v1+json\r\n\r\n{"
        ),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 503 X\r\nContent-Length: 99\r\n\r\n",
    ],
)
def test_broken_http_ends_as_unreachable(raw: bytes, peer: "Peer", client_of: Clients) -> None:
    peer.answer = lambda _: peer.raw(raw)
    with pytest.raises(RegistryUnreachable) as caught:
        client_of(peer.settings).manifest(image_at(peer))
    assert caught.value.message.isprintable()
    assert len(peer.seen) == 3


def test_silence_ends(peer: "Peer", client_of: Clients) -> None:
    import threading

    enough = threading.Event()

    def silent(_: "Request") -> "Answer":
        enough.wait(5)
        return peer.raw(b"")

    peer.answer = silent
    here = peer.settings.registry(peer.host)
    limits = HttpLimits(connect_seconds=1, read_seconds=0.1, attempts=2)
    client = client_of(Settings(registries={peer.host: here}, http=limits))
    with pytest.raises(RegistryUnreachable, match="timed out"):
        client.manifest(image_at(peer))
    enough.set()


def test_nobody_listening_is_unreachable(client_of: Clients, slept: list[float]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
    here = RegistrySettings(plain_http=True, private_address=True)
    settings = Settings(registries={host: here}, http=HttpLimits(attempts=2))
    with pytest.raises(RegistryUnreachable, match="refused"):
        client_of(settings).manifest(ImageReference(host, "a", "1"))
    assert len(slept) == 1


@pytest.mark.parametrize(
    ("failure", "words"), [("name", "resolve"), ("time", "in time"), ("label", "resolve")]
)
def test_a_host_that_cannot_be_dialled_is_unreachable(
    failure: str, words: str, client_of: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    from runner.registry import dial

    errors = {
        "name": socket.gaierror(-2, "Name or service not known"),
        "time": TimeoutError(),
        "label": UnicodeError("label too long"),
    }

    def failing(*_: object, **__: object) -> None:
        raise errors[failure]

    monkeypatch.setattr(dial, "connect", failing)
    with pytest.raises(RegistryUnreachable, match=words):
        client_of(Settings()).manifest(ImageReference("nowhere.example", "a", "1"))


def test_a_plain_http_server_is_no_tls_server(peer: "Peer", client_of: Clients) -> None:
    settings = Settings(registries={peer.host: RegistrySettings(private_address=True)})
    with pytest.raises(RegistryUnreachable) as caught:
        client_of(settings).manifest(image_at(peer))
    assert "plain HTTP must be configured" in caught.value.advice


def test_a_denied_address_is_not_tried_again(
    peer: "Peer", client_of: Clients, slept: list[float]
) -> None:
    with pytest.raises(AddressDenied):
        client_of(Settings()).manifest(image_at(peer))
    assert not slept


def test_a_redirect_to_a_private_address_is_denied(peer: "Peer", client_of: Clients) -> None:
    peer.answer = lambda _: peer.reply(307, Location="https://169.254.169.254/latest/meta-data")
    with pytest.raises(AddressDenied, match=r"169\.254"):
        client_of(peer.settings).has_blob(image_at(peer), BLOB_DIGEST)


def test_a_redirect_to_no_host_is_refused(peer: "Peer", client_of: Clients) -> None:
    peer.answer = lambda _: peer.reply(307, Location="https://.a.example/")
    with pytest.raises(RegistryProtocol, match="cannot be used"):
        client_of(peer.settings).manifest(image_at(peer))


# Logging in


def test_a_token_service_that_fails_is_tried_again(peer: "Peer", client_of: Clients) -> None:
    peer.answer = lambda request: (
        peer.reply(500)
        if request.path.startswith("/token")
        else peer.reply(401, WWW_Authenticate=f'Bearer realm="{peer.url}/token?secret"')
    )
    with pytest.raises(RegistryUnreachable) as caught:
        client_of(peer.settings).manifest(image_at(peer))
    assert "secret" not in caught.value.message
    assert len(peer.seen) == 6


def bearer_only(peer: "Peer", answer: Callable[["Request"], "Answer"]) -> None:
    """Makes ``peer`` want its own token."""

    def guarded(request: "Request") -> "Answer":
        if request.path.startswith("/token"):
            return peer.reply(200, b'{"token": "abc"}')
        if request.headers.get("Authorization") != "Bearer abc":
            return peer.reply(401, WWW_Authenticate=f'Bearer realm="{peer.url}/token"')
        return answer(request)

    peer.answer = guarded


def test_a_token_is_fetched_once(peer: "Peer", client_of: Clients) -> None:
    bearer_only(peer, lambda _: manifest_answer(peer))
    client = client_of(peer.settings)
    for _ in range(3):
        client.manifest(image_at(peer))
    assert [request.path.startswith("/token") for request in peer.seen].count(True) == 1
    assert len(peer.seen) == 5


def test_a_token_that_is_not_accepted_ends_as_refused(peer: "Peer", client_of: Clients) -> None:
    peer.answer = lambda request: (
        peer.reply(200, b'{"token": "other"}')
        if request.path.startswith("/token")
        else peer.reply(401, WWW_Authenticate=f'Bearer realm="{peer.url}/token"')
    )
    with pytest.raises(RegistryRefused, match="401"):
        client_of(peer.settings).manifest(image_at(peer))


def test_a_foreign_realm_is_refused(peers: Callable[[], "Peer"], client_of: Clients) -> None:
    peer, other = peers(), peers()
    realm = f"http://localhost:{other.port}/token"
    peer.answer = lambda _: peer.reply(401, WWW_Authenticate=f'Bearer realm="{realm}"')
    with pytest.raises(RegistryProtocol, match="foreign"):
        client_of(peer.settings, login=True).manifest(image_at(peer))
    assert not other.seen


def test_a_redirect_target_that_wants_a_login_gets_none(
    peers: Callable[[], "Peer"], client_of: Clients
) -> None:
    peer, other = peers(), peers()
    here = RegistrySettings(plain_http=True, private_address=True)
    peer.answer = lambda _: peer.reply(307, Location=f"{other.url}/x")
    other.answer = lambda _: other.reply(401, WWW_Authenticate='Basic realm="x"')
    settings = Settings(registries={peer.host: sending(here, other), other.host: here})
    with pytest.raises(RegistryRefused):
        client_of(settings, login=True).manifest(image_at(peer))
    assert len(other.seen) == 1


# Blobs


def read(client: RegistryClient, reference: ImageReference, size: int | None) -> bytes:
    with client.read_blob(reference, BLOB_DIGEST, size) as pieces:
        return b"".join(pieces)


@pytest.mark.parametrize("size", [len(BLOB), None])
def test_a_blob_arrives_whole(size: int | None, peer: "Peer", client_of: Clients) -> None:
    peer.answer = lambda _: peer.reply(200, BLOB)
    assert read(client_of(peer.settings), image_at(peer), size) == BLOB
    assert peer.seen[0].path == f"/v2/acme/app/blobs/{BLOB_DIGEST}"


def ranged(peer: "Peer", most: int) -> Callable[["Request"], "Answer"]:
    """Sends at most ``most`` bytes before the connection breaks."""

    def answer(request: "Request") -> "Answer":
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        rest = BLOB[start:]
        status = {"status": "206", "Content_Range": f"bytes {start}-/{len(BLOB)}"} if start else {}
        return peer.cut(rest[:most], len(rest), **status)

    return answer


def test_a_broken_download_goes_on_where_it_broke(peer: "Peer", client_of: Clients) -> None:
    peer.answer = ranged(peer, len(BLOB) // 3 + 1)
    assert read(client_of(peer.settings), image_at(peer), len(BLOB)) == BLOB
    assert len(peer.seen) == 3


def test_a_download_that_keeps_breaking_ends(peer: "Peer", client_of: Clients) -> None:
    peer.answer = ranged(peer, 10)
    with pytest.raises(RegistryUnreachable):
        read(client_of(peer.settings), image_at(peer), len(BLOB))
    assert len(peer.seen) == 4


def test_a_resumed_download_at_another_place_is_refused(peer: "Peer", client_of: Clients) -> None:
    peer.answer = lambda request: (
        peer.reply(206, BLOB, Content_Range="bytes 0-9/10")
        if "Range" in request.headers
        else peer.cut(BLOB[:10], len(BLOB))
    )
    with pytest.raises(RegistryProtocol, match="another place"):
        read(client_of(peer.settings), image_at(peer), len(BLOB))


@pytest.mark.parametrize("size", [len(BLOB) - 1, len(BLOB) + 1, 0])
def test_a_blob_of_another_size_is_refused_at_once(
    size: int, peer: "Peer", client_of: Clients
) -> None:
    peer.answer = lambda _: peer.reply(200, BLOB)
    with pytest.raises(RegistryProtocol, match="expected"):
        read(client_of(peer.settings), image_at(peer), size)


@pytest.mark.parametrize(("size", "words"), [(3, "more than 3"), (5, "after 4")])
def test_a_blob_without_a_length_is_bounded(
    size: int, words: str, peer: "Peer", client_of: Clients
) -> None:
    peer.answer = lambda _: peer.raw(b"HTTP/1.1 200 OK\r\n\r\nbody")
    with pytest.raises(RegistryProtocol, match=words):
        read(client_of(peer.settings), image_at(peer), size)


@pytest.mark.parametrize("announced", [True, False])
def test_a_blob_of_unknown_size_is_bounded_by_the_settings(
    announced: bool, peer: "Peer", client_of: Clients
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n" if announced else b"HTTP/1.1 200 OK\r\n"
    peer.answer = lambda _: peer.raw(head + b"\r\n12345678901")
    here = peer.settings.registry(peer.host)
    settings = Settings(registries={peer.host: here}, http=HttpLimits(blob_bytes=10))
    with pytest.raises(RegistryProtocol, match="10"):
        read(client_of(settings), image_at(peer), None)


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", 7),
        (b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n", None),
    ],
)
def test_a_blob_is_there_or_not(
    raw: bytes, found: int | None, peer: "Peer", client_of: Clients
) -> None:
    peer.answer = lambda _: peer.raw(raw)
    assert client_of(peer.settings).has_blob(image_at(peer), BLOB_DIGEST) == found
    assert peer.seen[0].method == "HEAD"


@pytest.mark.parametrize("length", [b"", b"Content-Length: " + b"9" * 30 + b"\r\n"])
def test_a_blob_without_a_size_is_no_answer(
    length: bytes, peer: "Peer", client_of: Clients
) -> None:
    peer.answer = lambda _: peer.raw(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n")
    with pytest.raises(RegistryProtocol, match="size"):
        client_of(peer.settings).has_blob(image_at(peer), BLOB_DIGEST)


# Mirrors


@pytest.mark.parametrize("fault", ["404", "500", "liar", "none"])
def test_mirrors_are_asked_first_and_once_then_the_origin(
    fault: str, peers: Callable[[], "Peer"], client_of: Clients, slept: list[float]
) -> None:
    mirror, peer = peers(), peers()
    here = RegistrySettings(plain_http=True, private_address=True)
    settings = Settings(
        registries={
            peer.host: here.model_copy(update={"mirrors": (f"{mirror.host}/proxy/x/",)}),
            mirror.host: here,
        }
    )
    mirror.answer = lambda _: {
        "404": mirror.reply(404),
        "500": mirror.reply(500),
        "liar": manifest_answer(mirror, b"{}"),
        "none": manifest_answer(mirror),
    }[fault]
    peer.answer = lambda _: manifest_answer(peer)
    client = client_of(settings)
    reference = image_at(peer, None, Digest.of(MANIFEST))
    assert client.manifest(reference)[1] == MANIFEST
    assert mirror.seen[0].path == f"/v2/proxy/x/acme/app/manifests/{Digest.of(MANIFEST)}"
    assert (len(mirror.seen), len(peer.seen)) == (1, 0 if fault == "none" else 1)
    assert not slept
    client.manifest_at_origin(reference)
    assert len(mirror.seen) == 1


def test_docker_hub_is_asked_at_its_registry_host(client_of: Clients) -> None:
    site = client_of(Settings())._origin(ImageReference.parse("debian:12"))
    assert site.base == "https://registry-1.docker.io/v2/library/debian"
    assert site.account == "docker.io"


# Pushing


class Uploads:
    """The upload half of a registry; ``faults`` are answered first, to a PUT."""

    def __init__(self, peer: "Peer", location: str = "/up/1?state=x", faults: int = 0) -> None:
        self.faults = faults
        self._peer = peer
        self._location = location
        peer.answer = self

    def __call__(self, request: "Request") -> "Answer":
        if request.method == "POST":
            return self._peer.reply(202, Location=self._location)
        if self.faults:
            self.faults -= 1
            return self._peer.reply(500)
        return self._peer.reply(201)


def push(client: RegistryClient, peer: "Peer", **options: Callable[[int], None]) -> None:
    client.push_blob(image_at(peer), BLOB_DIGEST, len(BLOB), lambda: io.BytesIO(BLOB), **options)


def test_a_blob_is_sent_in_one_piece(peer: "Peer", client_of: Clients) -> None:
    Uploads(peer)
    sent: list[int] = []
    push(client_of(peer.settings), peer, progress=sent.append)
    post, put = peer.seen
    assert (post.method, post.path) == ("POST", "/v2/acme/app/blobs/uploads/")
    assert put.path == f"/up/1?state=x&digest=sha256%3A{BLOB_DIGEST.hex}"
    assert put.body == BLOB
    assert sent == sorted(sent)
    assert sent[-1] == len(BLOB)


def test_an_upload_can_be_iterated() -> None:
    assert list(Upload(io.BytesIO(b"abcd"), 3, lambda _: None)) == [b"abc"]


def test_an_empty_blob_can_be_sent(peer: "Peer", client_of: Clients) -> None:
    Uploads(peer, "/up")
    empty = Digest.of(b"")
    client_of(peer.settings).push_blob(image_at(peer), empty, 0, io.BytesIO)
    assert peer.seen[1].headers["Content-Length"] == "0"
    assert peer.seen[1].path == f"/up?digest=sha256%3A{empty.hex}"


def test_a_failed_upload_starts_again(peer: "Peer", client_of: Clients) -> None:
    Uploads(peer, faults=1)
    sent: list[int] = []
    push(client_of(peer.settings), peer, progress=sent.append)
    assert [request.method for request in peer.seen] == ["POST", "PUT", "POST", "PUT"]
    assert sent.count(len(BLOB)) >= 2
    assert peer.seen[-1].body == BLOB


def test_a_login_is_asked_for_before_the_upload(peer: "Peer", client_of: Clients) -> None:
    bearer_only(peer, lambda request: (
        peer.reply(202, Location="/up") if request.method == "POST" else peer.reply(201)
    ))  # fmt: skip
    push(client_of(peer.settings, login=True), peer)
    assert [r.method for r in peer.seen] == ["POST", "GET", "POST", "PUT"]
    assert "scope=repository%3Aacme%2Fapp%3Apull%2Cpush" in peer.seen[1].path


def test_a_token_that_expires_during_an_upload_is_renewed(peer: "Peer", client_of: Clients) -> None:
    refused = iter([True])

    def answer(request: "Request") -> "Answer":
        if request.method == "POST":
            return peer.reply(202, Location="/up")
        if next(refused, False):
            return peer.reply(401, WWW_Authenticate=f'Bearer realm="{peer.url}/token"')
        return peer.reply(201)

    bearer_only(peer, answer)
    push(client_of(peer.settings, login=True), peer)
    assert peer.seen[-1].body == BLOB
    assert [r.method for r in peer.seen] == ["POST", "GET", "POST", "PUT", "GET", "PUT"]


def test_an_upload_elsewhere_carries_no_login(
    peers: Callable[[], "Peer"], client_of: Clients
) -> None:
    peer, other = peers(), peers()
    here = RegistrySettings(plain_http=True, private_address=True)
    bearer_only(peer, lambda _: peer.reply(202, Location=f"{other.url}/up"))
    other.answer = lambda _: other.reply(201)
    settings = Settings(registries={peer.host: sending(here, other), other.host: here})
    push(client_of(settings, login=True), peer)
    assert other.seen[0].body == BLOB
    assert "Authorization" not in other.seen[0].headers


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("https://169.254.169.254/up", AddressDenied),
        ("https://[::1]/up", AddressDenied),
        ("http://1.1.1.1/up", AddressDenied),
        ("file:///etc/passwd", RegistryProtocol),
        ("https://me@a.example/up", RegistryProtocol),
    ],
)
def test_an_upload_location_is_checked_like_any_other(
    location: str, error: type[Exception], peer: "Peer", client_of: Clients
) -> None:
    Uploads(peer, location)
    with pytest.raises(error):
        push(client_of(peer.settings), peer)


@pytest.mark.parametrize("status", [307, 400, 404, 413])
def test_an_upload_that_is_not_taken_is_an_error(
    status: int, peer: "Peer", client_of: Clients
) -> None:
    peer.answer = lambda request: (
        peer.reply(202, Location="/up")
        if request.method == "POST"
        else peer.reply(status, Location="/other")
    )
    with pytest.raises(RegistryError, match=str(status)):
        push(client_of(peer.settings), peer)
    assert len(peer.seen) == 2


def test_a_blob_that_is_too_short_on_disk_ends_the_upload(peer: "Peer", client_of: Clients) -> None:
    Uploads(peer)
    client = client_of(peer.settings)
    with pytest.raises(VerificationFailed, match="ends after 3"):
        client.push_blob(image_at(peer), BLOB_DIGEST, 9, lambda: io.BytesIO(b"abc"))


def test_what_progress_raises_ends_the_upload(peer: "Peer", client_of: Clients) -> None:
    Uploads(peer)

    def stop(_: int) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        push(client_of(peer.settings), peer, progress=stop)


def test_every_opened_blob_is_closed(peer: "Peer", client_of: Clients) -> None:
    Uploads(peer, faults=2)
    opened: list[io.BytesIO] = []

    def open_blob() -> io.BytesIO:
        opened.append(io.BytesIO(BLOB))
        return opened[-1]

    client_of(peer.settings).push_blob(image_at(peer), BLOB_DIGEST, len(BLOB), open_blob)
    assert [stream.closed for stream in opened] == [True] * 3


def test_a_manifest_is_put_with_its_media_type(peer: "Peer", client_of: Clients) -> None:
    peer.answer = lambda _: peer.reply(201, Docker_Content_Digest=Digest.of(MANIFEST))
    client_of(peer.settings).put_manifest(image_at(peer), OCI_MANIFEST, MANIFEST)
    request = peer.seen[0]
    assert (request.method, request.path) == ("PUT", "/v2/acme/app/manifests/1")
    assert request.headers["Content-Type"] == OCI_MANIFEST
    assert request.body == MANIFEST


def test_a_registry_that_stored_another_manifest_is_not_believed(
    peer: "Peer", client_of: Clients
) -> None:
    peer.answer = lambda _: peer.reply(201, Docker_Content_Digest=Digest.of(b"other"))
    with pytest.raises(RegistryProtocol, match="claims"):
        client_of(peer.settings).put_manifest(image_at(peer), OCI_MANIFEST, MANIFEST)


def test_a_client_closes_itself(peer: "Peer") -> None:
    peer.answer = lambda _: manifest_answer(peer)
    with RegistryClient(peer.settings, Anonymous()) as client:
        client.manifest(image_at(peer))

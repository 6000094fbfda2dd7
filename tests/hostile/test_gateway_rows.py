"""Attacks on the gateway, by their row in the list of threats.

Beside each test stands the line whose removal makes it fail.
"""

import gzip
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from policies.reference import Digest, ImageReference
from runner.errors import NothingStaged
from runner.gateway.http import Bounds
from runner.gateway.staging import SHORT_CHUNKS, Room
from runner.registry.image import OCI_MANIFEST
from tests.support.gateway import PUSH, Gate, Gates, connect, speak, statuses
from tests.support.images import MemoryBlobs, make_image

PRIVATE = "/v2/r.example/private"


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[Gates]:
    with Gates(tmp_path) as made:
        yield made


@pytest.fixture
def gate(gates: Gates) -> Gate:
    return gates.open()


def push_all_but_the_manifest(gate: Gate) -> dict[str, object]:
    blobs = MemoryBlobs()
    root = make_image(blobs=blobs).root
    manifest = blobs.blobs.pop(root.digest)
    for data in blobs.blobs.values():
        gate.push(data)
    parsed: dict[str, object] = json.loads(manifest)
    return parsed


# Defence: ``JsonObject``'s ``_without_duplicates`` and ``_refuse_members``, which _put_manifest
# asks through read_image.
@pytest.mark.parametrize("trick", [b'"layers": [], ', b'"manifests": [], ', b'"Layers": [], '])
def test_row_13_a_manifest_that_two_readers_read_differently(trick: bytes, gate: Gate) -> None:
    data = json.dumps(push_all_but_the_manifest(gate)).encode()
    assert gate.put_manifest("latest", b"{" + trick + data[1:]).status == 400
    assert gate.put_manifest("latest", data).status == 201


# Defence: ``if len(received) > self._limits.manifest_bytes`` in _small.
def test_row_13_a_manifest_without_end(gate: Gate) -> None:
    lines = (f"Content-Type: {OCI_MANIFEST}", "Transfer-Encoding: chunked")
    head = gate.head("PUT", f"{PUSH}/manifests/latest", *lines)
    assert statuses(speak(gate.path, head + (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 6)) == [
        413
    ]


# Defence: ``len(framed) > 1`` in _Exchange._fault.
def test_row_20_request_smuggling(gate: Gate) -> None:
    hidden = gate.head("DELETE", gate.start())
    body = b"0\r\n\r\n" + hidden
    lines = (f"Content-Length: {len(body)}", "Transfer-Encoding: chunked")
    assert statuses(speak(gate.path, gate.head("GET", "/v2/", *lines) + body)) == [400]


# Defence: ``len(head) > self._bounds.header_bytes`` in _Exchange._fault.
def test_row_20_giant_headers(gate: Gate) -> None:
    bomb = gate.head("GET", "/v2/", *["a: b"] * 10_000)
    assert statuses(speak(gate.path, bomb)) == [431]


# Defence: ``_NAME``, matched in full, in runner.gateway.grammar.
@pytest.mark.parametrize(
    "name", ["r.example/../r.example/base", "r.example/base%2f", "r.example//base"]
)
def test_row_20_path_traversal(name: str, gate: Gate) -> None:
    gate.anonymous.add_image("r.example/base:1")
    assert statuses(speak(gate.path, gate.head("GET", f"/v2/{name}/manifests/1"))) == [404]
    assert gate.anonymous.asked == []


# Defence: ``read_chunk`` in runner.gateway.grammar.
def test_row_20_range_games(gate: Gate) -> None:
    location = gate.start()
    for span in ("5-9", "0-18446744073709551616", "-1-3"):
        assert gate.ask("PATCH", location, b"hello", {"Content-Range": span}).status == 416


# Defence: h11's strict parser, and ``_LOOSE`` and ``len(framed) > 1`` beside it, in _fault.
@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5, 6",),
        ("Content-Length: +5",),
        ("Content-Length: 0x5",),
        ("Content-Length: 5 ", "Transfer-Encoding: identity"),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding : chunked",),
        ("Transfer-Encoding:\x0bchunked",),
        ("Transfer-Encoding: chunked\r\n X: y",),
        ("X: y\nContent-Length: 5",),
        ("X: y\rContent-Length: 5",),
        (" Content-Length: 5",),
        ("Host: another",),
    ],
)
def test_row_20_a_body_that_two_readers_end_at_different_places(
    lines: tuple[str, ...], gate: Gate
) -> None:
    hidden = gate.head("POST", f"{PUSH}/blobs/uploads/")
    data = gate.head("GET", "/v2/", *lines) + b"0\r\n\r\n" + hidden
    (status,) = statuses(speak(gate.path, data))
    assert status in {400, 501}
    assert gate.files() == []


# Defence: h11's chunked reader.
@pytest.mark.parametrize(
    "chunk",
    [b"5;ext\nhello", b"0x5\r\nhello\r\n", b"-5\r\nhello", b"5 \r\nhelloX\r\n", b"f" * 40 + b"\r\n",
     b"5\nhello\n", b"\r\n5\r\nhello\r\n"],
)  # fmt: skip
def test_row_20_chunks_that_are_none(chunk: bytes, gate: Gate) -> None:
    location = gate.start()
    head = gate.head("PATCH", location, "Transfer-Encoding: chunked")
    answers = speak(gate.path, head + chunk + b"0\r\n\r\n" + gate.head("DELETE", location))
    assert 204 not in statuses(answers)
    assert statuses(answers)[0] in {202, 400}
    assert gate.ask("GET", location).status == 204


# Defence: requests are read one after the other, in _Exchange.run.
def test_row_20_pipelined_requests_are_answered_in_their_order(gate: Gate) -> None:
    digest = Digest.of(b"hello")
    push = gate.head("POST", f"{PUSH}/blobs/uploads/?digest={digest}", "Content-Length: 5")
    get = gate.head("GET", f"{PUSH}/blobs/{digest}")
    remove = gate.head("DELETE", f"{PUSH}/blobs/{digest}")
    answers = speak(gate.path, get + push + b"hello" + get + remove + get)
    assert statuses(answers) == [404, 201, 200, 405, 200]


# Defence: no handler ever answers 101, in runner.gateway.registry.
@pytest.mark.parametrize("protocol", ["h2c", "websocket", "TLS/1.2"])
def test_row_20_no_other_protocol_is_spoken(protocol: str, gate: Gate) -> None:
    lines = ("Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}", "HTTP2-Settings: AAMA")
    answers = speak(gate.path, gate.head("GET", "/v2/", *lines) + gate.head("GET", "/v2/"))
    assert set(statuses(answers)) == {200}
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert statuses(speak(gate.path, preface)) in ([400], [505])


# Defence: ``expect`` in grammar.check_head.
def test_row_20_an_expectation_is_met_or_refused(gate: Gate) -> None:
    target = f"{PUSH}/blobs/uploads/?digest={Digest.of(b'hello')}"
    odd = gate.head("POST", target, "Content-Length: 5", "Expect: 200-maybe")
    assert statuses(speak(gate.path, odd + b"hello"))[0] == 417
    asking = gate.head("POST", target, "Content-Length: 5", "Expect: 100-continue")
    assert statuses(speak(gate.path, asking + b"hello")) == [201]
    with connect(gate.path) as peer:
        peer.sendall(asking)
        assert peer.recv(1000).startswith(b"HTTP/1.1 100")
        peer.sendall(b"hello")
        assert statuses(peer.recv(1000)) == [201]


# Defence: ``content-encoding`` in grammar.check_head.
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip", "x"])
def test_row_20_a_compressed_body(encoding: str, gate: Gate) -> None:
    bomb = gzip.compress(bytes(1 << 20))
    headers = {"Content-Encoding": encoding, "Content-Type": OCI_MANIFEST}
    for method, target in (
        ("POST", f"{PUSH}/blobs/uploads/?digest={Digest.of(bomb)}"),
        ("PUT", f"{PUSH}/manifests/latest"),
    ):
        assert gate.ask(method, target, bomb, headers).status == 415
    assert gate.files() == []


# Defence: ``Digest``, matched in full, and ``read_algorithm``.
@pytest.mark.parametrize(
    "digest",
    ["sha256:" + "0" * 128, "sha512:" + "0" * 64, "SHA256:" + "0" * 64, "sha256:" + "A" * 64,
     "sha256:../../../../etc/passwd", "sha256:" + "0" * 64 + "%00", "md5:" + "0" * 32,
     "sha256+sha512:" + "0" * 64, "sha256:" + "0" * 63 + "\u0660", ":" + "0" * 64, "sha256:"],
)  # fmt: skip
def test_row_13_digests_of_no_algorithm(digest: str, gate: Gate) -> None:
    quoted = quote(digest, safe=":%")
    for target in (
        f"{PUSH}/blobs/uploads/?digest={quoted}",
        f"{PUSH}/blobs/uploads/?mount={quoted}",
        f"{PUSH}/blobs/uploads/?digest-algorithm={quoted}",
    ):
        assert gate.ask("POST", target, b"x").status == 400
    location = gate.start()
    assert gate.ask("PUT", f"{location}?digest={quoted}", b"x").status == 400
    gate.ask("DELETE", location)
    assert gate.files() == []


# Defence: ``name in query`` in grammar.read_query.
def test_row_13_two_digests_for_one_blob(gate: Gate) -> None:
    one, two = Digest.of(b"one"), Digest.of(b"two")
    location = gate.start()
    assert gate.ask("PUT", f"{location}?digest={one}&digest={two}", b"two").status == 400
    assert gate.ask("HEAD", f"{PUSH}/blobs/{two}").status == 404


# Defence: ``upload.writer.digest != digest`` in Staging.finish, whatever it was begun for.
def test_row_13_bytes_under_the_digest_of_another_algorithm(gate: Gate) -> None:
    wrong = Digest("sha512:" + Digest.of(b"hello").hex * 2)
    target = f"{PUSH}/blobs/uploads/?digest-algorithm=sha512"
    location = gate.ask("POST", target).headers["Location"]
    assert gate.ask("PUT", f"{location}?digest={wrong}", b"hello").status == 400
    assert gate.files() == []


# Defence: ``_receive``, which counts what it takes and ends an upload that was spoilt.
def test_row_20_overlapping_and_overlong_chunks(gate: Gate) -> None:
    location = gate.start()
    assert gate.ask("PATCH", location, b"01234", {"Content-Range": "0-4"}).status == 202
    for span in ("0-4", "4-8", "6-9", "5-4", "18446744073709551616-18446744073709551620"):
        assert gate.ask("PATCH", location, b"56789", {"Content-Range": span}).status == 416
    assert gate.ask("PATCH", location, b"56789", {"Content-Range": "5-5"}).status == 400
    assert gate.ask("GET", location).headers["Range"] == "0-4"
    pieces = iter([b"567", b"89abc"])  # longer than it says, and nobody knows before it came
    assert gate.ask("PATCH", location, pieces, {"Content-Range": "5-9"}).status == 400
    assert gate.ask("GET", location).status == 404
    assert gate.files() == []


# Defence: ``Upload.begin_chunk``.
def test_row_20_an_upload_in_millions_of_chunks(gate: Gate) -> None:
    location = gate.start()
    one = gate.head("PATCH", location, "Content-Length: 1") + b"x"
    answers = statuses(speak(gate.path, one * (SHORT_CHUNKS + 10), timeout=60))
    assert answers == [202] * SHORT_CHUNKS + [413] * 10


# Defence: ``Staging._count``, which counts uploads when they begin.
def test_row_20_millions_of_small_uploads(gate: Gate) -> None:
    gate.session._staging._room = Room(blobs=100)
    one = gate.head("POST", f"{PUSH}/blobs/uploads/?digest={Digest.of(b'')}", "Content-Length: 0")
    answers = statuses(speak(gate.path, one * 150, timeout=60))
    assert answers == [201] * 100 + [413] * 50
    assert len(gate.files()) == 1


# Defence: ``read_part`` in runner.gateway.grammar.
def test_row_20_ranges_that_ask_for_more_than_there_is(gate: Gate) -> None:
    digest = gate.push(b"0123456789")
    for header, status in (
        ("bytes=" + ",".join(f"{i}-{i}" for i in range(1000)), 416),
        ("bytes=0-0,0-0", 416),
        ("bytes=0-18446744073709551616", 416),
        ("bytes=-18446744073709551616", 416),
        ("bytes=9223372036854775807-", 416),
        ("bytes=0-999999999999999999", 206),
        ("bytes=9-", 206),
    ):
        answer = gate.ask("GET", f"{PUSH}/blobs/{digest}", headers={"Range": header})
        assert answer.status == status
        assert len(answer.body) < 200


# Defence: ``Bounds.head_seconds`` and ``body_seconds``.
def test_row_20_a_peer_that_sends_a_byte_now_and_then(gate: Gate) -> None:
    quick = Bounds(head_seconds=0.3, body_seconds=0.3, idle_seconds=0.3)
    gate.session._server._bounds = quick
    slow = gate.head("PATCH", gate.start(), "Content-Length: 100")
    for begun in (b"", slow[:40], slow + b"x"):
        with connect(gate.path, timeout=5) as peer:
            peer.sendall(begun)
            began = time.monotonic()
            assert b" 20" not in peer.recv(1000)
            assert time.monotonic() - began < 3
    with connect(gate.path, timeout=5) as peer, pytest.raises(OSError):
        drip(peer, slow * 100)


def drip(peer: socket.socket, data: bytes) -> None:
    for byte in data:
        peer.sendall(bytes([byte]))
        time.sleep(0.02)


# Defence: a half-closed peer is read to its end and answered, in _Exchange.
def test_row_20_a_half_closed_peer_gets_its_answer_and_keeps_no_place(gate: Gate) -> None:
    for _ in range(100):
        assert statuses(speak(gate.path, gate.head("GET", "/v2/"))) == [200]
    head = gate.head("POST", f"{PUSH}/blobs/uploads/?digest={Digest.of(b'x')}", "Content-Length: 9")
    for _ in range(100):
        assert statuses(speak(gate.path, head + b"x")) == [400]
    assert gate.session._staging._uploads == {}


# Defence: ``fullmatch`` of the grammar's patterns over the path as it came.
@pytest.mark.parametrize(
    "target",
    ["/v2/staged/image/manifests/%6catest", "/v2/staged%2fimage/manifests/latest",
     "/v2/staged/image/manifests/latest;x", "/v2/staged/image/manifests/latest/",
     "/v2/staged/image/manifests/latest#x", "/v2/./staged/image/manifests/latest",
     "/v2/staged/./image/manifests/latest", "/v2/staged/image/x/../manifests/latest",
     "/v2/STAGED/image/manifests/latest", "/V2/staged/image/manifests/latest",
     "/v2/staged\\image/manifests/latest", "/v2/staged/image/manifests/latest%0d%0aX:y",
     "/v2/staged/image/manifests//latest", "/v2/staged/image/manifests/" + "a" * 201],
)  # fmt: skip
def test_row_20_another_spelling_of_a_path_is_another_path(target: str, gate: Gate) -> None:
    gate.push_image("latest")
    assert statuses(speak(gate.path, gate.head("GET", target))) in ([404], [400])


# Defence: ``hmac.compare_digest`` in Session._authorised.
def test_row_20_the_token_of_another_session(gates: Gates) -> None:
    ours, theirs = gates.open(), gates.open()
    answer = theirs.ask("POST", f"{PUSH}/blobs/uploads/", headers={"Authorization": ours.login})
    assert answer.status == 401


# Defence: ``Anonymous()`` in Upstream, and with_credentials in its _client.
def test_row_23_the_users_credentials_for_another_teams_image(gates: Gates) -> None:
    gate = gates.open(pull_credentials=(("r.example/mine",),))
    gate.as_user.add_image("r.example/private:1")
    assert gate.ask("GET", f"{PRIVATE}/manifests/1").status == 404
    assert gate.as_user.asked == []


# Defence: ``if not self._reachable.may_resolve(image)`` in Upstream.resolve.
def test_row_23_an_image_that_the_decision_does_not_name(gates: Gates) -> None:
    gate = gates.open(base_images=(("r.example/mine",),))
    gate.anonymous.add_image("r.example/private:1")
    assert gate.ask("GET", f"{PRIVATE}/manifests/1").status == 404


def cached_by_another(gates: Gates) -> Digest:
    victim = gates.open()
    manifest = victim.anonymous.add_image("r.example/private:1", compression="zstd")
    digest = Digest(manifest["layers"][0]["digest"])
    victim.ask("GET", f"{PRIVATE}/manifests/1")
    assert victim.ask("GET", f"{PRIVATE}/blobs/{digest}").status == 200
    return digest


# Defence: ``if based is None`` in Upstream.open_blob, is_uploaded in Staging.open, and ``sees`` in
# _start_upload.
def test_row_24_a_blob_that_only_the_shared_cache_has(gates: Gates) -> None:
    digest = cached_by_another(gates)
    thief = gates.open()
    for name in (PRIVATE, PUSH):
        assert thief.ask("HEAD", f"{name}/blobs/{digest}").status == 404
        assert thief.ask("GET", f"{name}/blobs/{digest}").status == 404
    mount = f"{PUSH}/blobs/uploads/?mount={digest}&from=r.example/private"
    assert thief.ask("POST", mount).status == 202


# Defence: ``if not staging.sees(child)`` in _put_manifest.
def test_row_24_a_manifest_of_somebody_elses_layers(gates: Gates) -> None:
    digest = cached_by_another(gates)
    thief = gates.open()
    manifest = push_all_but_the_manifest(thief)
    layers = manifest["layers"]
    assert isinstance(layers, list)
    layers[0]["digest"] = str(digest)
    assert thief.put_manifest("latest", json.dumps(manifest).encode()).status == 404


# Defence: ``self._mark(asked, digest).exists()`` in Upstream._take.
def test_row_24_a_registry_of_ones_own_that_names_somebody_elses_layer(gates: Gates) -> None:
    digest = cached_by_another(gates)
    thief = gates.open()
    # Names the layer, and cannot deliver it.
    thief.anonymous.add_image("r.example/evil:1", compression="zstd")
    del thief.anonymous.blobs[digest]
    thief.ask("GET", "/v2/r.example/evil/manifests/1")
    assert thief.ask("GET", f"/v2/r.example/evil/blobs/{digest}").status == 404
    manifest = thief.anonymous.manifest(ImageReference.parse("r.example/evil:1"))[1]
    thief.put_manifest("latest", manifest)
    assert thief.session.seal().blobs.size(digest) is None


# Defence: ``self._server.close()`` in Session.close, and ``_require_open`` in Staging.
def test_row_27_a_process_left_behind_pushes_again(gate: Gate) -> None:
    first = gate.push_image("latest")
    with connect(gate.path) as left_behind:
        left_behind.sendall(gate.head("GET", "/v2/"))
        assert statuses(left_behind.recv(1000)) == [200]
        image = gate.session.seal()
        with pytest.raises(OSError):
            connect(gate.path)
        try:
            left_behind.sendall(gate.head("POST", f"{PUSH}/blobs/uploads/"))
            answer = left_behind.recv(1000)
        except OSError:
            answer = b""
    assert 202 not in statuses(answer)
    assert image.root.digest == first


# Defence: ``self._rules.check_tag`` in _put_manifest, which is _no_signature for sessions.
def test_row_29_a_tag_that_looks_like_a_signature(gate: Gate) -> None:
    data = json.dumps(push_all_but_the_manifest(gate)).encode()
    for suffix in ("", ".sig", ".att", ".sbom"):
        assert gate.put_manifest(f"sha256-{'0' * 64}{suffix}", data).status == 403
    with pytest.raises(NothingStaged):
        gate.session.seal()


# Defence: ``if parsed.subject is not None`` in read_image, which SESSION reads with.
def test_row_29_a_manifest_with_a_subject(gate: Gate) -> None:
    image = gate.push_image("latest")
    manifest = push_all_but_the_manifest(gate)
    subject = {"mediaType": OCI_MANIFEST, "digest": str(image), "size": 1}
    data = json.dumps({**manifest, "subject": subject}).encode()
    assert gate.put_manifest(Digest.of(data), data).status == 400
    assert gate.ask("GET", f"/v2/staged/image/referrers/{image}").status == 404

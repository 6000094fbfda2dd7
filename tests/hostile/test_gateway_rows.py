"""Attacks on the gateway, by their row in the list of threats.

Beside each test stands the line whose removal makes it fail.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from policies.reference import Digest, ImageReference
from runner.errors import NothingStaged
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
# asks through parse_document.
@pytest.mark.parametrize("trick", [b'"layers": [], ', b'"manifests": [], ', b'"Layers": [], '])
def test_row_13_a_manifest_that_two_readers_read_differently(trick: bytes, gate: Gate) -> None:
    data = json.dumps(push_all_but_the_manifest(gate)).encode()
    assert gate.put_manifest("latest", b"{" + trick + data[1:]).status == 400
    assert gate.put_manifest("latest", data).status == 201


# Defence: ``if len(received) > self._limits.manifest_bytes`` in _put_manifest.
def test_row_13_a_manifest_without_end(gate: Gate) -> None:
    lines = (f"Content-Type: {OCI_MANIFEST}", "Transfer-Encoding: chunked")
    head = gate.head("PUT", f"{PUSH}/manifests/latest", *lines)
    assert statuses(speak(gate.path, head + (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 6)) == [
        413
    ]


# Defence: ``{b"transfer-encoding", b"content-length"} <= names`` in _Exchange._fault.
def test_row_20_request_smuggling(gate: Gate) -> None:
    hidden = gate.head("DELETE", gate.start())
    body = b"0\r\n\r\n" + hidden
    lines = (f"Content-Length: {len(body)}", "Transfer-Encoding: chunked")
    assert statuses(speak(gate.path, gate.head("GET", "/v2/", *lines) + body)) == [400]


# Defence: ``len(head) > self._bounds.header_bytes`` in _Exchange._fault.
def test_row_20_giant_headers(gate: Gate) -> None:
    bomb = gate.head("GET", "/v2/", *["a: b"] * 10_000)
    assert statuses(speak(gate.path, bomb)) == [431]


# Defence: ``_NAME``, matched in full, in runner.gateway.registry.
@pytest.mark.parametrize(
    "name", ["r.example/../r.example/base", "r.example/base%2f", "r.example//base"]
)
def test_row_20_path_traversal(name: str, gate: Gate) -> None:
    gate.anonymous.add_image("r.example/base:1")
    assert statuses(speak(gate.path, gate.head("GET", f"/v2/{name}/manifests/1"))) == [404]
    assert gate.anonymous.asked == []


# Defence: ``_check_range`` in _patch_upload.
def test_row_20_range_games(gate: Gate) -> None:
    location = gate.start()
    for span in ("5-9", "0-18446744073709551616", "-1-3"):
        assert gate.ask("PATCH", location, b"hello", {"Content-Range": span}).status == 416


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


# Defence: ``if not self._staging.sees(child.digest)`` in _put_manifest.
def test_row_24_a_manifest_of_somebody_elses_layers(gates: Gates) -> None:
    digest = cached_by_another(gates)
    thief = gates.open()
    manifest = push_all_but_the_manifest(thief)
    layers = manifest["layers"]
    assert isinstance(layers, list)
    layers[0]["digest"] = str(digest)
    assert thief.put_manifest("latest", json.dumps(manifest).encode()).status == 404


# Defence: ``not self._has(image, digest)`` in Upstream.open_blob, ``known`` in Upstream.size.
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


# Defence: ``_check_tag`` in _put_manifest.
def test_row_29_a_tag_that_looks_like_a_signature(gate: Gate) -> None:
    data = json.dumps(push_all_but_the_manifest(gate)).encode()
    for suffix in ("", ".sig", ".att", ".sbom"):
        assert gate.put_manifest(f"sha256-{'0' * 64}{suffix}", data).status == 403
    with pytest.raises(NothingStaged):
        gate.session.seal()


# Defence: ``if parsed.subject is not None`` in _put_manifest.
def test_row_29_a_manifest_with_a_subject(gate: Gate) -> None:
    image = gate.push_image("latest")
    manifest = push_all_but_the_manifest(gate)
    subject = {"mediaType": OCI_MANIFEST, "digest": str(image), "size": 1}
    data = json.dumps({**manifest, "subject": subject}).encode()
    assert gate.put_manifest(Digest.of(data), data).status == 400
    assert gate.ask("GET", f"/v2/staged/image/referrers/{image}").status == 404

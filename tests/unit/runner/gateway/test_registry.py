"""One session's registry, asked through its socket."""

import contextlib
import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.model import Limits, Network
from policies.reference import Digest, ImageReference
from runner.errors import (
    BaseImageDenied,
    DiskExceeded,
    ImageNotFound,
    InternalError,
    LimitExceeded,
    NothingStaged,
    QuotaExceeded,
    RegistryProtocol,
    RegistryRefused,
    RegistryUnreachable,
    RunnerError,
)
from runner.gateway import http, ledger, registry, staging, upstream
from runner.gateway.session import _aliases
from runner.registry.image import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Descriptor
from runner.stores import blobs as blob_store
from tests.support.gateway import PUSH, Gate, Gates, connect, speak, statuses
from tests.support.images import MemoryBlobs, make_image, make_index

BASE = "/v2/r.example/base"
DATA = b"some bytes of a layer" * 1000
OTHER = Digest.of(b"of another tenant")


def layers_of(manifest: dict[str, Any]) -> list[Digest]:
    return [Digest(layer["digest"]) for layer in manifest["layers"]]


# -- who may ask -------------------------------------------------------------------------------


def test_a_session_answers_to_its_own_token_alone(gates: Gates) -> None:
    gate, other = gates.open(), gates.open()
    for login in ("", "Basic", "Basic c2Vzc2lvbjo=", other.login, gate.login + "x", "Basic \xff"):
        answer = gate.ask("GET", "/v2/", headers={"Authorization": login})
        assert (answer.status, answer.code) == (401, "UNAUTHORIZED")
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert gate.ask("GET", "/v2/").status == 200
    assert gate.ask("HEAD", "/v2/").status == 200
    twice = gate.head("GET", "/v2/", f"Authorization: {gate.login}")
    assert statuses(speak(gate.path, twice)) == [401]


@pytest.mark.parametrize("scheme", ["Basic", "BASIC", "Bearer", "bearer"])
def test_a_token_may_be_shown_by_a_scheme_in_any_case(scheme: str, gates: Gates) -> None:
    gate = gates.open(network=Network.EGRESS)
    is_basic = scheme.lower() == "basic"
    shown = gate.login.partition(" ")[2] if is_basic else gate.session.token
    assert gate.ask("GET", "/v2/", headers={"Authorization": f"{scheme} {shown}"}).status == 200
    proxied = gate.head("GET", "http://a.example/", f"Proxy-Authorization: {scheme} {shown}")
    assert statuses(speak(gate.path, proxied)) == [403 if is_basic else 407], "no bearers there"


def test_another_uid_is_not_heard(gates: Gates) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a door for another uid: run as root")
    gate = gates.open(peer_uid=1_900_000_000)
    assert speak(gate.path, gate.head("GET", "/v2/")) == b""
    assert gate.path.stat().st_uid == 1_900_000_000


def test_the_socket_is_closed_to_other_users(gate: Gate) -> None:
    assert gate.path.stat().st_mode & 0o777 == 0o600


# -- pulling -----------------------------------------------------------------------------------


def test_a_tag_is_resolved_once_and_stays(gate: Gate) -> None:
    first = gate.anonymous.add_image("r.example/base:1")
    answer = gate.ask("GET", f"{BASE}/manifests/1")
    assert answer.status == 200
    assert json.loads(answer.body) == first
    assert answer.headers["Content-Type"] == OCI_MANIFEST
    assert answer.headers["Docker-Content-Digest"] == Digest.of(answer.body)
    gate.anonymous.add_image("r.example/base:1", compression="zstd")
    assert gate.ask("GET", f"{BASE}/manifests/1").body == answer.body
    assert gate.anonymous.asked == ["r.example/base:1"]
    reference = ImageReference.parse("r.example/base:1")
    assert gate.session.upstream.resolved() == {reference: Digest.of(answer.body)}


def test_two_who_resolve_a_tag_at_once_get_the_same(gate: Gate) -> None:
    gate.anonymous.add_image("r.example/base:1")
    both_asked, answers = threading.Barrier(2), []
    ask = gate.anonymous.manifest

    def slow(reference: ImageReference) -> Any:
        found = ask(reference)
        gate.anonymous.add_image("r.example/base:1", compression="zstd")
        both_asked.wait(5)
        return found

    gate.anonymous.manifest = slow  # type: ignore[method-assign] # the fake's
    threads = [
        threading.Thread(target=lambda: answers.append(gate.ask("GET", f"{BASE}/manifests/1").body))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(answers) == 2
    assert len(set(answers)) == 1


def test_a_head_says_what_a_get_says(gate: Gate) -> None:
    manifest = gate.anonymous.add_image("r.example/base:1")
    blob = f"{BASE}/blobs/{layers_of(manifest)[0]}"
    for target in (f"{BASE}/manifests/1", blob):
        head, get = gate.ask("HEAD", target), gate.ask("GET", target)
        assert head.status == get.status == 200
        assert head.headers == get.headers
        assert head.body == b""
        assert int(head.headers["Content-Length"]) == len(get.body)
        assert head.headers["Docker-Content-Digest"] == Digest.of(get.body)


def test_an_image_is_pulled_by_digest(gate: Gate) -> None:
    gate.anonymous.add_image("r.example/base:1")
    digest = Digest.of(gate.anonymous.manifest(ImageReference.parse("r.example/base:1"))[1])
    answer = gate.ask("GET", f"{BASE}/manifests/{digest}")
    assert Digest.of(answer.body) == digest
    assert gate.anonymous.asked[-1] == f"r.example/base@{digest}"


def test_an_index_makes_none_of_its_blobs_reachable(gate: Gate) -> None:
    index = make_index(("linux", "amd64", None))
    data = index.blobs.open(index.root.digest).read()
    gate.anonymous.add("r.example/base:1", OCI_INDEX, data)
    child = Digest(json.loads(data)["manifests"][0]["digest"])
    assert gate.ask("GET", f"{BASE}/manifests/1").status == 200
    assert gate.ask("GET", f"{BASE}/blobs/{child}").status == 404
    config = json.loads(index.blobs.open(child).read())["config"]["digest"]
    assert gate.ask("HEAD", f"{BASE}/blobs/{config}").status == 404


def test_a_blob_is_fetched_once_and_shared_between_sessions(gates: Gates) -> None:
    first, second = gates.open(), gates.open()
    for gate in (first, second):
        manifest = gate.anonymous.add_image("r.example/base:1")
        gate.ask("GET", f"{BASE}/manifests/1")
        digest = layers_of(manifest)[0]
        for _ in range(2):
            assert Digest.of(gate.ask("GET", f"{BASE}/blobs/{digest}").body) == digest
    assert first.anonymous.asked == ["r.example/base:1", f"r.example/base@{digest}"]
    assert second.anonymous.asked == ["r.example/base:1"]


def test_bytes_that_are_not_their_digest_are_refused_and_not_kept(gate: Gate) -> None:
    digest = layers_of(gate.anonymous.add_image("r.example/base:1"))[0]
    right = gate.anonymous.blobs[digest]
    gate.anonymous.blobs[digest] = bytes(len(right))
    gate.ask("GET", f"{BASE}/manifests/1")
    assert gate.ask("GET", f"{BASE}/blobs/{digest}").status == 502
    assert isinstance(gate.session.failure, RegistryProtocol)
    gate.anonymous.blobs[digest] = right
    assert gate.ask("GET", f"{BASE}/blobs/{digest}").body == right


@pytest.mark.parametrize(
    "target",
    [
        "/v2/r.example/../base/manifests/1",
        "/v2/%72.example/base/manifests/1",
        "/v2/r.example/base%2Fmanifests/1",
        "/v2/r.example/base/manifests/..",
        "/v2/r.example/base/manifests/1%00",
        "/v2//r.example/base/manifests/1",
        "//v2/r.example/base/manifests/1",
        "/v2/r.example/manifests/1",
        "/v2/elsewhere.example/base/manifests/1",
        "/v2/R.example/base/manifests/1",
        "/v2/r.example/base/blobs/../manifests/1",
        "/v2/r.example/base/blobs/..%2f..%2fetc%2fpasswd",
        "/v2/_catalog",
        "/v2/r.example/base/tags/list",
        "/v2/staged/image/referrers/sha256:" + "0" * 64,
        "/",
        "/v3/",
    ],
)
def test_a_target_outside_the_grammar_does_not_exist(target: str, gate: Gate) -> None:
    gate.anonymous.add_image("r.example/base:1")
    answers = speak(gate.path, gate.head("GET", target))
    assert statuses(answers) == [404]
    assert gate.anonymous.asked == []
    assert gate.session.failure is None


@pytest.mark.parametrize("target", ["http://gateway/v2/", "r.example:443", "*"])
def test_a_target_that_is_no_path_never_gets_to_the_registry(target: str, gate: Gate) -> None:
    (status,) = statuses(speak(gate.path, gate.head("GET", target)))
    assert 400 <= status < 500


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "PATCH", "DELETE", "FROB"])
def test_a_method_that_is_not_offered_is_refused(method: str, gate: Gate) -> None:
    for target in (f"{BASE}/manifests/1", f"{PUSH}/blobs/{OTHER}"):
        assert statuses(speak(gate.path, gate.head(method, target))) == [405]


def test_a_very_long_target_is_refused_quickly(gate: Gate) -> None:
    assert gate.ask("GET", "/v2/" + "a" * 3000).status == 414
    assert gate.ask("GET", f"/v2/{'a-' * 1000}!").status == 404


@pytest.mark.parametrize("digest", ["sha256:00", "md5:" + "0" * 32, "sha256:" + "0" * 128])
def test_a_malformed_digest_is_refused(digest: str, gate: Gate) -> None:
    assert gate.ask("GET", f"{BASE}/blobs/{digest}").code == "DIGEST_INVALID"


def test_an_image_outside_the_decision_does_not_exist_and_the_user_hears_why(gate: Gate) -> None:
    unknown = gate.ask("GET", "/v2/elsewhere/base/manifests/1")
    assert unknown.status == 404
    assert gate.session._failures == []
    gate.session._endpoint._upstreams = {"other.example": "other.example"}
    answer = gate.ask("GET", "/v2/other.example/base/manifests/1")
    assert answer == unknown
    assert isinstance(gate.session.failure, BaseImageDenied)
    assert gate.anonymous.asked == []


def test_without_a_network_nothing_can_be_resolved(gates: Gates) -> None:
    gate = gates.open(network=Network.NONE)
    gate.anonymous.add_image("r.example/base:1")
    assert gate.ask("GET", f"{BASE}/manifests/1").status == 404
    assert gate.anonymous.asked == []
    assert isinstance(gate.session.failure, BaseImageDenied)
    gate.push_image("latest")


def test_only_repositories_that_the_decision_names_are_pulled_with_credentials(
    gates: Gates,
) -> None:
    gate = gates.open(pull_credentials=(("r.example/private/*",),))
    for fake in (gate.anonymous, gate.as_user):
        for name in ("private/app", "private", "private/deep/er", "other"):
            fake.add_image(f"r.example/{name}:1")
    for name in ("private/app", "private", "private/deep/er", "other"):
        manifest = json.loads(gate.ask("GET", f"/v2/r.example/{name}/manifests/1").body)
        gate.ask("GET", f"/v2/r.example/{name}/blobs/{layers_of(manifest)[0]}")
    assert {asked.partition("@")[0] for asked in gate.as_user.asked} <= {
        "r.example/private/app",
        "r.example/private/app:1",
    }
    assert "r.example/private/app:1" in gate.as_user.asked
    assert "r.example/private/app:1" not in gate.anonymous.asked


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ImageNotFound("no"), 404),
        (RegistryRefused("at /home/user/.docker/config.json"), 404),
        (BaseImageDenied("10.0.0.7"), 404),
        (RegistryUnreachable("no route"), 502),
        (DiskExceeded("/home/user is full"), 413),
        (InternalError("/home/user"), 502),
    ],
)
def test_what_goes_wrong_upstream_is_noted_and_shows_nothing_of_the_host(
    error: RunnerError, status: int, gate: Gate
) -> None:
    gate.anonymous.error = error
    answer = gate.ask("GET", f"{BASE}/manifests/1")
    assert answer.status == status
    assert gate.session.failure is error
    assert not re.search(rb"/home|10\.0", answer.body)


def test_a_base_manifest_that_is_unsound_is_refused(gate: Gate) -> None:
    gate.anonymous.add("r.example/base:1", OCI_MANIFEST, b'{"schemaVersion": 2, "a": 1, "a": 2}')
    assert gate.ask("GET", f"{BASE}/manifests/1").status == 502
    assert isinstance(gate.session.failure, RegistryProtocol)


def test_what_a_session_resolves_is_bounded(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "IMAGES", 2)
    for name in ("a", "b", "c"):
        gate.anonymous.add_image(f"r.example/{name}:1")
    got = [gate.ask("GET", f"/v2/r.example/{name}/manifests/1").status for name in "abca"]
    assert got == [200, 200, 413, 200]
    assert isinstance(gate.session.failure, QuotaExceeded)


def test_the_bytes_that_a_session_pulls_are_bounded(gate: Gate) -> None:
    digests = layers_of(gate.anonymous.add_image("r.example/base:1"))
    gate.ask("GET", f"{BASE}/manifests/1")
    gate.session.upstream._most_bytes = len(gate.anonymous.blobs[digests[0]])
    got = [gate.ask("GET", f"{BASE}/blobs/{digest}").status for digest in (*digests, digests[0])]
    assert got == [200, 413, 200]


# -- the reachable set -------------------------------------------------------------------------


def cached_by_another(gates: Gates) -> Digest:
    """A blob that is in the shared cache, because another session pulled it."""
    tenant = gates.open(base_images=(("r.example/private",),))
    digest = layers_of(tenant.anonymous.add_image("r.example/private:1"))[0]
    assert tenant.ask("GET", "/v2/r.example/private/manifests/1").status == 200
    assert tenant.ask("GET", f"/v2/r.example/private/blobs/{digest}").status == 200
    return digest


def test_a_blob_of_another_session_does_not_exist(gates: Gates) -> None:
    digest = cached_by_another(gates)
    gate = gates.open()
    for name in ("staged/image", "r.example/base", "r.example/private"):
        missing = gate.ask("GET", f"/v2/{name}/blobs/{OTHER}")
        assert (missing.status, missing.code) == (404, "BLOB_UNKNOWN")
        assert gate.ask("GET", f"/v2/{name}/blobs/{digest}") == missing
        assert gate.ask("HEAD", f"/v2/{name}/blobs/{digest}").status == 404
    for blob in (digest, OTHER):
        answer = gate.ask("POST", f"{PUSH}/blobs/uploads/?mount={blob}&from=r.example/private")
        assert answer.status == 202


def test_a_manifest_of_ones_own_registry_does_not_open_the_cache(gates: Gates) -> None:
    digest = cached_by_another(gates)
    gate = gates.open(base_images=(("r.example/evil",),))
    gate.anonymous.add_image(
        "r.example/evil:1",
        edit_manifest=lambda manifest: manifest["layers"][0].update(digest=str(digest)),
    )
    gate.anonymous.blobs.pop(digest, None)
    assert gate.ask("GET", "/v2/r.example/evil/manifests/1").status == 200
    assert gate.ask("GET", f"/v2/r.example/evil/blobs/{digest}").status == 404
    manifest = gate.anonymous.manifest(ImageReference.parse("r.example/evil:1"))[1]
    gate.push(gate.anonymous.blobs[Digest(json.loads(manifest)["config"]["digest"])])
    gate.put_manifest("latest", manifest)
    staged = gate.session.seal()
    assert staged.blobs.size(digest) is None
    with pytest.raises(FileNotFoundError):
        staged.blobs.open(digest)


def test_manifests_that_do_not_end_are_few(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PATIENCE_SECONDS", 0.2)
    begun = gate.head("PUT", f"{PUSH}/manifests/x", "Content-Length: 4000000") + b"{" * 100_000
    with contextlib.ExitStack() as stack:
        for _ in range(registry._MANIFESTS_AT_A_TIME):
            stack.enter_context(connect(gate.path)).sendall(begun)
        until = time.monotonic() + 10  # the others may not have been heard yet
        while (answer := gate.put_manifest("latest", b"{}")).status != 429:
            assert time.monotonic() < until
        assert json.loads(answer.body)["errors"][0]["code"] == "TOOMANYREQUESTS"
    until = time.monotonic() + 10
    while gate.put_manifest("latest", b"{}").status == 429:
        assert time.monotonic() < until


def test_a_staged_manifest_is_sent_from_its_file(gate: Gate) -> None:
    digest = gate.push_image("latest")
    found = gate.session._staging.manifest(digest)
    assert found is not None
    with found[1] as stream:
        assert stream.fileno() > 2
    whole = gate.ask("GET", f"{PUSH}/manifests/latest")
    assert Digest.of(whole.body) == digest
    head = gate.ask("HEAD", f"{PUSH}/manifests/latest")
    assert head.headers["Content-Length"] == str(len(whole.body))
    unwanted = gate.ask("GET", f"{PUSH}/manifests/latest", headers={"Accept": OCI_INDEX})
    assert unwanted.status == 404


def test_a_blob_of_a_resolved_image_can_be_mounted_and_is_found_after_the_seal(gate: Gate) -> None:
    base = gate.anonymous.add_image("r.example/base:1")
    digest = layers_of(base)[0]
    gate.ask("GET", f"{BASE}/manifests/1")
    content = gate.ask("GET", f"{BASE}/blobs/{digest}").body
    mounted = gate.ask("POST", f"{PUSH}/blobs/uploads/?mount={digest}&from=r.example/base")
    assert (mounted.status, mounted.headers["Location"]) == (201, f"{PUSH}/blobs/{digest}")
    manifest = gate.anonymous.manifest(ImageReference.parse("r.example/base:1"))[1]
    assert gate.put_manifest("latest", manifest).status == 201
    staged = gate.session.seal()
    assert staged.root.digest == Digest.of(manifest)
    assert staged.blobs.size(digest) == len(content)
    with staged.blobs.open(digest) as stream:
        assert stream.read() == content


# -- pushing -----------------------------------------------------------------------------------


def chunks(gate: Gate) -> Iterator[str]:
    location = gate.start()
    half = len(DATA) // 2
    for start, end in ((0, half), (half, len(DATA))):
        span = {"Content-Range": f"{start}-{end - 1}"}
        answer = gate.ask("PATCH", location, DATA[start:end], span)
        assert (answer.status, answer.headers["Range"]) == (202, f"0-{end - 1}")
        location = answer.headers["Location"]
        status = gate.ask("GET", location)
        assert (status.status, status.headers["Range"]) == (204, f"0-{end - 1}")
    yield location


def push_in_chunks(gate: Gate, digest: Digest) -> int:
    (location,) = chunks(gate)
    return gate.ask("PUT", f"{location}?digest={digest}").status


def push_in_a_stream(gate: Gate, digest: Digest) -> int:
    location = gate.start()
    assert gate.ask("PATCH", location, iter([DATA[:9], DATA[9:]])).status == 202
    return gate.ask("PUT", f"{location}?digest={digest.replace(':', '%3A')}").status


def push_with_the_put(gate: Gate, digest: Digest) -> int:
    return gate.ask("PUT", f"{gate.start()}?digest={digest}", DATA).status


def push_at_once(gate: Gate, digest: Digest) -> int:
    return gate.ask("POST", f"{PUSH}/blobs/uploads/?digest={digest}", DATA).status


WAYS = [push_in_chunks, push_in_a_stream, push_with_the_put, push_at_once]


@pytest.mark.parametrize("push", WAYS)
def test_a_blob_arrives(push: Callable[[Gate, Digest], int], gate: Gate) -> None:
    digest = Digest.of(DATA)
    assert push(gate, digest) == 201
    assert gate.ask("GET", f"{PUSH}/blobs/{digest}").body == DATA
    assert gate.files() == [f"blobs/sha256/{digest.hex}"]


@pytest.mark.parametrize("push", WAYS)
@pytest.mark.parametrize("digest", [OTHER, Digest("sha512:" + "0" * 128)])
def test_a_blob_under_a_wrong_digest_is_refused_and_forgotten(
    push: Callable[[Gate, Digest], int], digest: Digest, gate: Gate
) -> None:
    assert push(gate, digest) == 400
    assert gate.files() == []
    assert gate.ask("HEAD", f"{PUSH}/blobs/{digest}").status == 404
    assert gate.session._staging._uploads == {}


def test_an_empty_blob_comes_and_goes(gate: Gate) -> None:
    assert gate.ask("GET", f"{PUSH}/blobs/{gate.push(b'')}").body == b""
    assert gate.session.failure is None


@pytest.mark.parametrize(
    "span", ["1-4", "5-9", "3-2", "0", "-1-4", "0-4/9", "bytes 0-4", "0-" + "9" * 19]
)
def test_chunks_out_of_order_are_refused(span: str, gate: Gate) -> None:
    location = gate.start()
    assert gate.ask("PATCH", location, b"abc").status == 202
    for method in ("PATCH", "PUT"):
        answer = gate.ask(method, f"{location}?digest={OTHER}", b"defgh", {"Content-Range": span})
        assert answer.status == 416
    assert gate.ask("GET", location).headers["Range"] == "0-2"


def test_an_upload_that_is_cancelled_or_was_never_begun_is_unknown(gate: Gate) -> None:
    location = gate.start()
    gate.ask("PATCH", location, DATA)
    assert gate.ask("DELETE", location).status == 204
    for target in (location, f"{PUSH}/blobs/uploads/{'0' * 32}"):
        for method in ("GET", "PATCH", "DELETE", "PUT"):
            answer = gate.ask(method, f"{target}?digest={OTHER}", b"x")
            assert (answer.status, answer.code if method != "GET" else "") == (
                404,
                "BLOB_UPLOAD_UNKNOWN" if method != "GET" else "",
            )
    assert gate.files() == []


def test_names_of_uploads_cannot_be_guessed(gate: Gate) -> None:
    names = {gate.start().rpartition("/")[2] for _ in range(5)}
    assert len(names) == 5
    assert all(re.fullmatch(r"[0-9a-f]{32}", name) for name in names)


def test_an_upload_of_another_session_is_unknown(gates: Gates) -> None:
    first, second = gates.open(), gates.open()
    assert second.ask("PATCH", first.start(), b"x").status == 404


def test_one_upload_takes_one_request_at_a_time(gate: Gate) -> None:
    location = gate.start()
    with connect(gate.path) as peer:
        peer.sendall(gate.head("PATCH", location, "Content-Length: 6") + b"abc")
        upload = gate.session._staging.upload(location.rpartition("/")[2])
        while upload.size != 3:
            pass
        for method in ("GET", "PATCH", "PUT", "DELETE"):
            assert gate.ask(method, f"{location}?digest={OTHER}", b"x").status == 409
        peer.sendall(b"def")
        assert statuses(peer.recv(1000)) == [202]
    assert gate.ask("PUT", f"{location}?digest={Digest.of(b'abcdef')}").status == 201
    assert gate.session.failure is None


def test_an_upload_that_broke_off_can_be_taken_up_again(gate: Gate) -> None:
    location = gate.start()
    head = gate.head("PATCH", location, "Content-Length: 9")
    assert statuses(speak(gate.path, head + b"abc")) == [400]
    assert gate.ask("GET", location).headers["Range"] == "0-2"
    assert gate.ask("PUT", f"{location}?digest={Digest.of(b'abcd')}", b"d").status == 201


def test_a_push_at_once_that_broke_off_leaves_nothing(gate: Gate) -> None:
    head = gate.head("POST", f"{PUSH}/blobs/uploads/?digest={OTHER}", "Content-Length: 9")
    assert statuses(speak(gate.path, head + b"abc")) == [400]
    assert gate.session._staging._uploads == {}
    assert gate.files() == []


def test_the_bytes_of_a_session_are_bounded(gates: Gates) -> None:
    gate = gates.open(limits=Limits(staged_bytes=1000))
    gate.push(bytes(900))
    location = gate.start()
    assert gate.ask("PATCH", location, bytes(101)).status == 413
    assert gate.ask("POST", f"{PUSH}/blobs/uploads/?digest={OTHER}", b"x").status == 413
    assert isinstance(gate.session.failure, QuotaExceeded)


def test_the_uploads_at_a_time_are_bounded(gate: Gate) -> None:
    gate.session._staging._room = staging.Room(uploads=2)
    location, _ = gate.start(), gate.start()
    assert gate.ask("POST", f"{PUSH}/blobs/uploads/").status == 413
    gate.ask("DELETE", location)
    gate.start()


def test_the_blobs_of_a_session_are_bounded(gate: Gate) -> None:
    gate.session._staging._room = staging.Room(blobs=2)
    gate.push(b"a")
    gate.push(b"b")
    assert gate.ask("POST", f"{PUSH}/blobs/uploads/").status == 413
    assert isinstance(gate.session.failure, QuotaExceeded)


@pytest.mark.parametrize("call", ["write", "commit", "open"])
def test_a_full_disk_is_told_as_such(
    call: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    if call == "open":
        monkeypatch.setattr(blob_store.BlobStore, "writer", full)
    else:
        monkeypatch.setattr(blob_store.BlobWriter, call, full)
    answer = gate.ask("POST", f"{PUSH}/blobs/uploads/?digest={Digest.of(b'x')}", b"x")
    assert answer.status == 413
    assert str(gate.home) not in answer.body.decode()
    assert isinstance(gate.session.failure, DiskExceeded)


def test_a_disk_that_fails_is_our_bug_and_not_the_peers_loss(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(blob_store.BlobWriter, "write", broken)
    head = gate.head("POST", f"{PUSH}/blobs/uploads/?digest={OTHER}", "Content-Length: 1")
    assert statuses(speak(gate.path, head + b"x")) == [500]
    assert isinstance(gate.session.failure, InternalError)


@pytest.mark.parametrize("name", ["staged/other", "staged/image/deeper", "r.example/base", "image"])
def test_nothing_is_pushed_to_another_repository(name: str, gate: Gate) -> None:
    requests = [
        ("POST", "blobs/uploads/"),
        ("PATCH", f"blobs/uploads/{'0' * 32}"),
        ("PUT", f"blobs/uploads/{'0' * 32}?digest={OTHER}"),
        ("DELETE", f"blobs/uploads/{'0' * 32}"),
        ("PUT", "manifests/latest"),
    ]
    for method, rest in requests:
        answer = gate.ask(method, f"/v2/{name}/{rest}", b"x")
        assert (answer.status, answer.code) == (403, "DENIED")
    assert gate.files() == []


# -- manifests ---------------------------------------------------------------------------------


def pushed_blobs(gate: Gate, **parts: Any) -> bytes:
    """Pushes all of an image but its manifest, which is returned."""
    blobs = MemoryBlobs()
    root = make_image(blobs=blobs, **parts).root
    for digest, data in blobs.blobs.items():
        if digest != root.digest:
            gate.push(data)
    return blobs.blobs[root.digest]


def test_the_last_tag_is_the_image(gate: Gate) -> None:
    gate.push_image("one")
    last = gate.push_image("two", compression="zstd")
    untagged = pushed_blobs(gate, compression="")
    assert gate.put_manifest(Digest.of(untagged), untagged).status == 201
    assert gate.ask("GET", f"{PUSH}/manifests/one").status == 404
    assert Digest.of(gate.ask("GET", f"{PUSH}/manifests/two").body) == last
    assert gate.ask("GET", f"{PUSH}/manifests/{Digest.of(untagged)}").body == untagged
    assert gate.session.seal().root.digest == last


def test_an_index_needs_its_manifests(gate: Gate) -> None:
    index = make_index(("linux", "amd64", None))
    blobs = index.blobs
    assert isinstance(blobs, MemoryBlobs)
    data = blobs.blobs[index.root.digest]
    child = Digest(json.loads(data)["manifests"][0]["digest"])
    for digest, blob in blobs.blobs.items():
        if digest not in {index.root.digest, child}:
            gate.push(blob)
    assert gate.put_manifest("latest", data, OCI_INDEX).code == "MANIFEST_BLOB_UNKNOWN"
    assert gate.put_manifest(child, blobs.blobs[child]).status == 201
    assert gate.put_manifest("latest", data, OCI_INDEX).status == 201
    assert gate.session.seal().root == index.root


def test_a_manifest_of_unknown_blobs_is_refused(gate: Gate) -> None:
    manifest = pushed_blobs(gate, edit_manifest=lambda m: m["layers"][0].update(digest=str(OTHER)))
    answer = gate.put_manifest("latest", manifest)
    assert (answer.status, answer.code) == (404, "MANIFEST_BLOB_UNKNOWN")
    with pytest.raises(NothingStaged):
        gate.session.seal()


def subject(manifest: dict[str, Any]) -> None:
    manifest["subject"] = {"mediaType": OCI_MANIFEST, "digest": str(OTHER), "size": 1}


@pytest.mark.parametrize(
    "spoilt",
    [
        {"edit_manifest": subject},
        {"edit_manifest": lambda m: m["layers"][0].update(urls=["https://elsewhere.example/"])},
        {"edit_manifest": lambda m: m.update(manifests=[])},
        {"edit_manifest": lambda m: m.update(schemaVersion=1)},
        {"edit_manifest": lambda m: m["layers"].extend(m["layers"] * 100)},
        {"spoil_manifest": lambda data: data[:-1] + b',"config":{}}'},
        {"spoil_manifest": lambda data: data[:-1]},
        {"spoil_manifest": lambda data: data.decode().encode("utf-16")},
        {"spoil_manifest": lambda data: b"[" * 100_000},
    ],
)
def test_an_unsound_manifest_is_refused(spoilt: dict[str, Any], gate: Gate) -> None:
    answer = gate.put_manifest("latest", pushed_blobs(gate, **spoilt))
    assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")
    with pytest.raises(NothingStaged):
        gate.session.seal()


@pytest.mark.parametrize(
    "media_type",
    ["", "text/plain", "application/json", OCI_INDEX, DOCKER_MANIFEST, OCI_MANIFEST + "+a"],
)
def test_a_manifest_of_another_media_type_is_refused(media_type: str, gate: Gate) -> None:
    answer = gate.put_manifest("latest", pushed_blobs(gate), media_type)
    assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")


def test_a_manifest_under_another_digest_is_refused(gate: Gate) -> None:
    answer = gate.put_manifest(OTHER, pushed_blobs(gate))
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")


def test_a_manifest_that_is_too_long_is_refused_before_it_is_whole(gate: Gate) -> None:
    assert gate.put_manifest("latest", bytes((4 << 20) + 1)).code == "SIZE_INVALID"
    assert gate.files() == []


@pytest.mark.parametrize("suffix", ["", ".sig", ".att", ".sbom"])
def test_a_tag_of_a_signature_is_refused(suffix: str, gate: Gate) -> None:
    answer = gate.put_manifest(f"sha256-{OTHER.hex}{suffix}", pushed_blobs(gate))
    assert (answer.status, answer.code) == (403, "DENIED")


# -- the end -----------------------------------------------------------------------------------


def test_a_sealed_session_ends_every_connection(gate: Gate) -> None:
    root = gate.push_image("latest")
    with connect(gate.path) as idle, connect(gate.path) as busy:
        busy.sendall(gate.head("PATCH", gate.start(), "Content-Length: 6") + b"abc")
        assert gate.session.seal().root.digest == root
        assert idle.recv(10) == b""
        assert b" 20" not in busy.recv(1000)
    with pytest.raises(OSError):
        connect(gate.path).close()


def test_a_push_in_flight_cannot_finish_once_the_session_is_sealed(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stops waiting for a handler that hangs; what it does afterwards must not count."""
    first = gate.push_image("latest")
    late = pushed_blobs(gate, compression="zstd")
    before = gate.files()
    hanging, go_on, done = threading.Event(), threading.Event(), threading.Event()
    take = staging.Staging.take_manifest
    results: list[object] = []

    def slow(self: staging.Staging, *parts: Any) -> None:
        hanging.set()
        go_on.wait(10)
        try:
            take(self, *parts)
            results.append("taken")
        except staging.Sealed as error:
            results.append(error)
            raise
        finally:
            done.set()

    monkeypatch.setattr(staging.Staging, "take_manifest", slow)
    monkeypatch.setattr(gate.session._server, "_bounds", http.Bounds(close_seconds=0.2))
    with connect(gate.path) as peer:
        lines = (f"Content-Length: {len(late)}", f"Content-Type: {OCI_MANIFEST}")
        peer.sendall(gate.head("PUT", f"{PUSH}/manifests/latest", *lines) + late)
        assert hanging.wait(5)
        image = gate.session.seal()
        go_on.set()
        assert done.wait(5)
    assert [type(result) for result in results] == [staging.Sealed]
    assert image.root.digest == first == gate.session._staging.root.digest
    assert gate.files() == before


def test_the_seal_waits_for_what_is_becoming_a_part_of_the_session(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a file would appear, and the root change, after ``seal`` had returned."""
    gate.push_image("first")
    staging_area, adding, go_on = gate.session._staging, threading.Event(), threading.Event()
    add = staging_area.store.add

    def slow(data: bytes, algorithm: str) -> Digest:
        adding.set()
        go_on.wait(10)
        return add(data, algorithm)

    monkeypatch.setattr(staging_area.store, "add", slow)
    last = staging.Staged(Descriptor(OCI_MANIFEST, Digest.of(b"x"), 1))
    taking = threading.Thread(target=staging_area.take_manifest, args=(["last"], last, b"x"))
    taking.start()
    assert adding.wait(5)
    sealing = threading.Thread(target=staging_area.seal)
    sealing.start()
    sealing.join(0.2)
    assert sealing.is_alive()
    go_on.set()
    sealing.join(5)
    assert staging_area.root.digest == Digest.of(b"x")
    taking.join(5)


def test_a_blob_on_its_way_from_a_registry_is_dropped_when_the_session_ends(gate: Gate) -> None:
    digest = layers_of(gate.anonymous.add_image("r.example/base:1"))[0]
    gate.session.upstream.resolve(ImageReference.parse("r.example/base:1"))
    gate.session.upstream.close()
    with pytest.raises(RegistryUnreachable, match="session ended"):
        gate.session.upstream.open_blob(digest)
    assert gate.session.upstream.size(digest) is None


def test_closing_does_not_wait_for_a_slow_registry(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.anonymous.add_image("r.example/base:1")
    asked, answer = threading.Event(), threading.Event()
    found = gate.anonymous.manifest

    def stuck(reference: ImageReference) -> Any:
        asked.set()
        answer.wait(10)
        return found(reference)

    gate.anonymous.manifest = stuck  # type: ignore[method-assign] # the fake's
    monkeypatch.setattr(gate.session._server, "_bounds", http.Bounds(close_seconds=0.2))
    with connect(gate.path) as peer:
        peer.sendall(gate.head("GET", f"{BASE}/manifests/1"))
        assert asked.wait(5)
        closing = threading.Thread(target=gate.session.close)
        closing.start()
        closing.join(3)
        assert not closing.is_alive()
        answer.set()


# -- what is written down ----------------------------------------------------------------------


def test_the_ledger_has_every_request_in_printable_ascii(gate: Gate) -> None:
    gate.push(DATA)
    targets = ["/v2/" + "'\"\\~", "/v2/" + "a" * 1500]
    for target in targets:
        speak(gate.path, gate.head("GET", target))
    speak(gate.path, gate.head("X" * 2000, "/v2/"))
    gate.session.close()
    text = (gate.home / "ledger.jsonl").read_bytes()
    assert re.fullmatch(rb"[\x20-\x7e\n]*", text)
    entries = [json.loads(line) for line in text.splitlines()]
    assert [entry.get("status") for entry in entries] == [201, 404, 404, 404, None]
    assert entries[0]["sent_bytes"] == len(DATA)
    assert all(len(line) < 2000 for line in text.splitlines())


def test_a_request_that_cannot_be_written_down_is_not_answered(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise LimitExceeded("full")

    monkeypatch.setattr(ledger.Ledger, "record", full)
    assert gate.ask("GET", f"{BASE}/manifests/1").status == 500
    assert isinstance(gate.session.failure, (LimitExceeded, ImageNotFound))


def test_what_a_session_notes_is_bounded(gate: Gate) -> None:
    for _ in range(150):
        gate.session._note(InternalError("x"))
    assert len(gate.session._failures) == 100


COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")


@given(st.sets(st.one_of(st.text(alphabet="aA1.-_:[]", max_size=8), st.text(max_size=8))))
def test_every_host_has_a_name_of_its_own_that_is_a_part_of_a_repository(hosts: set[str]) -> None:
    aliases = _aliases(hosts | {"staged", "localhost:5000", "docker.io"})
    assert len(set(aliases.values())) == len(aliases)
    assert all(COMPONENT.fullmatch(alias) for alias in aliases.values())
    assert "staged" not in aliases.values()
    assert aliases["docker.io"] == "docker.io"

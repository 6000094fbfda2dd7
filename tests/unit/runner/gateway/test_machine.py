"""The registry protocol against a simple model of it, and its socket against broken bytes.

The model is what the specification says in a few lines: repositories of blobs, manifests and tags,
and uploads that grow. Whatever order requests come in, endpoint and model agree.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from policies.reference import Digest
from runner.gateway import alone
from runner.gateway.http import Bounds, Server
from runner.gateway.listen import tcp
from runner.registry.image import OCI_CONFIG, OCI_MANIFEST
from runner.settings import Settings
from tests.support.doors import Client
from tests.support.gateway import Answer, Gate, Gates, speak, statuses

NAMES = ("team/one", "team/two")
names = st.sampled_from(NAMES)
tags = st.sampled_from(["a", "b", "C"])
contents = st.binary(max_size=6)
kinds = st.sampled_from(["sha256", "sha512"])


def digest_of(kind: str, data: bytes) -> Digest:
    return Digest(f"{kind}:{hashlib.new(kind, data).hexdigest()}")


class Protocol(RuleBasedStateMachine):
    """One registry, and what it ought to hold."""

    uploads = Bundle("uploads")
    digests = Bundle("digests")

    @initialize()
    def begin(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.errors: list[Exception] = []
        self.registry = alone.Registry(self.directory, NAMES, Settings())
        listener = tcp("127.0.0.1", 0)
        self.server = Server(
            listener, self.registry.answer, peer_uid=None, failed=self.errors.append
        )
        self.client = Client(listener.getsockname())
        self.blobs: dict[str, dict[Digest, bytes]] = {name: {} for name in NAMES}
        self.manifests: dict[str, dict[Digest, bytes]] = {name: {} for name in NAMES}
        self.tags: dict[str, dict[str, Digest]] = {name: {} for name in NAMES}
        self.growing: dict[str, bytes | None] = {}

    def teardown(self) -> None:
        if hasattr(self, "server"):
            self.server.close()
            self.registry.close()
            shutil.rmtree(self.directory)

    def ask(self, method: str, target: str, body: bytes | None = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.ask(method, target, body, named)

    # -- uploads -------------------------------------------------------------------------------

    @rule(target=uploads, name=names)
    def start(self, name: str) -> str:
        answer = self.ask("POST", f"/v2/{name}/blobs/uploads/")
        assert answer.status == 202
        self.growing[answer.headers["Location"]] = b""
        return answer.headers["Location"]

    @rule(upload=uploads, data=contents)
    def stream(self, upload: str, data: bytes) -> None:
        before = self.growing[upload]
        answer = self.ask("PATCH", upload, data)
        assert answer.status == (404 if before is None else 202)
        if before is not None:
            self.growing[upload] = before + data

    @rule(upload=uploads, data=contents, first=st.integers(0, 12), extra=st.integers(-2, 2))
    def chunk(self, upload: str, data: bytes, first: int, extra: int) -> None:
        """In its place or not, as long as it says or not."""
        before = self.growing[upload]
        last = first + len(data) - 1 + extra
        answer = self.ask("PATCH", upload, data, Content_Range=f"{first}-{last}")
        if before is None:
            expected = 404
        elif first != len(before) or last < first:
            expected = 416
        else:
            expected = 400 if extra else 202
        assert answer.status == expected
        if expected == 202 and before is not None:
            self.growing[upload] = before + data

    @rule(upload=uploads)
    def status(self, upload: str) -> None:
        before = self.growing[upload]
        answer = self.ask("GET", upload)
        assert answer.status == (404 if before is None else 204)
        if before:
            assert answer.headers["Range"] == f"0-{len(before) - 1}"

    @rule(target=digests, upload=consumes(uploads), rest=contents, kind=kinds, lie=st.booleans())
    def finish(self, upload: str, rest: bytes, kind: str, lie: bool) -> Digest:
        before = self.growing[upload]
        data = (before or b"") + rest
        digest = digest_of(kind, data + b"!" * lie)
        answer = self.ask("PUT", f"{upload}?digest={digest}", rest)
        assert answer.status == (404 if before is None else 400 if lie else 201)
        if answer.status == 201:
            self.blobs[upload.split("/blobs", maxsplit=1)[0].removeprefix("/v2/")][digest] = data
        self.growing[upload] = None
        return digest

    @rule(upload=uploads)
    def cancel(self, upload: str) -> None:
        answer = self.ask("DELETE", upload)
        assert answer.status == (404 if self.growing[upload] is None else 204)
        self.growing[upload] = None

    @rule(target=digests, name=names, data=contents, kind=kinds)
    def push_at_once(self, name: str, data: bytes, kind: str) -> Digest:
        digest = digest_of(kind, data)
        assert self.ask("POST", f"/v2/{name}/blobs/uploads/?digest={digest}", data).status == 201
        self.blobs[name][digest] = data
        return digest

    @rule(name=names, other=names, digest=digests)
    def mount(self, name: str, other: str, digest: Digest) -> None:
        answer = self.ask("POST", f"/v2/{name}/blobs/uploads/?mount={digest}&from={other}")
        held = {**self.blobs[other], **self.manifests[other]}
        assert answer.status == (201 if digest in held else 202)
        if digest in held:
            self.blobs[name][digest] = held[digest]
        else:
            self.ask("DELETE", answer.headers["Location"])

    # -- manifests -----------------------------------------------------------------------------

    @rule(target=digests, name=names, layer=digests, tag=tags)
    def put_manifest(self, name: str, layer: Digest, tag: str) -> object:
        described = {"mediaType": OCI_CONFIG, "digest": layer, "size": 1}
        document = {"schemaVersion": 2, "config": described, "layers": []}
        data = json.dumps(document).encode()
        answer = self.ask("PUT", f"/v2/{name}/manifests/{tag}", data, Content_Type=OCI_MANIFEST)
        is_there = layer in self.blobs[name] or layer in self.manifests[name]
        assert answer.status == (201 if is_there else 404)
        if not is_there:
            return multiple()
        digest = Digest.of(data)
        self.manifests[name][digest] = data
        self.tags[name][tag] = digest
        return digest

    @rule(name=names, tag=tags)
    def remove_tag(self, name: str, tag: str) -> None:
        expected = 202 if self.tags[name].pop(tag, None) else 404
        assert self.ask("DELETE", f"/v2/{name}/manifests/{tag}").status == expected

    @rule(name=names, digest=digests)
    def remove_manifest(self, name: str, digest: Digest) -> None:
        expected = 202 if self.manifests[name].pop(digest, None) is not None else 404
        assert self.ask("DELETE", f"/v2/{name}/manifests/{digest}").status == expected
        if expected == 202:
            self.blobs[name].pop(digest, None)
        self.tags[name] = {tag: one for tag, one in self.tags[name].items() if one != digest}

    @rule(name=names, digest=digests)
    def remove_blob(self, name: str, digest: Digest) -> None:
        is_blob = digest in self.blobs[name] and digest not in self.manifests[name]
        expected = 202 if is_blob else 404
        assert self.ask("DELETE", f"/v2/{name}/blobs/{digest}").status == expected
        if is_blob:
            del self.blobs[name][digest]

    # -- what everybody sees -------------------------------------------------------------------

    @rule(name=names, digest=digests, span=st.tuples(st.integers(0, 7), st.integers(0, 7)))
    def read(self, name: str, digest: Digest, span: tuple[int, int]) -> None:
        data = {**self.blobs[name], **self.manifests[name]}.get(digest)
        target, first, last = f"/v2/{name}/blobs/{digest}", *span
        answer = self.ask("GET", target)
        assert (answer.status, answer.body if data is not None else b"") == (
            (404, b"") if data is None else (200, data)
        )
        assert self.ask("HEAD", target).status == answer.status
        part = self.ask("GET", target, Range=f"bytes={first}-{last}")
        if data is None:
            assert part.status == 404
        elif first <= last and first < len(data):
            assert (part.status, part.body) == (206, data[first : last + 1])
        else:
            assert part.status == 416

    @rule(name=names)
    def listing(self, name: str) -> None:
        listed = json.loads(self.ask("GET", f"/v2/{name}/tags/list").body)
        assert listed == {"name": name, "tags": sorted(self.tags[name])}
        for tag, digest in self.tags[name].items():
            answer = self.ask("GET", f"/v2/{name}/manifests/{tag}")
            assert (answer.body, answer.headers["Docker-Content-Digest"]) == (
                self.manifests[name][digest],
                digest,
            )

    @invariant()
    def nothing_broke(self) -> None:
        assert getattr(self, "errors", []) == []


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(
    max_examples=settings.default.max_examples // 4,  # type: ignore[union-attr] # there is one
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# -- broken bytes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> object:
    with Gates(tmp_path_factory.mktemp("gates")) as gates:
        gate = gates.open()
        quick = Bounds(head_seconds=0.2, body_seconds=0.2, idle_seconds=0.2)
        gate.session._server._bounds = quick
        yield gate


def sound(gate: Gate) -> list[bytes]:
    """Requests that would each be answered well."""
    data = b"some bytes"
    digest = Digest.of(data)
    uploads = "/v2/staged/image/blobs/uploads/"
    return [
        gate.head("GET", "/v2/"),
        gate.head("POST", f"{uploads}?digest={digest}", "Content-Length: 10") + data,
        gate.head("POST", uploads, "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n",
        gate.head("GET", f"/v2/staged/image/blobs/{digest}", "Range: bytes=1-2"),
        gate.head("PUT", "/v2/staged/image/manifests/x", "Content-Length: 2") + b"{}",
    ]


edits = st.lists(
    st.tuples(
        st.integers(0, 400),
        st.sampled_from(["replace", "insert", "remove", "repeat", "swap"]),
        st.binary(min_size=1, max_size=4)
        | st.sampled_from([b"\r\n", b"\n", b"\0", b"%2e", b"\x7f", b" ", b":", b"\r\n\r\n"]),
    ),
    min_size=1,
    max_size=6,
)


def mutated(data: bytes, changes: list[tuple[int, str, bytes]]) -> bytes:
    for where, how, what in changes:
        place = where % (len(data) + 1)
        before, after = data[:place], data[place:]
        match how:
            case "replace":
                data = before + what + after[len(what) :]
            case "insert":
                data = before + what + after
            case "remove":
                data = before + after[len(what) :]
            case "repeat":
                data = before + after[:40] + after
            case _:
                data = after + before
    return data


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(which=st.lists(st.integers(0, 4), min_size=1, max_size=3), changes=edits)
def test_broken_bytes_break_nothing(
    gate: Gate, which: list[int], changes: list[tuple[int, str, bytes]]
) -> None:
    requests = sound(gate)
    data = mutated(b"".join(requests[number] for number in which), changes)
    answers = speak(gate.path, data)
    assert not {500, 502, 503} & set(statuses(answers))
    failure = gate.session.failure
    assert failure is None or failure.code != "internal", failure
    assert gate.ask("GET", "/v2/").status == 200


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=400))
def test_bytes_that_were_never_http_break_nothing(gate: Gate, data: bytes) -> None:
    answers = speak(gate.path, data)
    assert answers == b"" or answers.startswith((b"HTTP/1.1 4", b"HTTP/1.1 50"))
    assert gate.ask("GET", "/v2/").status == 200


def test_the_hostile_reader_sees_no_secret_in_any_refusal(gate: Gate) -> None:
    for request in sound(gate):
        answers = speak(gate.path, request.replace(gate.login.encode(), b"Basic x"))
        assert gate.session.token.encode() not in answers
        assert str(gate.home).encode() not in answers

"""A gateway session on a Unix socket, peers that speak to it, and a registry behind it."""

import base64
import contextlib
import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from policies.document import Terms
from policies.grants import CLOSED, grant
from policies.model import Decision, Isolation, Trust
from policies.reference import Digest, ImageReference
from runner.errors import ImageNotFound, RunnerError
from runner.gateway.listen import UnixDoor
from runner.gateway.session import Session
from runner.registry.auth import Anonymous, Credentials
from runner.registry.image import OCI_MANIFEST, Descriptor
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from tests.support.images import MemoryBlobs, make_image

SOCKET = "gateway.sock"
PUSH = "/v2/staged/image"


def decision(**fields: Any) -> Decision:
    """Base images from ``r.example`` anonymously, and nothing else; ``fields`` of its grant."""
    granted = grant(Terms(base_images=("r.example/**",)).over(CLOSED), None)
    return Decision(
        isolation=Isolation.GVISOR,
        wanted=Isolation.GVISOR,
        trust=Trust.UNTRUSTED,
        tenant=None,
        backend="local",
        builder="buildah",
        builder_digest=None,
        grant=replace(granted, **fields),
        policies=(),
        trace=(),
    )


@dataclass
class FakeRegistry:
    """What ``Upstream`` needs of a ``RegistryClient``: images by name, bytes by digest."""

    images: dict[ImageReference, tuple[Descriptor, bytes]] = field(default_factory=dict)
    blobs: dict[Digest, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    error: RunnerError | None = None

    def add(self, text: str, media_type: str, data: bytes) -> Digest:
        """An image, by its tag and by its digest."""
        reference = ImageReference.parse(text)
        found = Descriptor(media_type, Digest.of(data), len(data)), data
        self.images[reference] = self.images[reference.at(found[0].digest)] = found
        return found[0].digest

    def add_image(self, text: str, **parts: Any) -> dict[str, Any]:
        """A small sound image; its manifest."""
        blobs = MemoryBlobs()
        image = make_image(blobs=blobs, **parts)
        self.blobs.update(blobs.blobs)
        data = blobs.blobs[image.root.digest]
        self.add(text, image.root.media_type, data)
        manifest: dict[str, Any] = json.loads(data)
        return manifest

    def manifest(self, reference: ImageReference) -> tuple[Descriptor, bytes]:
        self.asked.append(str(reference))
        if self.error is not None:
            raise self.error
        if reference not in self.images:
            raise ImageNotFound(f"no {reference}")
        return self.images[reference]

    @contextmanager
    def read_blob(
        self, reference: ImageReference, digest: Digest, size: int | None
    ) -> Iterator[Iterator[bytes]]:
        self.asked.append(f"{reference.name}@{digest}")
        if digest not in self.blobs:
            raise ImageNotFound(f"no {digest}")
        yield iter([self.blobs[digest]])

    def close(self) -> None:
        """Nothing is held open."""


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float = 10) -> None:
        super().__init__("gateway", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = connect(self._path, self.timeout or 10)


def connect(path: Path, timeout: float = 10) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(timeout)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:  # a Unix address is short, a path of pytest's is not
        peer.connect(f"/proc/self/fd/{directory}/{path.name}")
    except OSError:
        peer.close()
        raise
    finally:
        os.close(directory)
    return peer


def speak(path: Path, data: bytes, *, end: bool = True, timeout: float = 10) -> bytes:
    """Sends raw bytes and returns everything until the server ends the connection."""
    received = b""
    with connect(path, timeout) as peer:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            peer.sendall(data)
            if end:
                peer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while piece := peer.recv(65536):
                received += piece
    return received


def statuses(answers: bytes) -> list[int]:
    """The status of every answer in a raw stream whose bodies hold no status lines."""
    parts = answers.split(b"HTTP/1.1 ")[1:]
    return [int(part[:3]) for part in parts]


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """Of the specification's error."""
        return str(json.loads(self.body)["errors"][0]["code"])


@dataclass
class Gate:
    """A session, and a builder that may use it."""

    session: Session
    path: Path
    anonymous: FakeRegistry
    as_user: FakeRegistry
    home: Path

    @property
    def staged(self) -> Path:
        return self.home / "staged"

    @property
    def login(self) -> str:
        return "Basic " + base64.b64encode(f"session:{self.session.token}".encode()).decode()

    def ask(
        self,
        method: str,
        target: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request on a connection of its own."""
        connection = UnixConnection(self.path)
        try:
            sent = {"Authorization": self.login, **(headers or {})}
            chunked = body is not None and not isinstance(body, bytes)
            connection.request(method, target, body, sent, encode_chunked=chunked)
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    def head(self, method: str, target: str, *lines: str) -> bytes:
        """A raw head with the right login."""
        fixed = (f"{method} {target} HTTP/1.1", "Host: gateway", f"Authorization: {self.login}")
        return "\r\n".join((*fixed, *lines, "", "")).encode()

    def start(self) -> str:
        """An upload under way; its location."""
        answer = self.ask("POST", f"{PUSH}/blobs/uploads/")
        assert answer.status == 202
        return answer.headers["Location"]

    def push(self, data: bytes) -> Digest:
        digest = Digest.of(data)
        answer = self.ask("POST", f"{PUSH}/blobs/uploads/?digest={digest}", data)
        assert answer.status == 201, answer
        return digest

    def put_manifest(self, name: str, data: bytes, media_type: str = OCI_MANIFEST) -> Answer:
        return self.ask("PUT", f"{PUSH}/manifests/{name}", data, {"Content-Type": media_type})

    def push_image(self, tag: str, **parts: Any) -> Digest:
        """A small sound image, all of it."""
        blobs = MemoryBlobs()
        root = make_image(blobs=blobs, **parts).root
        for digest, data in blobs.blobs.items():
            if digest != root.digest:
                self.push(data)
        assert self.put_manifest(tag, blobs.blobs[root.digest]).status == 201
        return root.digest

    def files(self) -> list[str]:
        """What is staged, by its path."""
        found = (path for path in self.staged.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.staged)) for path in found)


@dataclass
class Gates:
    """Makes sessions that share one cache, as those of two tenants do."""

    directory: Path
    sessions: list[Session] = field(default_factory=list)

    def open(
        self,
        *,
        fake: bool = True,
        settings: Settings | None = None,
        credentials: Credentials | None = None,
        hosts: tuple[str, ...] = ("r.example",),
        peer_uid: int | None = None,
        fetching: Callable[..., None] = lambda *_: None,
        **fields: Any,
    ) -> Gate:
        """A session with a decision of ``fields``; ``fake`` puts FakeRegistry behind it."""
        home = self.directory / str(len(self.sessions))
        (home / "door").mkdir(parents=True)
        session = Session(
            UnixDoor(home / "door", SOCKET, os.geteuid() if peer_uid is None else peer_uid),
            decision(**fields),
            settings=settings or Settings(),
            credentials=credentials or Anonymous(),
            cache=BlobStore(self.directory / "cache"),
            staged=home / "staged",
            ledger=home / "ledger.jsonl",
            upstream_hosts=hosts,
            fetching=fetching,
        )
        self.sessions.append(session)
        gate = Gate(session, home / "door" / SOCKET, FakeRegistry(), FakeRegistry(), home)
        if fake:
            session.upstream.close()
            session.upstream._closed = False
            session.upstream._anonymous = gate.anonymous  # type: ignore[assignment] # has what is used
            session.upstream._as_user = gate.as_user  # type: ignore[assignment] # has what is used
        return gate

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for session in self.sessions:
            session.close()

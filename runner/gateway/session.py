"""One build's session with the gateway: a socket, a token, a reachable set, and an end."""

import base64
import hmac
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

from policies.model import Decision
from policies.reference import Digest, ImageReference
from runner.errors import InternalError, RunnerError
from runner.gateway.http import BodyBroken, Request, Response, Server
from runner.gateway.ledger import Entry, Ledger
from runner.gateway.reachable import ReachableBlobs, ReachableSet
from runner.gateway.registry import REPOSITORY, RegistryEndpoint
from runner.gateway.staging import Staging
from runner.gateway.upstream import Upstream
from runner.registry.auth import Credentials
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from runner.verify import StagedImage


@dataclass(frozen=True, slots=True)
class Door:
    """Where a session listens: a Unix socket in a directory that the sandbox mounts."""

    directory: Path
    socket_name: str
    peer_uid: int

    def listen(self) -> socket.socket:
        """A listening socket that only the sandbox's uid can connect to.

        Bound through a descriptor of the directory: a Unix address holds 108 bytes, and the
        path of a state directory may be longer.
        """
        directory = os.open(self.directory, os.O_PATH | os.O_DIRECTORY)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(f"/proc/self/fd/{directory}/{self.socket_name}")
            path = self.directory / self.socket_name
            if os.geteuid() != self.peer_uid:
                os.chown(path, self.peer_uid, self.peer_uid)
            path.chmod(0o600)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
        finally:
            os.close(directory)
        return listener


class Session:
    """The only thing that a sandbox can reach, from its start until it is sealed."""

    def __init__(
        self,
        door: Door,
        decision: Decision,
        *,
        settings: Settings,
        credentials: Credentials,
        cache: BlobStore,
        staged: Path,
        ledger: Path,
        upstream_hosts: Iterable[str],
        fetching: Callable[[ImageReference, Digest, int, int], None],
        local_images: Mapping[ImageReference, Path] = MappingProxyType({}),
    ) -> None:
        self.token = secrets.token_urlsafe(32)
        self.aliases = _aliases(upstream_hosts)
        self.reachable = ReachableSet(decision)
        self.upstream = Upstream(
            settings,
            credentials,
            self.reachable,
            cache,
            fetching=fetching,
            local_images=local_images,
        )
        self._staging = Staging(BlobStore(staged), self.reachable, decision.limits)
        self._ledger = Ledger(ledger)
        self._failures: list[RunnerError] = []
        self._lock = threading.Lock()
        self._endpoint = RegistryEndpoint(
            {alias: host for host, alias in self.aliases.items()},
            self.upstream,
            self._staging,
            settings.http,
            self._note,
        )
        self._expected = b"Basic " + base64.b64encode(b"session:" + self.token.encode())
        self._server = Server(
            door.listen(),
            self._handle,
            peer_uid=door.peer_uid,
            failed=self._failed,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def failure(self) -> RunnerError | None:
        """The first thing that the session was refused, which a failed build may be due to."""
        with self._lock:
            return self._failures[0] if self._failures else None

    def decide(self, decision: Decision) -> None:
        """Puts the final decision in place of the one that base images were resolved under."""
        self.reachable.decide(decision)
        self._staging.limits = decision.limits

    def seal(self) -> StagedImage:
        """Ends every connection; what is staged now is what there is.

        Raises:
            NothingStaged: No image was pushed.
        """
        self.close()
        blobs = ReachableBlobs(self.reachable, self._staging.store, self.upstream)
        return StagedImage(self._staging.root, blobs)

    def close(self) -> None:
        """Ends the session. May be called twice."""
        self.upstream.close()
        self._server.close()
        self._staging.seal()
        self._ledger.close()

    def _failed(self, error: Exception) -> None:
        ours = error if isinstance(error, RunnerError) else InternalError(f"gateway: {error!r}")
        self._note(ours)

    def _note(self, error: RunnerError) -> None:
        with self._lock:
            if len(self._failures) < _MOST_FAILURES:
                self._failures.append(error)

    def _handle(self, request: Request) -> Response:
        counted = _Counted(request)
        try:
            response = self._authorised(counted.request)
        except BodyBroken:
            self._record(request, counted, 400, 0)
            raise
        is_file = not isinstance(response.content, bytes)
        sent = (response.length or 0) if is_file else len(response.content)  # type: ignore[arg-type] # bytes where no file
        try:
            self._record(request, counted, response.status, 0 if request.method == "HEAD" else sent)
        except BaseException:
            response.close()
            raise
        return response

    def _authorised(self, request: Request) -> Response:
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, self._expected):
            body = b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}'
            headers = {
                "WWW-Authenticate": 'Basic realm="runner"',
                "Content-Type": "application/json",
            }
            return Response(401, headers, body)
        return self._endpoint.answer(request)

    def _record(self, request: Request, counted: "_Counted", status: int, sent: int) -> None:
        self._ledger.record(
            Entry(
                method=request.method[:16],
                target=ascii(request.target[:512])[1:-1],
                status=status,
                bytes_in=counted.bytes,
                bytes_out=sent,
            )
        )


_MOST_FAILURES = 100


class _Counted:
    """A request whose body is counted while it is read."""

    def __init__(self, request: Request) -> None:
        self.bytes = 0
        self._body = request.body
        self.request = Request(
            request.method, request.target, request.headers, iter(self._pieces())
        )

    def _pieces(self) -> Iterable[bytes]:
        for piece in self._body:
            self.bytes += len(piece)
            yield piece


def _aliases(hosts: Iterable[str]) -> dict[str, str]:
    """Host to the path component that stands for it: a colon may not be part of a repository."""
    aliases: dict[str, str] = {}
    taken = {REPOSITORY.partition("/")[0]}
    for host in sorted(set(hosts)):
        alias = re.sub(r"[^a-z0-9]+", _joint, host.lower()).strip("._-") or "host"
        while alias in taken:
            alias += "_x"
        taken.add(alias)
        aliases[host] = alias
    return aliases


def _joint(run: re.Match[str]) -> str:
    return run[0] if run[0] in {".", "-"} else "_"

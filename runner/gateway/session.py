"""One build's session with the gateway: a socket, a token, a reachable set, and an end."""

import base64
import hmac
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Self

from policies.model import Decision, Grant, Network
from policies.reference import Digest, ImageReference
from runner.errors import InternalError, RunnerError
from runner.gateway import presets
from runner.gateway.egress import Egress
from runner.gateway.forward import EgressBounds
from runner.gateway.http import BodyBroken, Request, Response, login_of
from runner.gateway.ledger import Entry, Ledger
from runner.gateway.listen import Door
from runner.gateway.reachable import ReachableBlobs, ReachableSet
from runner.gateway.registry import REPOSITORY, RegistryEndpoint
from runner.gateway.staging import Staging
from runner.gateway.upstream import Upstream
from runner.registry.auth import Credentials
from runner.registry.layout import LayoutClient, LayoutDirectory
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from runner.verify import StagedImage


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
        self._expected = b"Basic " + base64.b64encode(f"{_USER}:{self.token}".encode())
        self._bearer = b"Bearer " + self.token.encode()
        self._settings = settings
        self.aliases = _aliases(upstream_hosts)
        self.reachable = ReachableSet(decision)
        self._network = decision.network
        self.upstream = Upstream(
            settings,
            credentials,
            self.reachable,
            cache,
            fetching=fetching,
            local_images={
                image: LayoutClient(LayoutDirectory(path)) for image, path in local_images.items()
            },
        )
        self._staging = Staging(BlobStore(staged), self.reachable, decision.limits)
        self._ledger = Ledger(ledger)
        self._failures: list[RunnerError] = []
        self._lock = threading.Lock()
        self._hosts = {alias: host for host, alias in self.aliases.items()}
        self._endpoint = RegistryEndpoint(
            {REPOSITORY: self._staging},
            self._hosts,
            self.upstream,
            limits=settings.http,
            failed=self._note,
        )
        self._egress = Egress(
            self._expanded(decision),
            login=self._expected,
            record=self._ledger.record,
            reserve=self._ledger.reserve,
            note=self._note,
            bounds=EgressBounds(connect_seconds=settings.http.connect_seconds),
        )
        self._server = door.open(self._handle, self._failed)

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
        self._egress.decide(self._expanded(decision))
        self._network = decision.network

    def _expanded(self, decision: Decision) -> Grant:
        """What is granted, with the hosts that presets stand for on this host."""
        if decision.network is not Network.EGRESS:
            return decision.grant
        egress = presets.expand(decision.grant.egress, self._settings)
        return replace(decision.grant, egress=egress)

    @property
    def unknown_presets(self) -> tuple[str, ...]:
        """Those of the decision that stand for no host here."""
        has_egress = self._network is Network.EGRESS
        return presets.unknown(self._egress.grant.egress) if has_egress else ()

    def proxy(self, door: str) -> str | None:
        """URL of the egress proxy behind ``door``, HOST:PORT inside; None where there is none."""
        has_egress = self._network is Network.EGRESS
        return f"http://{_USER}:{self.token}@{door}" if has_egress else None

    def seal(self) -> StagedImage:
        """Ends every connection; what is staged now is what there is.

        Raises:
            NothingStaged: No image was pushed.
        """
        self.close()
        blobs = ReachableBlobs(self.reachable, self._staging.store, self.upstream)
        return StagedImage(self._staging.root, blobs)

    @property
    def ledger_head(self) -> Digest:
        """What the ledger ends with; the last word only once the session is closed."""
        return self._ledger.head

    def close(self) -> None:
        """Ends the session, all of it, whatever a part of it raises. May be called twice."""
        with ExitStack() as last_first:
            last_first.callback(self._ledger.close)
            last_first.callback(self._staging.seal)
            last_first.callback(self._server.close)
            last_first.callback(self._egress.close)
            last_first.callback(self.upstream.close)

    def _failed(self, error: Exception) -> None:
        ours = error if isinstance(error, RunnerError) else InternalError(f"gateway: {error!r}")
        self._note(ours)

    def _note(self, error: RunnerError) -> None:
        with self._lock:
            if len(self._failures) < _MOST_FAILURES:
                self._failures.append(error)

    def _handle(self, request: Request) -> Response:
        if request.method == "CONNECT" or not request.target.startswith("/"):
            return self._egress.answer(request)
        counted = _Counted(request)
        try:
            response = self._authorised(counted.request)
        except BodyBroken:
            self._record(request, counted, Response(400))
            raise
        try:
            self._record(request, counted, response)
        except BaseException:
            response.close()
            raise
        return response

    def _authorised(self, request: Request) -> Response:
        given = login_of(request.headers.get("authorization", ""))
        if not any(hmac.compare_digest(given, login) for login in (self._expected, self._bearer)):
            body = b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}'
            headers = {
                "WWW-Authenticate": 'Basic realm="runner"',
                "Content-Type": "application/json",
            }
            return Response(401, headers, body)
        return self._endpoint.answer(request)

    def _record(self, request: Request, counted: "_Counted", response: Response) -> None:
        authority, path, rule = self._addressed(request.target)
        host, port = _split(authority)
        content = response.content
        small = content if isinstance(content, bytes) else b""
        size = len(content) if isinstance(content, bytes) else response.length or 0
        unnamed = response.status == _NOT_FOUND and _UNNAMED in small
        digest = response.headers.get("Docker-Content-Digest")
        self._ledger.record(
            Entry(
                kind="registry",
                host=host,
                port=port,
                method=request.method,
                path=path,
                decision="denied" if unnamed or response.status in _DENIED else "allowed",
                rule=_RULES.get(response.status, rule),
                status=response.status,
                sent_bytes=counted.bytes,
                received_bytes=0 if request.method == "HEAD" else size,
                digest=Digest(digest) if digest is not None else None,
            )
        )

    def _addressed(self, target: str) -> tuple[str, str, str]:
        """Registry and path that are meant, as the registry has them, and the rule that decides."""
        alias, _, rest = target.removeprefix("/v2/").partition("/")
        if target.startswith(f"/v2/{REPOSITORY}/"):
            return "", target, "staged"
        if (host := self._hosts.get(alias)) is not None:
            return host, f"/v2/{rest}", "base_images"
        return "", target, ""


_USER = "session"
_DENIED = frozenset({401, 403, 413})
_NOT_FOUND = 404
_UNNAMED = b'"code": "NAME_UNKNOWN"'
"""What the endpoint says of all that is outside the reachable set, in its 404."""
_RULES = {401: "token", 413: "limits"}
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


def _split(authority: str) -> tuple[str, int]:
    host, _, port = authority.rpartition(":")
    return (host, int(port)) if port.isdigit() else (authority, 0)


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

"""Many sessions in one process: opened, sealed and closed over a Unix socket by those who build.

Lines of JSON, one request and one answer each, in turn::

    {"do": "open", "decision": {...}, "hosts": ["docker.io"], "directory": "/..."}
    {"ok": {"session": "ID", "token": "...", "address": "HOST:PORT", "ca": "PEM or nothing",
            "aliases": {"docker.io": "docker.io"}}}
    {"do": "seal", "session": "ID"}
    {"ok": {"root": {"mediaType": "...", "digest": "...", "size": 1}, "ledger": "DIGEST",
            "resolved": {"IMAGE": "DIGEST"}}}
    {"do": "close", "session": "ID"}
    {"ok": {}}
    {"error": {"code": "...", "message": "..."}}

The decision is what ``decision.json`` of a build holds under that name; ``staged/`` and
``ledger.jsonl`` go into the directory, which is the build's. Sessions belong to the connection that
opened them: when that ends, however it does, they are closed.
"""

import contextlib
import json
import os
import resource
import secrets
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from io import BufferedRWPair
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from policies.model import Cache, Decision, Isolation, Network, Trust, canonical_json
from runner.errors import InternalError, RunnerError, UsageError
from runner.gateway.accept import Acceptor
from runner.gateway.listen import Door, UnixDoor
from runner.gateway.session import Session
from runner.registry import strictjson
from runner.registry.auth import Credentials
from runner.registry.image import Descriptor
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from sandbox.locks import Lock

LINE_BYTES = 1 << 20
"""Of one request; decisions with long traces have some ten thousand."""
SESSIONS = 1024
CONTROLLERS = 256
"""Connections of those who open sessions, at a time."""
DESCRIPTORS = 448
"""What one session may need: 64 connections, each with a way out and two pipes between, and 64
uploads."""
_CLOSE_SECONDS = 3600.0
"""Each session may take some, and its ledger gets its last line."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Open(_Message):
    do: Literal["open"]
    decision: dict[str, Any]
    hosts: list[str] = Field(max_length=256)
    directory: str = Field(pattern=r"^/")


class _Named(_Message):
    do: Literal["seal", "close"]
    session: str


_REQUEST: TypeAdapter[_Open | _Named] = TypeAdapter(_Open | _Named)


def _refused(message: str) -> UsageError:
    return UsageError(message, advice="docs/gateway.md describes the control socket.")


# -- decisions, read back ------------------------------------------------------------------------

_ENUMS: Mapping[str, type[IntEnum]] = {
    "isolation": Isolation,
    "wanted": Isolation,
    "fallback": Isolation,
    "trust": Trust,
    "network": Network,
    "cache": Cache,
}
_DECISION = TypeAdapter(Decision)


def read_decision(document: dict[str, Any]) -> Decision:
    """The decision that ``policies.model.plain`` wrote. Raises UsageError for anything else."""
    try:
        decision = _DECISION.validate_python(_named(document))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _refused(f"no decision: {where}: {first['msg']}") from None
    if canonical_json(decision) != canonical_json(document):  # more in it, or of another type
        raise _refused("a decision that says more than was understood")
    return decision


def _named(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The same with members in the place of their names."""
    if isinstance(value, dict):
        return {key: _member(key, _named(item)) for key, item in value.items()}
    return value


def _member(key: str, value: Any) -> Any:  # noqa: ANN401 - any JSON value
    members = {str(member): member for member in _ENUMS.get(key, ())}
    return members.get(value, value) if isinstance(value, str) else value


# -- sessions ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hall:
    """What all sessions of a service share."""

    door: Door
    address: str
    ca: str
    """PEM of what clients have to trust; empty where they do already."""
    settings: Settings
    credentials: Credentials
    cache: BlobStore


@dataclass(slots=True)
class Controller:
    """One connection on the control socket, and the sessions that it opened."""

    hall: Hall
    places: threading.Semaphore
    """One for each session that there may be."""
    sessions: dict[str, Session] = field(default_factory=dict)

    def answer(self, line: bytes) -> bytes:
        """One line for one line. Raises nothing that a request could cause."""
        try:
            answer: dict[str, Any] = {"ok": self._do(line)}
        except RunnerError as error:
            answer = {"error": {"code": error.code, "message": error.message}}
        except Exception as error:  # noqa: BLE001 - one bug must not end the other sessions
            answer = {"error": {"code": InternalError.code, "message": repr(error)[:1000]}}
        return json.dumps(answer).encode() + b"\n"

    def close(self) -> None:
        """Closes every session that is left; what fails is raised once the others are closed."""
        with contextlib.ExitStack() as stack:
            for name in self.sessions:
                stack.callback(self._close, name)

    def _do(self, line: bytes) -> dict[str, Any]:
        strictjson.parse(line, most_bytes=LINE_BYTES)
        try:
            request = _REQUEST.validate_json(line)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise _refused(f"{where}: {first['msg']}") from None
        if isinstance(request, _Open):
            return self._open(request)
        if request.session not in self.sessions:
            raise _refused("no such session")
        if request.do == "seal":
            return self._seal(self.sessions[request.session])
        self._close(request.session)
        return {}

    def _open(self, request: _Open) -> dict[str, Any]:
        decision, hall = read_decision(request.decision), self.hall
        directory = Path(request.directory)
        if not directory.is_dir():
            raise _refused("directory is none")
        if not self.places.acquire(blocking=False):
            raise _refused(f"there are {SESSIONS} sessions already")
        try:
            _require_descriptors()
            session = Session(
                hall.door,
                decision,
                settings=hall.settings,
                credentials=hall.credentials,
                cache=hall.cache,
                staged=directory / "staged",
                ledger=directory / "ledger.jsonl",
                upstream_hosts=request.hosts,
                fetching=lambda *_: None,
            )
        except OSError as error:
            self.places.release()
            raise _refused(f"no session can be made there: {error.strerror}") from None
        except BaseException:
            self.places.release()
            raise
        name = secrets.token_hex(16)
        self.sessions[name] = session
        return {
            "session": name,
            "token": session.token,
            "address": hall.address,
            "ca": hall.ca,
            "aliases": session.aliases,
        }

    @staticmethod
    def _seal(session: Session) -> dict[str, Any]:
        image, resolved = session.seal(), session.upstream.resolved()
        return {
            "root": _plain(image.root),
            "resolved": {str(image): digest for image, digest in resolved.items()},
            "ledger": session.ledger_head,
        }

    def _close(self, name: str) -> None:
        session = self.sessions.pop(name)
        with contextlib.ExitStack() as stack:
            stack.callback(self.places.release)
            stack.callback(session.upstream.release)
            session.close()


def take_descriptors() -> None:
    """Lets this process have as many as the system allows it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # the system allows fewer by now
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _require_descriptors() -> None:
    """Raises UsageError where one more session could take those that the others live on."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    left = most - len(list(Path("/proc/self/fd").iterdir()))
    if left < DESCRIPTORS:
        raise _refused(f"{left} file descriptors are left, a session may need {DESCRIPTORS}")


def _plain(root: Descriptor) -> dict[str, object]:
    return {"mediaType": root.media_type, "digest": root.digest, "size": root.size}


class Control:
    """The socket that sessions are opened over; for our own user alone."""

    def __init__(self, path: Path, hall: Hall) -> None:
        """Listens. Raises OSError."""
        self._path = path
        self._hall = hall
        self._places = threading.Semaphore(SESSIONS)
        # Held for as long as we listen: whoever finds it free finds a socket nobody listens on.
        self._lock_file = Lock(path.with_name(f"{path.name}.lock"))
        path.unlink(missing_ok=True)
        uid = os.geteuid()  # the mode of the socket says so too
        listener = UnixDoor(path.parent, path.name, uid).listen()
        self._acceptor = Acceptor(listener, self._serve, peer_uid=uid, connections=CONTROLLERS)

    def close(self) -> None:
        """Ends every session."""
        self._acceptor.close(_CLOSE_SECONDS)
        self._path.unlink(missing_ok=True)
        self._lock_file.release()

    def _serve(self, peer: socket.socket) -> None:
        controller = Controller(self._hall, self._places)
        try:
            with contextlib.closing(controller), peer.makefile("rwb") as lines:
                _converse(lines, controller)
        except (OSError, RunnerError):
            pass  # whoever it was has gone, and hears of nothing any more


def _converse(lines: BufferedRWPair, controller: Controller) -> None:
    while line := lines.readline(LINE_BYTES + 1):
        if not line.endswith(b"\n"):
            return  # too long, or cut off
        lines.write(controller.answer(line))
        lines.flush()

"""What a session asked for: one line of JSON per request, each bound to the line before it.

A line carries the sha256 of the line before, so none can be changed, dropped or put in between
without breaking what follows. The *head*, the digest of the last line, binds them all and stands
in the build's result (``tail -n 1 ledger.jsonl | sha256sum`` gives it). A ledger that was closed
ends with a line that says how many requests it has, and how many more came when it was full. One
that ends earlier is of a session that was killed. Requests of egress reserve their line before they
leave: none gets out unrecorded.

``Ledger`` writes, ``Chain`` reads, and tells a line torn by a kill from tampering::

    chain = Chain()
    for record in chain.records(stream):
        ...
    chain.require(head)
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import TypeAdapter, ValidationError

from policies.reference import Digest
from runner.errors import CheckFailed, QuotaExceeded
from runner.files import disk_full_is_a_limit

MOST_BYTES = 32 << 20
"""A build that asks for more than this is asking to fill the disk; the last line says so."""
REGISTRY_BYTES = 24 << 20
"""From here on only egress is recorded: nobody gets out unseen by first asking for other things."""
LINE_BYTES = 4096
"""No line is longer, whatever was asked."""
FIRST = Digest("sha256:" + "0" * 64)
"""What the first line has before it."""

Kind = Literal["registry", "http", "connect"]
Verdict = Literal["allowed", "denied"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One request. It comes from the sandbox; the ledger makes it short, printable and secretless.

    Attributes:
        kind: Of the endpoint that was asked: the registry, or the egress proxy in either form.
        host: That was meant, without user-info; empty where it is the gateway itself.
        port: 0 where the host has its usual one.
        method: Of HTTP.
        path: Or the target of the request; user-info and query go, but for what the registry's
            own grammar has in its queries. Empty where it begins with no slash.
        decision: What the rules said, whatever came of it.
        rule: That allowed or denied it, in the policy's words; empty where none speaks of it.
        status: Of the answer that the sandbox got.
        sent_bytes: By the sandbox, without heads.
        received_bytes: By the sandbox, without heads.
        digest: Of the body, where the gateway sees one.
    """

    kind: Kind
    host: str
    port: int = 0
    method: str
    path: str = ""
    decision: Verdict
    rule: str = ""
    status: int
    sent_bytes: int = 0
    received_bytes: int = 0
    digest: Digest | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """An entry, and when it was written down, in seconds since 1970."""

    time: float
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The last line of a ledger that was closed."""

    recorded: int
    unrecorded: int
    """Requests that came when the ledger was full for their kind."""


# -- writing -----------------------------------------------------------------------------------


class Ledger:
    """Append-only, bounded; usable by several threads."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Begins a ledger. Raises FileExistsError where ``path`` has one already."""
        self._path = path
        self._clock = clock
        self._file = path.open("xb", buffering=0)
        self._lock = threading.Lock()
        self._head = FIRST
        self._bytes = 0
        self._reserved = 0
        self._recorded = 0
        self._unrecorded = 0

    @property
    def head(self) -> Digest:
        """The digest of the last line that was written."""
        with self._lock:
            return self._head

    def reserve(self) -> None:
        """Keeps room for one request of egress, so that nothing can take it until its ``record``.

        Raises:
            QuotaExceeded: There is none left; the request may not be let out.
        """
        with self._lock:
            if self._bytes + (self._reserved + 1) * LINE_BYTES > MOST_BYTES:
                self._unrecorded += 1
                raise QuotaExceeded("the ledger is full: what egress does cannot be recorded")
            self._reserved += 1

    def record(self, entry: Entry) -> None:
        """Notes one request; after the end, nothing. Raises DiskExceeded."""
        short = bounded(entry)
        fields = {name: getattr(short, name) for name in Entry.__slots__}  # asdict copies all
        is_egress = entry.kind != "registry"
        with self._lock:
            if self._file.closed:
                return
            if is_egress and self._reserved:
                self._reserved -= 1
            line = self._line(fields)
            most = MOST_BYTES - self._reserved * LINE_BYTES
            if not is_egress:
                most = 0 if self._unrecorded else min(most, REGISTRY_BYTES)
            if self._bytes + len(line) > most:
                self._unrecorded += 1
                return
            self._append(line)
            self._recorded += 1

    def close(self) -> None:
        """Writes the last line. May be called twice. Raises DiskExceeded."""
        with self._lock:
            if self._file.closed:
                return
            with self._file:
                end = End(recorded=self._recorded, unrecorded=self._unrecorded)
                self._append(self._line(asdict(end)))

    def _line(self, fields: dict[str, Any]) -> bytes:
        now = round(self._clock(), 3)
        document = {"previous": self._head, "time": now, **fields}
        return _JSON.encode(document).encode() + b"\n"

    def _append(self, line: bytes) -> None:
        """All of ``line``, or nothing: a part of it would look like tampering later."""
        with disk_full_is_a_limit(self._path):
            written = 0
            try:
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                os.ftruncate(self._file.fileno(), self._bytes)
                raise
        self._bytes += len(line)
        self._head = Digest.of(line)


def bounded(entry: Entry) -> Entry:
    """The same with every value short, printable ASCII, and free of what may be secret."""
    return Entry(
        kind=entry.kind,
        host=_plain(entry.host.rpartition("@")[2], 255),
        port=min(max(entry.port, 0), 65535),
        method=_plain(entry.method, 16),
        path=_plain(_without_secrets(entry.kind, entry.path[:_TARGET_CHARACTERS]), 512),
        decision=entry.decision,
        rule=_plain(entry.rule, 255),
        status=entry.status,
        sent_bytes=entry.sent_bytes,
        received_bytes=entry.received_bytes,
        digest=entry.digest,
    )


_JSON = json.JSONEncoder(separators=(",", ":"))
_TARGET_CHARACTERS = 4096
_AUTHORITY = re.compile(r"//+[^/]*")
_PARAMETER = re.compile(
    r"(?:digest|mount)=sha(?:256|512)(?::|%3[Aa])[0-9a-f]{64,128}"
    r"|from=[a-z0-9](?:[a-z0-9._/-]|%2[Ff]){0,254}"
    r"|n=[0-9]{1,9}|last=[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
    r"|artifactType=[A-Za-z0-9](?:[A-Za-z0-9.+/_-]|%2[BFbf]){0,254}"
)


def _plain(text: str, most: int) -> str:
    return ascii(text[:most])[1:-1][:most]


def _without_secrets(kind: Kind, target: str) -> str:
    """The path of ``target``, where it is one, and the registry's query where it is known."""
    if kind == "connect" or not target.startswith("/"):
        return ""
    path, _, query = target.partition("#")[0].partition("?")
    if kind == "http":
        return path
    path = _AUTHORITY.sub("", path)  # no registry has two slashes in a row
    kept = "&".join(filter(_PARAMETER.fullmatch, query.split("&")))
    return f"{path}?{kept}" if kept else path


# -- reading -----------------------------------------------------------------------------------


class Chain:
    """Takes the lines of a ledger one by one, in order; pure.

    Attributes:
        head: The digest of the last whole line.
        recorded: How many requests were read.
        end: What the last line says; None where the session was killed, or still runs.
        torn: Whether a piece of a line follows the last whole one.
    """

    def __init__(self) -> None:
        self.head = FIRST
        self.recorded = 0
        self.end: End | None = None
        self.torn = False

    def records(self, stream: BinaryIO) -> Iterator[Record]:
        """All that the stream has. Raises CheckFailed where a line does not follow."""
        while line := stream.readline(LINE_BYTES + 1):
            record = self.take(line)
            if record is not None:
                yield record

    def take(self, line: bytes) -> Record | None:
        """The next line, with its line end; None for the last one. Raises CheckFailed."""
        number = self.recorded + 1
        if self.end is not None or self.torn:
            raise _broken(f"line {number} stands after the end")
        if not line.endswith(b"\n"):
            if len(line) > LINE_BYTES:
                raise _broken(f"line {number} is longer than {LINE_BYTES} bytes")
            self.torn = True
            return None
        try:
            parsed = _lines().validate_json(line)
        except ValidationError as error:
            what = error.errors()[0]["msg"]
            raise _broken(f"line {number} is none of a ledger: {what}") from None
        if parsed.previous != self.head:
            raise _broken(f"line {number} does not follow the one before it")
        self.head = Digest.of(line)
        if isinstance(parsed, _EndLine):
            self.end = End(recorded=parsed.recorded, unrecorded=parsed.unrecorded)
            if self.end.recorded != self.recorded:
                raise _broken(f"{self.recorded} requests of {self.end.recorded} are left")
            return None
        self.recorded += 1
        fields = {name: getattr(parsed, name) for name in Entry.__slots__}
        return Record(parsed.time, Entry(**fields))

    def require(self, head: Digest) -> None:
        """Raises CheckFailed where the build's result names another head."""
        if self.head != head:
            raise _broken(f"the last line is {self.head}, the build's result says {head}")


def _broken(how: str) -> CheckFailed:
    return CheckFailed(
        f"the ledger was tampered with: {how}",
        advice="Nobody but runner writes it. Treat all that it says as forged.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _RecordLine(Entry):
    previous: Digest
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _EndLine(End):
    previous: Digest
    time: float


@cache
def _lines() -> TypeAdapter[_RecordLine | _EndLine]:
    """Made when something is read: builds only write."""
    return TypeAdapter(_RecordLine | _EndLine)

"""What happens in a build, as values. The terminal, the JSON lines and the log all read these."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from policies.model import Decision, plain
from policies.reference import Digest, ImageReference
from runner.errors import Cancelled
from sandbox.model import Evidence


class Stage(StrEnum):
    """The way through the house, in order."""

    PREPARE = "prepare"
    CONTEXT = "context"
    DECIDE = "decide"
    RESOLVE = "resolve"
    BASES = "bases"
    LAUNCH = "launch"
    BUILD = "build"
    VERIFY = "verify"
    PUBLISH = "publish"


@dataclass(frozen=True, slots=True)
class Started:
    build_id: str
    context: str


@dataclass(frozen=True, slots=True)
class StageStarted:
    stage: Stage


@dataclass(frozen=True, slots=True)
class StageEnded:
    stage: Stage
    seconds: float


@dataclass(frozen=True, slots=True)
class Snapshotted:
    digest: Digest
    bytes: int
    entries: int


@dataclass(frozen=True, slots=True)
class Decided:
    decision: Decision


@dataclass(frozen=True, slots=True)
class Resolved:
    image: ImageReference
    digest: Digest


@dataclass(frozen=True, slots=True)
class Unpacking:
    """Nobody on this host has unpacked the image before."""

    image: ImageReference


@dataclass(frozen=True, slots=True)
class Provided:
    """How a base image comes into the sandbox: ``mounted``, ``copied`` or ``pulled``."""

    image: ImageReference
    how: str


@dataclass(frozen=True, slots=True)
class Observed:
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Output:
    """Raw bytes that the build wrote: hostile, and cut anywhere."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Progress:
    """Something long: ``done`` of ``total`` bytes, or of 0 where nobody knows how many."""

    what: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """The sandbox does not begin yet; ``reason`` is what it waits for, as its cluster says it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Warned:
    message: str


@dataclass(frozen=True, slots=True)
class Verified:
    digest: Digest
    size_bytes: int
    layers: int


@dataclass(frozen=True, slots=True)
class Published:
    destination: ImageReference
    digest: Digest


@dataclass(frozen=True, slots=True)
class Failed:
    code: str
    message: str
    advice: str
    log: str


@dataclass(frozen=True, slots=True)
class Finished:
    digest: Digest
    seconds: float


Event = (
    Started
    | StageStarted
    | StageEnded
    | Snapshotted
    | Decided
    | Resolved
    | Unpacking
    | Provided
    | Observed
    | Output
    | Progress
    | Waiting
    | Warned
    | Verified
    | Published
    | Failed
    | Finished
)
Listener = Callable[[Event], None]


def as_json(event: Event) -> dict[str, Any]:
    """The event as JSON types. Output becomes text, with what is no UTF-8 escaped."""
    if isinstance(event, Output):
        values = {"text": event.data.decode("utf-8", "backslashreplace")}
    else:
        values = plain(event)
    return {"event": type(event).__name__.lower(), **values}


def as_line(event: Event) -> bytes:
    """One line of JSON, in ASCII: nothing in it can move a terminal's cursor."""
    return json.dumps(as_json(event), ensure_ascii=True).encode() + b"\n"


class Broadcast:
    """One stream of events to several listeners, in one order, from any thread.

    Raises Cancelled where a listener's own reader is gone: nobody waits for this build.
    """

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            for listener in self._listeners:
                try:
                    listener(event)
                except BrokenPipeError:
                    raise Cancelled("whoever read the events has gone") from None

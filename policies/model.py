"""What a policy decides: plain immutable values."""

import dataclasses
import json
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from pathlib import PurePath
from typing import Any

from policies.reference import Digest, ImageReference

MIB = 1 << 20
GIB = 1 << 30


class Isolation(IntEnum):
    """How a build is contained; a greater one is stronger."""

    CONTAINER = 1
    GVISOR = 2
    KATA = 3

    def __str__(self) -> str:
        return self.name.lower()


class Trust(StrEnum):
    """How far the source is trusted. Absent means untrusted."""

    UNTRUSTED = "untrusted"
    TRUSTED = "trusted"


class Network(IntEnum):
    """What the door lets through besides the push of the result; a smaller one is stricter."""

    NONE = 0
    REGISTRIES = 1

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one build may use. The defaults are safe for hostile code on a small machine.

    Attributes:
        memory_bytes: Of the whole sandbox: processes, its kernel, and every writable file.
        cpu_millis: Thousandths of a processor.
        disk_bytes: Of each writable file system in the sandbox (they count as memory too).
        pids: Tasks on the host, the sandbox's kernel included. The Sentry needs some hundred
            for itself and dies without a word below that (measured), hence the headroom.
        wall_seconds: From the start of the sandbox to its end.
        log_bytes: Of build output.
        context_bytes: Of the context's files together.
        context_entries: Files, directories and links in the context.
        path_bytes: Of one path in the context or in a layer.
        staged_bytes: Of all blobs that the build may push.
        layers: In the image.
        layer_bytes: Of one layer when decompressed.
        layer_entries: In one layer.
    """

    memory_bytes: int = 4 * GIB
    cpu_millis: int = 2000
    disk_bytes: int = 3 * GIB
    pids: int = 4096
    wall_seconds: int = 1200
    log_bytes: int = 64 * MIB
    context_bytes: int = 2 * GIB
    context_entries: int = 200_000
    path_bytes: int = 4096
    staged_bytes: int = 16 * GIB
    layers: int = 127
    layer_bytes: int = 16 * GIB
    layer_entries: int = 1_000_000

    def tightened(self, other: "Limits") -> "Limits":
        """The smaller of both, field by field."""
        return Limits(
            **{
                f.name: min(getattr(self, f.name), getattr(other, f.name))
                for f in dataclasses.fields(self)
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStep:
    """One rule that was looked at, and what it did."""

    policy: str
    rule: str
    effect: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How this build runs, and what it may reach.

    Attributes:
        base_images: Sets of globs over ``HOST/REPOSITORY``; an image must match one of each set.
        pull_credentials: Globs likewise; repositories that may be pulled with the user's
            credentials. All others are pulled anonymously.
        destinations: Sets of globs likewise, for where the result may be published.
        policies: Name and digest of every policy that had a say.
    """

    isolation: Isolation
    backend: str
    builder: str
    network: Network
    limits: Limits
    base_images: tuple[tuple[str, ...], ...]
    pull_credentials: tuple[tuple[str, ...], ...]
    destinations: tuple[tuple[str, ...], ...]
    policies: tuple[tuple[str, Digest], ...]
    trace: tuple[TraceStep, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial:
    """No way to run this build is allowed."""

    reason: str
    rule: str
    trace: tuple[TraceStep, ...]


def plain(value: Any) -> Any:  # noqa: ANN401 - any of our frozen values
    """A frozen value as plain JSON types; names, references and paths as text."""
    if isinstance(value, (Isolation, Network, ImageReference, PurePath)):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [plain(item) for item in value]
        return sorted(items) if isinstance(value, (set, frozenset)) else items
    return value


def canonical_json(value: Any) -> bytes:  # noqa: ANN401 - any of our frozen values
    """The same bytes for the same value, whatever the locale or the order of dictionaries."""
    return json.dumps(
        plain(value), sort_keys=True, ensure_ascii=True, separators=(",", ":")
    ).encode()

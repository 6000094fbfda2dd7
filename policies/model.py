"""What a policy decides: plain immutable values."""

import dataclasses
import json
from dataclasses import dataclass
from enum import IntEnum
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


class Trust(IntEnum):
    """How far the source is trusted. Absent means untrusted."""

    UNTRUSTED = 0
    TRUSTED = 1

    def __str__(self) -> str:
        return self.name.lower()


class Network(IntEnum):
    """What the door lets through besides the push of the result; a smaller one is stricter."""

    NONE = 0
    REGISTRIES = 1
    EGRESS = 2

    def __str__(self) -> str:
        return self.name.lower()


class Cache(IntEnum):
    """What a build may do with the layer cache of its scope; a smaller one is stricter."""

    NONE = 0
    READ = 1
    WRITE = 2

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
        wall_seconds: From the start of the sandbox to its end. What comes before it (looking at
            base images) and after it (verifying) has as much time, each.
        log_bytes: Of build output.
        context_bytes: Of the context's files together.
        context_entries: Files, directories and links in the context.
        path_bytes: Of one path in the context or in a layer.
        staged_bytes: Of all blobs that the build may push.
        layers: In the image.
        layer_bytes: Of one layer when decompressed.
        layer_entries: In one layer.
        egress_bytes: Through the egress proxy, both ways together.
        egress_connections: Through the egress proxy, at a time.
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
    egress_bytes: int = 4 * GIB
    egress_connections: int = 64

    def tightened(self, other: "Limits") -> "Limits":
        """The smaller of both, field by field."""
        return Limits(
            **{
                f.name: min(getattr(self, f.name), getattr(other, f.name))
                for f in dataclasses.fields(self)
            }
        )


Patterns = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressRule:
    """Where RUN steps may connect to through the proxy.

    Attributes:
        hosts: Names, exact or ``*.SUFFIX``; checked before anything is resolved.
        preset: Package ecosystem whose hosts the gateway knows, instead of ``hosts``.
        ports: TCP ports.
        methods: Of HTTP in absolute form; a rule that has some denies CONNECT. Empty for any.
        private_ranges: Networks in CIDR form that the hosts may resolve to although they are
            not public.
    """

    hosts: Patterns = ()
    preset: str | None = None
    ports: tuple[int, ...] = (443,)
    methods: tuple[str, ...] = ()
    private_ranges: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What policies allow a build, field by field. Each field knows which value is stricter.

    Lists are sets of patterns of which something must match one of each; a policy that further
    tightens adds a set.

    Attributes:
        isolation: At least.
        fallback: The isolation to take where ``isolation`` cannot be had; None denies.
        backends: That may be used.
        builders: Likewise, as ``NAME`` or ``NAME@DIGEST``.
        nonroot: Whether the builder must not be uid 0 of the sandbox's own kernel.
        rootless: Whether no process of the sandbox may be host uid 0, or hold a capability in the
            host's initial user namespace. The backend judges what it sees by that.
        capabilities: That the builder may have in the sandbox's own kernel.
        egress: Of each set one rule must allow a connection.
        base_images: Over ``HOST/REPOSITORY``, or ``HOST/REPOSITORY@DIGEST`` where the build
            names one.
        pull_credentials: Over ``HOST/REPOSITORY``; pulled with the user's credentials, all
            others anonymously.
        destinations: Over ``HOST/REPOSITORY``.
        frontends: That a builder which runs them may run, as the Dockerfile names them.
        priority: In a queue; 0 to 100, a greater one goes first.
        provenance: Whether nothing may be published without it.
        signature: Likewise.
        retention_days: That the build's record is kept at least.
    """

    isolation: Isolation
    fallback: Isolation | None
    backends: tuple[Patterns, ...]
    builders: tuple[Patterns, ...]
    nonroot: bool
    rootless: bool
    capabilities: tuple[Patterns, ...]
    network: Network
    egress: tuple[tuple[EgressRule, ...], ...]
    base_images: tuple[Patterns, ...]
    pull_credentials: tuple[Patterns, ...]
    destinations: tuple[Patterns, ...]
    frontends: tuple[Patterns, ...]
    cache: Cache
    priority: int
    provenance: bool
    signature: bool
    retention_days: int
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStep:
    """One rule that was looked at.

    Attributes:
        policy: Its name.
        rule: Section and name, such as ``deny/remote-add``.
        line: Where it stands in the policy's file; 0 where it is built in.
        found: ``matched``, ``not matched``, ``unknown`` or ``open``.
        effect: What it did to the decision, or nothing.
    """

    policy: str
    rule: str
    line: int = 0
    found: str
    effect: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How this build runs, and what it may reach.

    Attributes:
        backend: The one to use, which ``grant`` allows; so is the builder.
        builder_digest: Of the builder's root filesystem, where the facts had it.
        wanted: The isolation before ``fallback``; ``isolation`` is what the build gets.
        grant: What the policies allow, with the limits that the request asked for.
        policies: Name and digest of every policy that had a say.
    """

    isolation: Isolation
    wanted: Isolation
    trust: Trust
    tenant: str | None
    backend: str
    builder: str
    builder_digest: Digest | None
    grant: Grant
    policies: tuple[tuple[str, Digest], ...]
    trace: tuple[TraceStep, ...]

    @property
    def limits(self) -> Limits:
        return self.grant.limits

    @property
    def network(self) -> Network:
        return self.grant.network


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial:
    """No way to run this build is allowed.

    Attributes:
        wanted: The isolation that cannot be had, where that is why.
    """

    reason: str
    rule: str
    wanted: Isolation | None = None
    policies: tuple[tuple[str, Digest], ...]
    trace: tuple[TraceStep, ...]


def plain(value: Any) -> Any:  # noqa: ANN401 - any of our frozen values
    """A frozen value as plain JSON types; names, references and paths as text."""
    if isinstance(value, (Isolation, Trust, Network, Cache, ImageReference, PurePath)):
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

"""What is known of a build without running anything of it."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from policies.model import Isolation
from policies.reference import Digest, ImageReference


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One FROM.

    Attributes:
        name: After AS, in lower case, or None.
        base: As written after FROM, with variables expanded as far as they are known.
        image: The base where it is an image; None for ``scratch``, an earlier stage, or unknown.
        line: Where FROM stands, from 1.
        foreign: Whether it asks for another platform than the request, or could.
    """

    name: str | None
    base: str
    image: ImageReference | None
    line: int
    foreign: bool = False


_TENANT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def is_tenant(name: str) -> bool:
    """Whether ``name`` can name a tenant: a label, so that no pattern is made of it."""
    return _TENANT.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Unknown:
    """Something in a Dockerfile that nobody can tell without running it.

    Attributes:
        facts: Those of DockerfileFacts that are not complete because of it, by attribute.
        sentence: For people, with the line.
    """

    facts: frozenset[str]
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerfileFacts:
    """What a Dockerfile asks for, read statically.

    Attributes:
        frontend: What ``# syntax=`` names, or None.
        stages: In order.
        images: Every image that FROM, ``COPY --from`` or ``RUN --mount=from=`` names.
        remote_adds: Sources of ADD that are URLs or Git repositories.
        mounts: Kinds of ``RUN --mount``.
        networks: Values of ``RUN --network``.
        securities: Values of ``RUN --security``.
        secrets: Ids that ``RUN --mount=type=secret`` asks for.
        build_args: Names declared with ARG.
        docker_only: Instructions whose effect only Docker's image format keeps.
        unknown: What could not be determined, and which facts that spoils.
    """

    frontend: str | None = None
    stages: tuple[Stage, ...] = ()
    images: tuple[ImageReference, ...] = ()
    remote_adds: tuple[str, ...] = ()
    mounts: frozenset[str] = frozenset()
    networks: frozenset[str] = frozenset()
    securities: frozenset[str] = frozenset()
    secrets: frozenset[str] = frozenset()
    build_args: frozenset[str] = frozenset()
    docker_only: frozenset[str] = frozenset()
    unknown: tuple[Unknown, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextFacts:
    """The snapshot in numbers."""

    bytes: int = 0
    entries: int = 0
    links_leaving: tuple[str, ...] | None = ()
    """Symbolic links whose target lies outside the context (kept verbatim, never followed); None
    for more than anybody wants to list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who asks, as far as somebody vouches for it.

    Attributes:
        kind: Who vouches: ``unix`` for the kernel of this host; empty for nobody.
        name: As that one knows it.
    """

    kind: str = ""
    name: str = ""

    @property
    def authenticated(self) -> bool:
        return bool(self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFacts:
    """Where the source comes from. What nobody said is unknown, which None stands for.

    Attributes:
        kind: How it came: ``directory``.
        url: Of the repository, without user-info.
        ref: Full name, such as ``refs/heads/main``.
        pull_request: Whether it is a proposed change.
        fork: Whether it comes from a repository of somebody else.
        signed: Whether the commit has a signature that somebody checked.
    """

    kind: str = "directory"
    url: str | None = None
    ref: str | None = None
    pull_request: bool | None = None
    fork: bool | None = None
    signed: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """What the base images bring along.

    Attributes:
        resolved: Whether their configurations were read already; before, ``onbuild`` is open.
        onbuild: Instructions that they make the build run; None where that is unknown.
    """

    resolved: bool = False
    onbuild: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderFacts:
    """The builder that was asked for, and what it needs.

    Attributes:
        digest: Of its root filesystem; None where it is not installed.
        uid: Inside the sandbox.
        capabilities: Inside the sandbox, without the ``CAP_`` prefix.
        frontends: Whether it runs what ``# syntax=`` names.
    """

    name: str = "buildah"
    digest: Digest | None = None
    uid: int = 0
    capabilities: tuple[str, ...] = ()
    frontends: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What the request states and asks for.

    Attributes:
        untrusted: Whether it says ``--untrusted``, which forbids raising its trust.
        target: Stage to build; empty for the last.
        build_args: Names that it gives values for.
        wall_seconds: None for as long as policy allows; likewise the others.
    """

    untrusted: bool = False
    backend: str = "local"
    platform: str = "linux/amd64"
    target: str = ""
    build_args: tuple[str, ...] = ()
    wall_seconds: int | None = None
    memory_bytes: int | None = None
    cpu_millis: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What the backend was seen to offer.

    Attributes:
        isolations: That can be had.
        egress: Whether its door has a proxy for RUN steps.
        provenance: Whether this runner can sign what it built.
        rootless: Whether no process of its sandboxes is root on the host.
    """

    isolations: frozenset[Isolation] = frozenset()
    egress: bool = False
    rootless: bool = False
    provenance: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeFacts:
    """When the build was asked for, in UTC.

    Attributes:
        date: ``YYYY-MM-DD``.
        hour: 0 to 23.
        weekday: 1 for Monday to 7 for Sunday, as in ISO 8601.
    """

    date: str
    hour: int
    weekday: int

    @classmethod
    def at(cls, moment: datetime) -> Self:
        """Of an aware ``moment``."""
        utc = moment.astimezone(UTC)
        return cls(date=utc.date().isoformat(), hour=utc.hour, weekday=utc.isoweekday())


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFacts:
    """All that a policy may look at; ``policies.vocabulary`` has the names it uses for it.

    Attributes:
        tenant: On whose behalf the identity builds; None where nobody said.
        time: None where no clock was read.
    """

    identity: Identity = Identity()
    tenant: str | None = None
    source: SourceFacts = SourceFacts()
    dockerfile: DockerfileFacts = DockerfileFacts()
    base: BaseFacts = BaseFacts()
    context: ContextFacts = ContextFacts()
    destinations: tuple[ImageReference, ...] = ()
    builder: BuilderFacts = BuilderFacts()
    request: RequestFacts = RequestFacts()
    host: HostFacts = HostFacts()
    time: TimeFacts | None = None

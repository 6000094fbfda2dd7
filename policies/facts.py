"""What is known of a build without running anything of it."""

from dataclasses import dataclass

from policies.model import Isolation, Trust
from policies.reference import ImageReference


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One FROM.

    Attributes:
        name: After AS, in lower case, or None.
        base: As written after FROM, with variables expanded as far as they are known.
        image: The base where it is an image; None for ``scratch``, an earlier stage, or unknown.
        line: Where FROM stands, from 1.
    """

    name: str | None
    base: str
    image: ImageReference | None
    line: int


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
        unknown: What could not be determined, each as a sentence with its line.
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
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextFacts:
    """The snapshot in numbers."""

    bytes: int
    entries: int
    links_leaving: tuple[str, ...] = ()
    """Symbolic links whose target lies outside the context (kept verbatim, never followed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFacts:
    """All that a policy may look at.

    Attributes:
        trust: What the request states; only the operator's policy could raise it.
        available: Isolations that the backend was seen to offer on this host.
    """

    trust: Trust = Trust.UNTRUSTED
    dockerfile: DockerfileFacts
    context: ContextFacts
    destinations: tuple[ImageReference, ...]
    backend: str
    builder: str
    platform: str
    wall_seconds: int | None = None
    available: frozenset[Isolation]

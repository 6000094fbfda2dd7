"""How a userspace builder is driven: plain data that any sandbox can carry out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from builder.rootfs import Recipe

WORKSPACE = "/workspace"
"""Where the context stands inside every sandbox."""
RUNNER = "/run/runner"
"""Our own files inside: one read-only mount over the builder image."""
CONFIG = f"{RUNNER}/config"
"""The plan's files."""
CONTEXT_TAR = f"{RUNNER}/door/context.tar"
"""Where the context arrives, once the sandbox was accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInput:
    """What a builder has to know. Names of the door come from the sandbox's side.

    Attributes:
        dockerfile: The bytes that were read for facts, so that no builder reads others.
        ignored: Paths of the context that are there and must not be copied.
        image_format: ``oci`` or ``docker``.
        registry: The one registry authority that the builder sees, ``127.0.0.1:PORT``.
        repository: Where in it to push the result, without a tag.
        token: Of the session; opens nothing but the session.
        upstreams: Registry hosts whose images the build may ask for, each with the path
            component of ``registry`` that stands for it.
        proxy: URL with its login, for RUN steps; None where they have no egress.
    """

    dockerfile: bytes
    ignored: tuple[str, ...]
    build_args: Mapping[str, str]
    target: str | None
    platform: str
    image_format: str
    registry: str
    repository: str
    token: str
    upstreams: Mapping[str, str]
    proxy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """What to run inside, in a sandbox that is thrown away.

    Attributes:
        commands: Run one after the other; the first that fails ends the build.
        build_command: Index of the one whose failure is the build's own.
        environment: Of every command.
        files: In CONFIG, by name; read-only.
        writable: Directories that get a file system of their own, empty, bounded in size.
        uid: Of every command, in the sandbox's own kernel.
        capabilities: There alone, without the ``CAP_`` prefix.
        claim: File that holds the digest the builder says it pushed.
    """

    commands: tuple[tuple[str, ...], ...]
    build_command: int
    environment: Mapping[str, str]
    files: Mapping[str, bytes]
    writable: tuple[str, ...]
    uid: int
    capabilities: tuple[str, ...]
    claim: str


class Builder(Protocol):
    """One userspace builder.

    Attributes:
        uid: Inside the sandbox.
        capabilities: That it needs in the sandbox's own kernel.
        runs_frontends: Whether it runs what ``# syntax=`` names.
    """

    name: str
    recipe: Recipe
    uid: int
    capabilities: tuple[str, ...]
    runs_frontends: bool

    def plan(self, request: BuildInput) -> BuildPlan:
        """How to build ``request``. Pure."""

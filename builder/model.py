"""How a userspace builder is driven: plain data that any sandbox can carry out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from builder.rootfs import Recipe
from policies.model import Isolation

WORKSPACE = "/workspace"
"""Where the context stands inside every sandbox."""
RUNNER = "/run/runner"
"""Our own files inside: one read-only mount over the builder image."""
CONFIG = f"{RUNNER}/config"
"""The plan's files."""
DOOR = f"{RUNNER}/door"
"""Inside every sandbox: the sockets to the host, and the inputs once they were released."""
BASE_NAME = "base"
BASE = f"{DOOR}/{BASE_NAME}"
"""Where an image arrives, in a sandbox that unpacks it: as a directory of the kind that
containers/image calls ``dir:``, the only one that holds Docker's manifests unchanged and gives the
image no name. ``manifest.json`` is what was resolved, ``HEX.manifest.json`` the manifest of the
platform where that is an index, and ``HEX`` each blob."""
CONTEXT_NAME = "context.tar"
CONTEXT_TAR = f"{DOOR}/{CONTEXT_NAME}"
"""Where the context arrives, once the sandbox was accepted."""


MOST_BASES = 16
"""Unpacked base images that one build is given; whatever it needs besides, it pulls."""


@dataclass(frozen=True, slots=True)
class BaseLayer:
    """One layer of a base image, as its manifest and its configuration name it."""

    digest: str
    diff_id: str
    compression: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackedBase:
    """A base image in the builder's own format, made by ``Builder.unpack``.

    Attributes:
        config: Digest of its configuration.
        names: What FROM and ``--from`` call it, each as ``HOST/REPOSITORY:TAG``.
        at: The directory inside that it is in, or has to be.
        packed: File inside that it is packed in; None where it is mounted at ``at``.
        layers: From the lowest.
    """

    config: str
    names: tuple[str, ...]
    at: str
    packed: str | None
    layers: tuple[BaseLayer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInput:
    """What a builder has to know. Names of the door come from the sandbox's side.

    Attributes:
        dockerfile: The bytes that were read for facts, so that no builder reads others.
        ignored: Paths of the context that are there and must not be copied.
        isolation: Of the sandbox that it runs in: how RUN steps can be had may depend on it.
        confined: Whether the sandbox allows no more than Pod Security's level baseline.
        image_format: ``oci`` or ``docker``.
        registry: The one registry authority that the builder sees, ``127.0.0.1:PORT``.
        repository: Where in it to push the result, without a tag.
        token: Of the session; opens nothing but the session.
        upstreams: Registry hosts whose images the build may ask for, each with the path
            component of ``registry`` that stands for it.
        proxy: URL with its login, for RUN steps; None where they have no egress.
        bases: Base images that need not be pulled.
        reproducible: Whether no clock may show in the image.
    """

    dockerfile: bytes
    ignored: tuple[str, ...]
    build_args: Mapping[str, str]
    target: str | None
    platform: str
    isolation: Isolation
    image_format: str
    registry: str
    repository: str
    token: str
    upstreams: Mapping[str, str]
    proxy: str | None = None
    bases: tuple[UnpackedBase, ...] = ()
    reproducible: bool = False
    confined: bool = False


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
        claim: File that holds the digest the builder says it pushed; empty where it pushes nothing.
        apart: Whether the commands are root of a user namespace of their own inside the sandbox,
            which is how a builder gets by with few capabilities.
        output: File that is handed out once every command ended well; None for none.
    """

    commands: tuple[tuple[str, ...], ...]
    build_command: int
    environment: Mapping[str, str]
    files: Mapping[str, bytes]
    writable: tuple[str, ...]
    uid: int
    capabilities: tuple[str, ...]
    claim: str
    apart: bool = False
    output: str | None = None


class Builder(Protocol):
    """One userspace builder.

    Attributes:
        uid: Inside the sandbox.
        capabilities: That it needs in the sandbox's own kernel.
        runs_frontends: Whether it runs what ``# syntax=`` names.
        reproducible_formats: Image formats in which it can give the same digest twice.
    """

    name: str
    recipe: Recipe
    uid: int
    capabilities: tuple[str, ...]
    runs_frontends: bool
    reproducible_formats: frozenset[str]

    def plan(self, request: BuildInput) -> BuildPlan:
        """How to build ``request``. Pure."""

    def base_at(self, number: int) -> str:
        """Where the builder wants the base image with this number. Pure."""

    def unpack(self, platform: str) -> BuildPlan:
        """How to unpack the image at BASE and to pack it into one EROFS image. Pure.

        Args:
            platform: ``OS/ARCHITECTURE`` to take of an index.

        Returns:
            A plan whose ``output`` is the EROFS image; ``build_command`` is what reads the layers.
        """

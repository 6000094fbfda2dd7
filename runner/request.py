"""What the user asked for, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from policies.facts import BuildFacts, SourceFacts, TimeFacts
from policies.model import Decision
from policies.reference import Digest, ImageReference
from runner.output import Output
from sandbox.model import Evidence, Provided, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """One ``runner submit``. Trust is absent on purpose: a request cannot raise it.

    Attributes:
        dockerfile: As ``--file`` names it, or None for the usual names.
        backend: The one to use; None for the first that policy takes.
        reproducible: Whether the same context and base images have to give the same digest.
        untrusted: Stated; forbids policy to raise the build's trust.
        tenant: On whose behalf; stated by whoever asks, as ``source`` is.
        wall_seconds: What ``--timeout`` asks for; None for as much as policy allows.
        memory_bytes: Likewise.
        cpu_millis: Likewise.
        time: When it was asked for.
        local_images: Images that an OCI layout on this host stands in for.
    """

    context: Path
    dockerfile: str | None = None
    destinations: tuple[ImageReference, ...] = ()
    output: Output | None = None
    build_args: Mapping[str, str]
    target: str | None = None
    platform: str = "linux/amd64"
    backend: str | None = None
    builder: str = "buildah"
    reproducible: bool = False
    untrusted: bool = False
    tenant: str | None = None
    source: SourceFacts = field(default_factory=SourceFacts)
    wall_seconds: int | None = None
    memory_bytes: int | None = None
    cpu_millis: int | None = None
    time: TimeFacts = field(default_factory=lambda: TimeFacts.at(datetime.now(UTC)), compare=False)
    local_images: Mapping[ImageReference, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderUsed:
    name: str
    version: str
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class StartsFrom:
    """A base image whose layers, all of them, are the lowest ones of an image."""

    image: str
    digest: Digest
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """What a build came to; ``result.json``.

    Attributes:
        digest: Of the image as its bytes arrived and were verified.
        reproducible: Whether that was asked for: no clock shows in what the builder itself wrote.
        published: Destinations whose tag names the digest now.
        stored: Where the image is kept on this host, where nothing else was asked for.
        base_images: Every image that was resolved, and to what.
        provided: How each image that the Dockerfile names came into the sandbox.
        starts_from: The base image whose layers the image begins with, as verified; None where
            it begins with none that is known.
        enforced: Limit by limit, what kept it.
        ledger: What the session's ledger ends with; ``runner egress ID --verify`` compares.
        timings_seconds: Per stage.
    """

    build_id: str
    digest: Digest
    size_bytes: int
    reproducible: bool
    published: tuple[str, ...]
    output: str | None
    stored: str | None
    context: Digest
    builder: BuilderUsed
    facts: BuildFacts
    decision: Decision
    evidence: Evidence
    base_images: Mapping[str, str]
    provided: Mapping[str, Provided]
    starts_from: StartsFrom | None
    ledger: Digest
    usage: Usage
    enforced: Mapping[str, str]
    timings_seconds: Mapping[str, float]
    warnings: tuple[str, ...]

"""What can be known of a build without running anything of it."""

import os
import pwd
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from builder.bases import BaseImage
from builder.dockerfile import read_dockerfile
from builder.model import Builder
from policies import engine
from policies.facts import (
    BaseFacts,
    BuilderFacts,
    BuildFacts,
    DockerfileFacts,
    Identity,
    RequestFacts,
)
from policies.reference import Digest, ImageReference
from runner.choice import Candidate, Choice, choose
from runner.context import BuildContext, snapshot
from runner.errors import BuilderUnknown, UsageError
from runner.request import BuildRequest
from runner.stores.rootfs import RootfsStore
from runner.tools import Tools

_PREDEFINED_ARGS = frozenset(
    name
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for name in (proxy, proxy.lower())
) | {"SOURCE_DATE_EPOCH"}
"""Build args that Dockerfiles may use without declaring them."""


def named_builder(request: BuildRequest, tools: Tools) -> Builder:
    """The builder that the request names. Raises BuilderUnknown."""
    builder = tools.builders.get(request.builder)
    if builder is None:
        raise BuilderUnknown(f"there is no builder {request.builder!r}")
    return builder


def build_facts(
    request: BuildRequest,
    context: BuildContext,
    *,
    builder: Builder,
    builder_digest: Digest | None,
    bases: Mapping[ImageReference, BaseImage | None] | None = None,
) -> BuildFacts:
    """The facts of a request whose context was taken, before ``choice.on`` adds a backend's.

    Args:
        request: What was asked for.
        context: Its snapshot.
        builder: That it names.
        builder_digest: Of the builder's root filesystem, where it is installed.
        bases: From ``read_bases``; None before the base images are resolved.

    Raises:
        DockerfileInvalid: It is outside the grammar.
        StageUnknown: It has no such stage.
    """
    dockerfile = read_dockerfile(
        context.dockerfile_bytes,
        build_args=request.build_args,
        target=request.target,
        platform=request.platform,
        bases=bases or {},
    )
    return BuildFacts(
        identity=_identity(),
        tenant=request.tenant,
        source=request.source,
        dockerfile=dockerfile,
        base=_base_facts(dockerfile, bases),
        context=context.facts,
        destinations=request.destinations,
        builder=BuilderFacts(
            name=builder.name,
            digest=builder_digest,
            uid=builder.uid,
            capabilities=builder.capabilities,
            frontends=builder.runs_frontends,
        ),
        request=RequestFacts(
            untrusted=request.untrusted,
            platform=request.platform,
            target=request.target or "",
            build_args=tuple(sorted(request.build_args)),
            wall_seconds=request.wall_seconds,
            memory_bytes=request.memory_bytes,
            cpu_millis=request.cpu_millis,
        ),
        time=request.time,
    )


def _base_facts(
    dockerfile: DockerfileFacts, bases: Mapping[ImageReference, BaseImage | None] | None
) -> BaseFacts:
    if bases is None:
        return BaseFacts()
    # A base image that a variable hides is not among the stages' images at all.
    hidden = any("images" in unknown.facts for unknown in dockerfile.unknown)
    foreign = any(stage.foreign and stage.image is not None for stage in dockerfile.stages)
    found = [base for base in bases.values() if base is not None]
    if hidden or foreign or len(found) < len(bases):
        return BaseFacts(resolved=True)
    triggers = dict.fromkeys(trigger for base in found for trigger in base.triggers)
    return BaseFacts(resolved=True, onbuild=tuple(triggers))


def _identity() -> Identity:
    """The user whose process this is, for whom the kernel vouches."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return Identity(kind="unix", name=name)


def survey(request: BuildRequest, tools: Tools, candidates: Iterable[Candidate]) -> Choice:
    """What would be decided if the request were built: nothing is started, nothing is kept.

    Raises:
        RunnerError: The request is wrong, or the context cannot be read.
    """
    builder = named_builder(request, tools)
    installed = RootfsStore(tools.home.builders).installed(builder.name)
    with tempfile.TemporaryDirectory(prefix="runner-survey-") as temporary:
        context = snapshot(
            request.context,
            dockerfile=request.dockerfile,
            limits=engine.context_limits(tools.policies),
            into=Path(temporary) / "context.tar",
        )
        facts = build_facts(
            request,
            context,
            builder=builder,
            builder_digest=installed.digest if installed is not None else None,
        )
    return choose(tools.policies, facts, candidates)


def image_format(dockerfile: DockerfileFacts) -> str:
    """``docker`` where OCI's format has no place for what some instruction says, else ``oci``."""
    return "docker" if dockerfile.docker_only else "oci"


def require_reproducible(request: BuildRequest, builder: Builder, facts: BuildFacts) -> None:
    """Raises UsageError where ``--reproducible`` asks for what the builder cannot keep."""
    kind = image_format(facts.dockerfile)
    if request.reproducible and kind not in builder.reproducible_formats:
        instructions = ", ".join(sorted(facts.dockerfile.docker_only))
        raise UsageError(
            f"{builder.name} makes no reproducible image in {kind}'s format, "
            f"and the Dockerfile or a base image has {instructions}",
            advice="Leave out --reproducible, or those instructions.",
        )


def warnings(request: BuildRequest, context: BuildContext, facts: BuildFacts) -> Iterator[str]:
    """What a reader of the Dockerfile should know before it is built."""
    dockerfile = facts.dockerfile
    if dockerfile.frontend is not None and not facts.builder.frontends:
        yield (
            f"builder {facts.builder.name} runs no frontends: # syntax={dockerfile.frontend} "
            "has no effect"
        )
    for unknown in dockerfile.unknown:
        yield f"{context.dockerfile}: {unknown.sentence}"
    unused = sorted(set(request.build_args) - dockerfile.build_args - _PREDEFINED_ARGS)
    if unused:
        yield f"build args that no ARG declares: {', '.join(unused)}"

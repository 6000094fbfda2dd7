"""What can be known of a build without running anything of it."""

import os
import pwd
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from builder.dockerfile import read_dockerfile
from builder.model import Builder
from builder.onbuild import with_triggers
from policies import engine
from policies.facts import (
    BaseFacts,
    BuilderFacts,
    BuildFacts,
    HostFacts,
    Identity,
    RequestFacts,
)
from policies.model import Isolation
from policies.reference import Digest, ImageReference
from runner.context import BuildContext, snapshot
from runner.errors import BuilderUnknown, IsolationUnavailable, RunnerError, UsageError
from runner.gateway.upstream import Upstream
from runner.registry.image import (
    CONFIG_BYTES,
    Descriptor,
    Index,
    Platform,
    parse_document,
    parse_onbuild,
)
from runner.request import BuildRequest
from runner.stores.rootfs import RootfsStore
from runner.tools import Tools
from sandbox.model import Backend

_PREDEFINED_ARGS = frozenset(
    name
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for name in (proxy, proxy.lower())
) | {"SOURCE_DATE_EPOCH"}
"""Build args that Dockerfiles may use without declaring them."""


def named_parts(request: BuildRequest, tools: Tools) -> tuple[Backend, Builder]:
    """The backend and the builder that the request names.

    Raises:
        UsageError: There is no such backend.
        BuilderUnknown: There is no such builder.
    """
    backend = tools.backends.get(request.backend)
    if backend is None:
        raise UsageError(
            f"there is no backend {request.backend!r}",
            advice=f"One of: {', '.join(sorted(tools.backends))}.",
        )
    builder = tools.builders.get(request.builder)
    if builder is None:
        raise BuilderUnknown(f"there is no builder {request.builder!r}")
    return backend, builder


def offered(backend: Backend) -> tuple[frozenset[Isolation], IsolationUnavailable | None]:
    """The isolations that can be had, and, where there are none, why."""
    found, why = set(), None
    for isolation in Isolation:
        try:
            backend.require(isolation)
            found.add(isolation)
        except IsolationUnavailable as error:
            # Of the one that untrusted builds need at least, the reason says most.
            why = error if why is None or isolation is engine.UNTRUSTED_FLOOR else why
    return frozenset(found), None if found else why


def build_facts(
    request: BuildRequest,
    context: BuildContext,
    *,
    builder: Builder,
    builder_digest: Digest | None,
    isolations: frozenset[Isolation],
) -> BuildFacts:
    """The facts of a request whose context was taken.

    Raises:
        DockerfileInvalid: It is outside the grammar.
        StageUnknown: It has no such stage.
    """
    return BuildFacts(
        identity=_identity(),
        tenant=request.tenant,
        source=request.source,
        dockerfile=read_dockerfile(
            context.dockerfile_bytes,
            build_args=request.build_args,
            target=request.target,
            platform=request.platform,
        ),
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
            backend=request.backend,
            platform=request.platform,
            target=request.target or "",
            build_args=tuple(sorted(request.build_args)),
            wall_seconds=request.wall_seconds,
            memory_bytes=request.memory_bytes,
            cpu_millis=request.cpu_millis,
        ),
        host=HostFacts(isolations=isolations),
        time=request.time,
    )


def _identity() -> Identity:
    """The user whose process this is, for whom the kernel vouches."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return Identity(kind="unix", name=name)


def survey(request: BuildRequest, tools: Tools) -> BuildFacts:
    """The facts of a request that is not to be built: nothing is started, nothing is kept.

    Raises:
        RunnerError: The request is wrong, or the context cannot be read.
    """
    backend, builder = named_parts(request, tools)
    isolations, _ = offered(backend)
    installed = RootfsStore(tools.home.builders).installed(builder.name)
    with tempfile.TemporaryDirectory(prefix="runner-survey-") as temporary:
        context = snapshot(
            request.context,
            dockerfile=request.dockerfile,
            limits=engine.context_limits(tools.policies),
            into=Path(temporary) / "context.tar",
        )
        return build_facts(
            request,
            context,
            builder=builder,
            builder_digest=installed.digest if installed is not None else None,
            isolations=isolations,
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


# -- what the base images bring along ----------------------------------------------------------


def with_bases(facts: BuildFacts, upstream: Upstream) -> BuildFacts:
    """The facts with what the base images, all resolved by now, make the build run.

    Where that cannot be told, it is unknown.
    """
    bases = [stage.image for stage in facts.dockerfile.stages if stage.image is not None]
    unread = any("images" in unknown.facts for unknown in facts.dockerfile.unknown)
    platform = Platform.parse(facts.request.platform)
    found: list[str] = []
    for image in dict.fromkeys(bases):
        try:
            found += _triggers(image, upstream, platform)
        except RunnerError:
            unread = True
    dockerfile = with_triggers(facts.dockerfile, found)
    base = BaseFacts(resolved=True, onbuild=None if unread else tuple(found))
    return replace(facts, base=base, dockerfile=dockerfile)


def _triggers(image: ImageReference, upstream: Upstream, platform: Platform) -> tuple[str, ...]:
    """The ONBUILD instructions of one image."""
    descriptor, data = upstream.resolve(image.pulled())
    document = parse_document(data, descriptor.media_type)
    if isinstance(document, Index):
        chosen = [
            entry.descriptor
            for entry in document.manifests
            if entry.platform is not None and entry.platform.agrees_with(platform)
        ]
        # More than one may suit, of several variants; whichever the builder takes is among them.
        manifests = [upstream.resolve(image.at(entry.digest)) for entry in chosen]
        documents = [parse_document(text, entry.media_type) for entry, text in manifests]
    else:
        documents = [document]
    found: list[str] = []
    for manifest in documents:
        assert not isinstance(manifest, Index), "the parser refuses an index in an index"
        found += parse_onbuild(_config(manifest.config, upstream))
    return tuple(dict.fromkeys(found))


def _config(descriptor: Descriptor, upstream: Upstream) -> bytes:
    stream, _ = upstream.open_blob(descriptor.digest)
    with stream:
        return stream.read(CONFIG_BYTES + 1)

"""The way of a build through the house, one arrow after the other.

    request -> context -> facts -> decision -> spec -> outcome -> staged -> verified -> published

Read ``Build._build`` from top to bottom: each step takes what the one before made.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import TypeVar

from builder.bases import BaseImage
from builder.model import CONTEXT_NAME, Builder, BuildInput, BuildPlan
from policies import engine, factsfile
from policies.facts import BuildFacts
from policies.model import Decision, plain
from policies.reference import DOCKER_HUB, Digest, ImageReference
from runner import events, gc, outcome, publish, ready
from runner.bases import begins_with, read_bases, started_from
from runner.cancel import Cancellation
from runner.choice import Candidate, Choice, choose
from runner.context import BuildContext, snapshot
from runner.delivery import Delivery
from runner.errors import (
    Cancelled,
    InvalidReference,
    RunnerError,
    TimeExceeded,
)
from runner.events import Broadcast, Listener, Stage
from runner.facts import build_facts, image_format, require_reproducible, warnings
from runner.gateway.listen import UnixDoor
from runner.gateway.registry import REPOSITORY
from runner.gateway.session import Session
from runner.journal import Journal
from runner.ready import Parts
from runner.registry.image import Platform
from runner.request import BuilderUsed, BuildRequest, BuildResult, StartsFrom
from runner.state import BuildDirectory
from runner.stores import podimage
from runner.stores.blobs import BlobStore
from runner.stores.rootfs import Installed
from runner.stores.unpacked import UnpackedStore
from runner.tools import Tools
from runner.unpack import Bases, Unpacking
from runner.verify import StagedImage, VerifiedImage, verify
from sandbox.model import GATEWAY_PORT, GATEWAY_SOCKET, Backend, Outcome, SandboxSpec

_T = TypeVar("_T")


def submit(
    request: BuildRequest, tools: Tools, listen: Listener, cancellation: Cancellation
) -> BuildResult:
    """Builds, verifies and publishes.

    Args:
        request: What to build.
        tools: With what.
        listen: Gets every event, in order, from any thread.
        cancellation: Ends the build early.

    Raises:
        RunnerError: With what went wrong; ``result.json`` says it too. Nothing is left running.
    """
    tools.home.prepare()
    directory = BuildDirectory.create(tools.home.builds)
    try:
        return Build(
            request, tools, directory, Broadcast(directory.listen, listen), cancellation
        ).run()
    finally:
        directory.close()
        with suppress(OSError):  # the next one tries again
            gc.trim(tools.home, tools.settings)


class Build:
    """One build. ``run`` is the way; the other methods are its steps."""

    def __init__(
        self,
        request: BuildRequest,
        tools: Tools,
        directory: BuildDirectory,
        emit: Listener,
        cancellation: Cancellation,
    ) -> None:
        self._request = request
        self._tools = tools
        self._directory = directory
        self._emit = emit
        self._cancellation = cancellation
        self._journal = Journal(emit, cancellation)
        self._delivery = Delivery(request, tools, directory.image, self._journal, cancellation)
        self._session: Session | None = None

    def run(self) -> BuildResult:
        """See ``submit``."""
        started = time.monotonic()
        self._emit(events.Started(self._directory.id, str(self._request.context)))
        self._directory.write("request", self._request)
        try:
            result = self._build()
        except RunnerError as error:
            self._failed(error)
            raise
        finally:
            if self._session is not None:  # its image may have been read up to here
                self._session.upstream.release()
        facts = factsfile.dump(result.facts)
        self._directory.write("result", {"status": 0, **plain(result), "facts": facts})
        self._emit(events.Finished(result.digest, round(time.monotonic() - started, 3)))
        return result

    def _build(self) -> BuildResult:
        with self._journal.stage(Stage.PREPARE):
            parts = self._prepare()
        with self._journal.stage(Stage.CONTEXT):
            context = self._snapshot()
        with self._journal.stage(Stage.DECIDE):
            facts = self._facts(context, parts)
            choice = self._decide(facts, parts.candidates)
            backend, facts, decision = choice.backend, choice.facts, choice.allowed()
        with ExitStack() as stack:
            root = stack.enter_context(ready.root(self._tools, parts.installed))
            place = backend.reserve(self._directory.id)
            stack.callback(place.release)
            door = UnixDoor(place.door, GATEWAY_SOCKET, place.peer_uid)
            session = stack.enter_context(self._open(door, decision, facts))
            self._session = session
            with self._journal.stage(Stage.RESOLVE):
                bases = self._resolve(session, facts, decision)
                facts = self._facts(context, parts, bases)
                choice = self._decide(facts, (choice.candidate,))
                facts, decision = choice.facts, choice.allowed()
                session.decide(decision)
                for preset in session.unknown_presets:
                    self._journal.warn(f"nothing is known about the egress preset {preset} here")
                self._emit(events.Decided(decision))
                self._delivery.ask()
            with self._journal.stage(Stage.BASES):
                unpacking = self._unpacking(backend, parts.builder, root, session, decision)
                stack.callback(unpacking.release)
                provided = unpacking.provide(facts.dockerfile)
                for image, how in provided.provided.items():
                    self._emit(events.Provided(image, how))
            with self._journal.stage(Stage.LAUNCH):
                spec = SandboxSpec(
                    isolation=decision.isolation,
                    limits=decision.limits,
                    rootless=decision.grant.rootless,
                    plan=self._plan(
                        parts.builder,
                        context,
                        session,
                        provided,
                        facts=facts,
                        decision=decision,
                        confined=backend.confined,
                    ),
                    root=root.root,
                    root_digest=root.digest,
                    image=podimage.pushed(root),
                    inputs={CONTEXT_NAME: context.tar, **provided.inputs},
                    images=provided.images,
                )
                sandbox = backend.launch(
                    place, spec, self._journal.output, waiting=self._journal.waiting
                )
                stack.callback(sandbox.abandon)
                self._directory.write("evidence", sandbox.evidence)
                self._emit(events.Observed(sandbox.evidence))
            with self._journal.stage(Stage.BUILD):
                with self._cancellation.calling(sandbox.cancel):
                    ended = sandbox.wait()
                # Nothing of the sandbox is left when the first staged byte is read.
                place.release()
                outcome.require_success(
                    ended, spec.plan, decision.limits, session.failure, self._journal.log_tail
                )
                staged = session.seal()
        with self._journal.stage(Stage.VERIFY):
            verified = self._verify(staged, decision, ended, provided)
            starts_from = self._starts_from(verified, facts, session)
        with self._journal.stage(Stage.PUBLISH):
            self._delivery.deliver(verified)
        return self._result(
            context=context,
            root=root,
            facts=facts,
            decision=decision,
            ended=ended,
            image=verified,
            session=session,
            provided=provided,
            starts_from=starts_from,
        )

    # -- before anything untrusted is read -------------------------------------------------

    def _prepare(self) -> Parts:
        """The parts that the request names, if they can be had."""
        request = self._request
        for destination in request.destinations:
            publish.check_destination(destination)
        if request.output is not None:
            request.output.check()
        return ready.parts(request, self._tools)

    # -- what can be known without running anything ------------------------------------------

    def _snapshot(self) -> BuildContext:
        context = snapshot(
            self._request.context,
            dockerfile=self._request.dockerfile,
            limits=engine.context_limits(self._tools.policies),
            into=self._directory.context,
        )
        for warning in context.warnings:
            self._journal.warn(warning)
        numbers = context.facts
        self._emit(events.Snapshotted(context.digest, numbers.bytes, numbers.entries))
        return context

    def _facts(
        self,
        context: BuildContext,
        parts: Parts,
        bases: Mapping[ImageReference, BaseImage | None] | None = None,
    ) -> BuildFacts:
        facts = build_facts(
            self._request,
            context,
            builder=parts.builder,
            builder_digest=parts.installed.digest,
            bases=bases,
        )
        for warning in warnings(self._request, context, facts):
            self._journal.warn(warning)
        require_reproducible(self._request, parts.builder, facts)
        return facts

    def _decide(self, facts: BuildFacts, candidates: Iterable[Candidate]) -> Choice:
        """Asked twice: what base images bring along shows only when they are resolved.

        The second time, of the backend alone that was chosen, where they were resolved from.
        """
        choice = choose(self._tools.policies, facts, candidates)
        record = {"facts": factsfile.dump(choice.facts), "decision": choice.decision}
        self._directory.write("decision", record)
        return choice

    # -- the door, and what stands ready behind it -------------------------------------------

    def _open(self, door: UnixDoor, decision: Decision, facts: BuildFacts) -> Session:
        named = {image.host for image in facts.dockerfile.images}
        return Session(
            door,
            decision,
            settings=self._tools.settings,
            credentials=self._tools.credentials,
            cache=BlobStore(self._tools.home.base_images),
            staged=self._directory.staged,
            ledger=self._directory.ledger,
            upstream_hosts={DOCKER_HUB, *named, *self._tools.settings.registries},
            fetching=self._journal.fetching,
            local_images=self._request.local_images,
        )

    def _resolve(
        self, session: Session, facts: BuildFacts, decision: Decision
    ) -> dict[ImageReference, BaseImage | None]:
        """Every base image that the Dockerfile names: resolved, authorised, pinned, and read."""
        seconds = decision.limits.wall_seconds
        end = time.monotonic() + seconds

        def patiently(what: str, work: Callable[[], _T]) -> _T:
            late = TimeExceeded(f"{what} not resolved in {seconds} s")
            return self._cancellation.waiting(work, end - time.monotonic(), late)

        for image in facts.dockerfile.images:
            work = partial(session.upstream.resolve, image.pulled())
            descriptor, _ = patiently(f"{image} was", work)
            self._emit(events.Resolved(image, descriptor.digest))
        return patiently("the base images were", partial(read_bases, facts, session.upstream))

    def _unpacking(
        self,
        backend: Backend,
        builder: Builder,
        root: Installed,
        session: Session,
        decision: Decision,
    ) -> Unpacking:
        return Unpacking(
            name=self._directory.id,
            backend=backend,
            builder=builder,
            root=root,
            decision=decision,
            platform=self._request.platform,
            store=UnpackedStore(self._tools.home.unpacked),
            upstream=session.upstream,
            journal=self._journal,
            cancellation=self._cancellation,
        )

    def _plan(
        self,
        builder: Builder,
        context: BuildContext,
        session: Session,
        provided: Bases,
        *,
        facts: BuildFacts,
        decision: Decision,
        confined: bool,
    ) -> BuildPlan:
        request = self._request
        door = f"127.0.0.1:{GATEWAY_PORT}"
        return builder.plan(
            BuildInput(
                dockerfile=context.dockerfile_bytes,
                ignored=(context.dockerfile,) if context.dockerfile_ignored else (),
                build_args=request.build_args,
                target=request.target,
                platform=request.platform,
                isolation=decision.isolation,
                confined=confined,
                image_format=image_format(facts.dockerfile),
                registry=door,
                repository=REPOSITORY,
                token=session.token,
                upstreams=session.aliases,
                proxy=session.proxy(door),
                bases=provided.bases,
                reproducible=request.reproducible,
            )
        )

    # -- after the sandbox is gone ------------------------------------------------------------

    def _verify(
        self, staged: StagedImage, decision: Decision, ended: Outcome, provided: Bases
    ) -> VerifiedImage:
        verified = verify(
            staged,
            limits=decision.limits,
            platform=self._request.platform,
            claimed=_claimed(ended.claim),
            progress=self._journal.verifying(decision.limits.wall_seconds),
            vouched=provided.vouched,
        )
        self._emit(events.Verified(verified.root.digest, verified.size_bytes, verified.layers))
        return verified

    def _starts_from(
        self, image: VerifiedImage, facts: BuildFacts, session: Session
    ) -> StartsFrom | None:
        """The base image whose layers the verified image begins with."""
        base = started_from(facts.dockerfile, self._request.target)
        if base is None:
            return None
        platform = Platform.parse(self._request.platform)
        found = begins_with(image, base, session.upstream, platform)
        if found is None:
            self._journal.warn(f"the image does not begin with the layers of {base}")
        return found

    def _result(
        self,
        *,
        context: BuildContext,
        root: Installed,
        facts: BuildFacts,
        decision: Decision,
        ended: Outcome,
        image: VerifiedImage,
        session: Session,
        provided: Bases,
        starts_from: StartsFrom | None,
    ) -> BuildResult:
        request = self._request
        kept = self._directory.image
        return BuildResult(
            build_id=self._directory.id,
            digest=image.root.digest,
            size_bytes=image.size_bytes,
            reproducible=request.reproducible,
            published=tuple(self._delivery.published),
            output=str(request.output) if request.output is not None else None,
            stored=str(kept) if kept.exists() else None,
            context=context.digest,
            builder=BuilderUsed(name=root.name, version=root.version, digest=root.digest),
            facts=facts,
            decision=decision,
            evidence=ended.evidence,
            base_images={str(n): str(digest) for n, digest in session.upstream.resolved().items()},
            provided={str(image): how for image, how in provided.provided.items()},
            starts_from=starts_from,
            ledger=session.ledger_head,
            usage=ended.usage,
            enforced=ended.enforced,
            timings_seconds=self._journal.timings,
            warnings=tuple(self._journal.warnings),
        )

    def _failed(self, error: RunnerError) -> None:
        if self._delivery.published:  # and then it failed at another destination, or was cancelled
            already = f"Published already: {', '.join(self._delivery.published)}."
            error.advice = already if isinstance(error, Cancelled) else f"{already} {error.advice}"
        document = {
            "status": int(error.status),
            "build_id": self._directory.id,
            "code": error.code,
            "message": error.message,
            "advice": error.advice,
            "published": self._delivery.published,
            "ledger": self._session.ledger_head if self._session is not None else None,
            "timings_seconds": self._journal.timings,
            "warnings": self._journal.warnings,
        }
        self._directory.write("result", document)
        log = str(self._directory.log) if self._directory.log.stat().st_size else ""
        with suppress(Cancelled):  # whoever read the events may be gone
            self._emit(events.Failed(error.code, error.message, error.advice, log))


def _claimed(claim: str | None) -> Digest | None:
    """The builder's claim as a digest; one that is none is as good as another image's."""
    if claim is None:
        return None
    try:
        return Digest(claim)
    except InvalidReference:
        return Digest("sha256:" + "0" * 64)

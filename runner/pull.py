"""Base images into the store before any build asks for them, out of a registry or a layout."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from builder.model import Builder
from policies.model import Decision
from policies.patterns import matches_any
from policies.reference import Digest, ImageReference
from runner import events, gc, ready
from runner.cancel import Cancellation
from runner.errors import TimeExceeded, UsageError
from runner.events import Broadcast, Listener, Stage
from runner.facts import survey
from runner.gateway.reachable import ReachableSet
from runner.gateway.upstream import Upstream
from runner.journal import Journal
from runner.registry.archive import LayoutArchive
from runner.registry.layout import LayoutClient, LayoutDirectory, LayoutFiles
from runner.request import BuildRequest
from runner.state import new_id
from runner.stores.blobs import BlobStore
from runner.stores.rootfs import Installed
from runner.stores.unpacked import Unpacked, UnpackedStore
from runner.tools import Tools
from runner.unpack import Unpacking
from sandbox.model import Backend, Provided

_T = TypeVar("_T")

_KINDS: Mapping[str, Callable[[Path], LayoutFiles]] = {
    "oci": LayoutDirectory,
    "oci-archive": LayoutArchive,
}


@dataclass(frozen=True, slots=True)
class LayoutSource:
    """Where on this host an image lies, written as skopeo writes it.

    Attributes:
        kind: ``oci`` for a directory, ``oci-archive`` for a tar.
        name: What the layout calls the image; None for its only one.
    """

    kind: str
    path: Path
    name: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of ``KIND:PATH[:NAME]``; a path has no colon. Raises UsageError."""
        kind, _, rest = text.partition(":")
        path, _, name = rest.partition(":")
        if kind not in _KINDS or not path or "\0" in path:
            raise UsageError(
                f"not a layout: {text[:200]!a}",
                advice="Write oci:DIR, oci:DIR:TAG or oci-archive:FILE.",
            )
        return cls(kind, Path(path), name or None)

    def open(self) -> LayoutClient:
        """Raises ImageNotFound or LayoutInvalid."""
        return LayoutClient(_KINDS[self.kind](self.path), self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRequest:
    """One ``runner base pull``.

    Attributes:
        source: What stands in for the image's registry; None for nothing.
    """

    image: ImageReference
    source: LayoutSource | None = None
    platform: str = "linux/amd64"
    builder: str = "buildah"


@dataclass(frozen=True, slots=True)
class PulledImage:
    """A base image that the store has now.

    Attributes:
        digest: What the image was resolved to.
        how: It comes into builds on this host.
    """

    digest: Digest
    unpacked: Unpacked
    how: Provided


def pull(
    request: PullRequest, tools: Tools, listen: Listener, cancellation: Cancellation
) -> PulledImage:
    """Resolves, fetches, checks and unpacks one image, as a build that starts from it would.

    Raises:
        RunnerError: With what went wrong. Nothing is left running, and nothing half made.
    """
    tools.home.prepare()
    try:
        journal = Journal(Broadcast(listen), cancellation)
        return _Pull(request, tools, journal, cancellation).run()
    finally:
        with suppress(OSError):  # the next one tries again
            gc.trim(tools.home, tools.settings)


class _Pull:
    """One pull. ``run`` is the way; the other methods are its steps."""

    def __init__(
        self, request: PullRequest, tools: Tools, journal: Journal, cancellation: Cancellation
    ) -> None:
        self._request = request
        self._tools = tools
        self._journal = journal
        self._cancellation = cancellation

    def run(self) -> PulledImage:
        image, journal = self._request.image, self._journal
        with tempfile.TemporaryDirectory(prefix="runner-pull-") as temporary:
            build = self._build(Path(temporary))
            with journal.stage(Stage.PREPARE):
                parts = ready.parts(build, self._tools)
            with journal.stage(Stage.DECIDE):
                choice = survey(build, self._tools, parts.candidates)
                decision = choice.allowed()
        seconds = decision.limits.wall_seconds
        with ExitStack() as stack:
            root = stack.enter_context(ready.root(self._tools, parts.installed))
            with journal.stage(Stage.RESOLVE):
                layouts = self._layouts(stack, seconds)
                upstream = self._upstream(stack, decision, layouts)
                resolve = partial(upstream.resolve, image.pulled())
                descriptor, _ = self._patiently("resolved", resolve, seconds)
                journal.emit(events.Resolved(image, descriptor.digest))
            with journal.stage(Stage.BASES):
                unpacking = self._unpacking(choice.backend, parts.builder, root, decision, upstream)
                stack.callback(unpacking.release)
                unpacked = unpacking.unpack(image)
            if unpacked.size_bytes > self._tools.settings.unpacked_bytes:
                journal.warn(f"{image} does not stay: it is larger than unpacked_bytes allows")
            return PulledImage(descriptor.digest, unpacked, unpacking.how(unpacked))

    def _build(self, context: Path) -> BuildRequest:
        """The build that policy is asked about."""
        (context / "Dockerfile").write_text(f"FROM {self._request.image}\n", encoding="utf-8")
        return BuildRequest(
            context=context,
            build_args={},
            platform=self._request.platform,
            builder=self._request.builder,
            untrusted=True,
        )

    def _layouts(self, stack: ExitStack, seconds: int) -> dict[ImageReference, LayoutClient]:
        image, source = self._request.image, self._request.source
        if source is None:
            return {}
        rules = self._tools.settings.base_images
        if rules.offline and not matches_any(rules.local, image.name):
            self._journal.warn(
                f"no build can start from {image} offline: local of [base_images] in config.toml "
                "does not name it"
            )
        client = self._patiently("opened", source.open, seconds)
        return {image: stack.enter_context(closing(client))}

    def _upstream(
        self,
        stack: ExitStack,
        decision: Decision,
        layouts: Mapping[ImageReference, LayoutClient],
    ) -> Upstream:
        upstream = Upstream(
            self._tools.settings,
            self._tools.credentials,
            ReachableSet(decision),
            BlobStore(self._tools.home.base_images),
            fetching=self._journal.fetching,
            local_images=layouts,
        )
        stack.callback(upstream.release)
        stack.callback(upstream.close)
        return upstream

    def _unpacking(
        self,
        backend: Backend,
        builder: Builder,
        root: Installed,
        decision: Decision,
        upstream: Upstream,
    ) -> Unpacking:
        return Unpacking(
            name=f"pull-{new_id()}",
            backend=backend,
            builder=builder,
            root=root,
            decision=decision,
            platform=self._request.platform,
            store=UnpackedStore(self._tools.home.unpacked),
            upstream=upstream,
            journal=self._journal,
            cancellation=self._cancellation,
        )

    def _patiently(self, what: str, work: Callable[[], _T], seconds: int) -> _T:
        late = TimeExceeded(f"{self._request.image} was not {what} in {seconds} s")
        return self._cancellation.waiting(work, seconds, late)

"""Base images before the build: fetched, checked, and unpacked once, in a sandbox of their own.

Every image that this gives to a build was resolved by the build's own session, and its repository
has delivered each blob of it: who knows a private image's digest alone gets nothing. An image that
cannot be unpacked before is pulled by the build itself, through the gateway.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import TypeVar

from builder.model import (
    BASE_NAME,
    DOOR,
    MOST_BASES,
    BaseLayer,
    Builder,
    UnpackedBase,
)
from policies.facts import DockerfileFacts
from policies.model import Decision, Isolation
from policies.reference import Digest, ImageReference
from runner import events, outcome
from runner.bases import BaseParts, WithDocuments, is_sound, parts, read_config
from runner.cancel import Cancellation, side_by_side
from runner.errors import (
    BaseImageCorrupt,
    BaseImageInvalid,
    BuildFailed,
    ImageNotFound,
    LimitExceeded,
    RunnerError,
    SandboxFailed,
    TimeExceeded,
    VerificationFailed,
)
from runner.files import disk_full_is_a_limit
from runner.gateway.upstream import Upstream
from runner.journal import Journal
from runner.layers import Special
from runner.registry.image import LAYER_TYPES, Platform
from runner.stores.rootfs import Installed, missing
from runner.stores.unpacked import Checked, Identity, Unpacked, UnpackedStore
from runner.verify import CheckedLayer, StagedImage, verify
from sandbox.model import Backend, Provided, SandboxSpec

_T = TypeVar("_T")

FETCHED_AT_A_TIME = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Bases:
    """What a build is given.

    Attributes:
        bases: For the builder.
        images: For the sandbox to mount, by where.
        inputs: For the sandbox to have, by name.
        provided: How each image comes.
        vouched: Layers that ``verify`` need not read again.
    """

    bases: tuple[UnpackedBase, ...] = ()
    images: Mapping[str, Path]
    inputs: Mapping[str, Path]
    provided: Mapping[ImageReference, Provided]
    vouched: tuple[CheckedLayer, ...]


class Unpacking:
    """Base images for one build, or for nobody yet."""

    def __init__(
        self,
        *,
        name: str,
        backend: Backend,
        builder: Builder,
        root: Installed,
        decision: Decision,
        platform: str,
        store: UnpackedStore,
        upstream: Upstream,
        journal: Journal,
        cancellation: Cancellation,
    ) -> None:
        """``name`` is the build's; its sandboxes are called after it.

        All that is done here has, from now on, as long as the build itself.
        """
        self._name = name
        self._backend = backend
        self._best = backend.provides(decision.isolation)
        self._builder = builder
        self._root = root
        self._decision = decision
        self._platform = platform
        self._store = store
        self._upstream = upstream
        self._journal = journal
        self._cancellation = cancellation
        self._held = store.hold()
        self._sandboxes = 0
        self._end = time.monotonic() + decision.limits.wall_seconds

    def release(self) -> None:
        """Lets go of the images. May be called twice."""
        self._held.release()

    def provide(self, dockerfile: DockerfileFacts) -> Bases:
        """Every image that the Dockerfile names, where it is resolved and can be had in time.

        Raises:
            BaseImageInvalid: One is not a sound image.
            RegistryError: A repository does not deliver a blob of its image.
            RunnerError: A sandbox is not what it should be, or the build was cancelled.
        """
        return self._bases(self._patiently(partial(self._named, dockerfile)))

    def _patiently(self, work: Callable[[], _T]) -> _T:
        return self._cancellation.waiting(work, self._seconds_left(), self._late())

    def _named(self, dockerfile: DockerfileFacts) -> dict[ImageReference, BaseParts | None]:
        """The parts of each resolved image, fetched; None for what is left to the builder."""
        resolved = self._upstream.resolved()
        left = {stage.image for stage in dockerfile.stages if stage.foreign}
        if self._best is Provided.PULLED:
            left |= set(dockerfile.images)
        named = (image for image in dockerfile.images if image.pulled() in resolved)
        found = {image: self._only_part(image) if image not in left else None for image in named}
        self._fetch([base for base in found.values() if base is not None])
        return found

    def _fetch(self, bases: Sequence[BaseParts]) -> None:
        """Every blob, each from its image's own repository."""
        fetch = self._upstream.fetch
        works = [partial(fetch, base.image, blob) for base in bases for blob in base.blobs]
        side_by_side(works, FETCHED_AT_A_TIME)

    def _bases(self, images: Mapping[ImageReference, BaseParts | None]) -> Bases:
        names: dict[Digest, list[ImageReference]] = {}
        found: dict[Digest, tuple[BaseParts, Unpacked]] = {}
        provided: dict[ImageReference, Provided] = {}
        for image, base in images.items():
            provided[image] = Provided.PULLED
            if base is None:
                continue
            key = base.root.digest
            if key not in found and len(found) < MOST_BASES:
                unpacked = self._unpacked_if_possible(image, base)
                if unpacked is not None:
                    found[key] = base, unpacked
            if key in found:
                names.setdefault(key, []).append(image)
        bases, mounted, inputs = [], {}, {}
        vouched: list[CheckedLayer] = []
        for number, (key, (base, unpacked)) in enumerate(found.items()):
            at = self._builder.base_at(number)
            path = self._held.path(unpacked.packed)
            how = self.how(unpacked)
            packed = f"base-{number}.erofs"
            if how is Provided.MOUNTED:
                mounted[at] = path
            else:
                inputs[packed] = path
            provided.update(dict.fromkeys(names[key], how))
            layers = self._layers(base)
            if unpacked.checked.will_do(self._decision.limits):
                vouched += layers
            bases.append(
                UnpackedBase(
                    config=base.parsed.config.digest,
                    names=tuple(dict.fromkeys(map(_tagged, names[key]))),
                    at=at,
                    packed=None if how is Provided.MOUNTED else f"{DOOR}/{packed}",
                    layers=tuple(BaseLayer(e.digest, e.diff_id, e.compression) for e in layers),
                )
            )
        return Bases(
            bases=tuple(bases),
            images=mounted,
            inputs=inputs,
            provided=provided,
            vouched=tuple(vouched),
        )

    def unpack(self, image: ImageReference) -> Unpacked:
        """``image``, resolved by now, whatever it takes; it stays until ``release``.

        Raises:
            ImageNotFound: It is of other platforms.
            BaseImageInvalid: It is not a sound image, or several.
            RunnerError: It cannot be unpacked.
        """
        base = self._patiently(partial(self._one, image))
        try:
            return self._unpacked(image, base)
        except BuildFailed as error:  # of what packs it; no build is there to fail
            raise SandboxFailed(
                f"{image} could not be unpacked: {error.message}",
                advice="What the sandbox wrote is shown above; runner doctor checks this host.",
            ) from None

    def _one(self, image: ImageReference) -> BaseParts:
        found = self._parts(image)
        if len(found) > 1:
            raise BaseImageInvalid(f"{image} has {len(found)} images for {self._platform}")
        self._fetch(found)
        return found[0]

    def how(self, unpacked: Unpacked) -> Provided:
        """How it comes into a build's sandbox."""
        # gVisor's EROFS refuses files with extended attributes and loses the numbers of devices:
        # a character device without one is a whiteout, and gone.
        mounts = self._best is Provided.MOUNTED and unpacked.mountable
        return Provided.MOUNTED if mounts else Provided.COPIED

    def _only_part(self, image: ImageReference) -> BaseParts | None:
        """The image that every builder takes; None where an index leaves a choice."""
        found = self._parts(image)
        return found[0] if len(found) == 1 else None

    def _parts(self, image: ImageReference) -> list[BaseParts]:
        found = parts(image.pulled(), self._upstream, Platform.parse(self._platform))
        if not found:
            raise ImageNotFound(
                f"{image} has no image for {self._platform}",
                advice="docker buildx imagetools inspect lists the platforms that it has.",
            )
        return found

    def _layers(self, base: BaseParts) -> tuple[CheckedLayer, ...]:
        config = read_config(base, self._upstream)
        return tuple(
            CheckedLayer(layer.digest, layer.size, LAYER_TYPES[layer.media_type], diff_id)
            for layer, diff_id in zip(base.parsed.layers, config.diff_ids, strict=True)
        )

    def _unpacked_if_possible(self, image: ImageReference, base: BaseParts) -> Unpacked | None:
        """None where it cannot be unpacked, which the user is told."""
        try:
            return self._unpacked(image, base)
        except (LimitExceeded, SandboxFailed, BuildFailed) as error:
            self._journal.warn(
                f"{image} could not be unpacked before the build, which pulls it now: "
                f"{error.message}"
            )
            return None

    def _unpacked(self, image: ImageReference, base: BaseParts) -> Unpacked:
        """From the store, or made now."""
        plan = self._builder.unpack(self._platform)
        identity = Identity(
            image=base.root.digest,
            platform=self._platform,
            builder=Digest.of(f"{self._root.digest}\n{plan!r}".encode()),
        )
        if (known := self._store.find(identity, self._held)) is not None:
            return known
        with self._store.turn(identity, partial(self._go_on, image)):
            if (known := self._store.find(identity, self._held)) is not None:
                return known
            return self._make(image, base, identity)

    def _go_on(self, image: ImageReference) -> None:
        """Called while another run unpacks ``image``."""
        self._cancellation.check()
        self._journal.emit(events.Progress(f"wait for whoever unpacks {image}", 0, 0))
        self._seconds_left()

    def _seconds_left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise self._late()
        return left

    def _late(self) -> TimeExceeded:
        seconds = self._decision.limits.wall_seconds
        return TimeExceeded(f"the base images took longer than {seconds} s")

    # -- one image -------------------------------------------------------------------------

    def _make(self, image: ImageReference, base: BaseParts, identity: Identity) -> Unpacked:
        limits = self._decision.limits
        if lacking := missing(self._builder.recipe, self._root.root):
            raise SandboxFailed(
                f"the installed builder has no {lacking[0]}: run `runner builder install`"
            )
        self._journal.emit(events.Unpacking(image))
        try:
            verified = verify(
                StagedImage(base.manifest, WithDocuments(base, self._upstream)),
                limits=limits,
                platform=None,
                claimed=None,
                progress=self._journal.verifying(self._seconds_left()),
            )
        except VerificationFailed as error:
            self._require_undamaged(image, base)
            message = error.message.removesuffix(f" [{error.rule}]")
            raise BaseImageInvalid(f"{image}: {message}", rule=error.rule) from None
        if verified.special is Special.SECURITY:
            # fsck.erofs sets owners last.
            raise BuildFailed("its files have capabilities, which would get lost")
        with (
            tempfile.TemporaryDirectory(dir=self._held.directory) as temporary,
            self._store.arriving() as writer,
        ):
            files = self._files(base, Path(temporary))
            self._run(image, files, self._journal.unpacking(image, writer))
            return self._store.add(
                identity,
                writer,
                self._held,
                name=str(image.explicit()),
                attributes=verified.special is not Special.NOTHING,
                checked=Checked.under(limits),
            )

    def _require_undamaged(self, image: ImageReference, base: BaseParts) -> None:
        """Tells a bad image from one whose blobs, sound when they arrived, are so no more."""
        damaged = [blob.digest for blob in base.blobs if not is_sound(blob, self._upstream)]
        if damaged:
            self._upstream.forget(damaged)
            raise BaseImageCorrupt(
                f"what is kept of {image} was damaged on this host, and is forgotten now",
                advice="Try again: it will be fetched anew.",
            )

    def _files(self, base: BaseParts, temporary: Path) -> dict[str, Path]:
        """What arrives as ``builder.model.BASE``, by names in the sandbox."""
        files = {blob.digest.hex: self._upstream.path(blob.digest) for blob in base.blobs}
        for digest, data in base.documents.items():
            is_root = digest == base.root.digest
            name = "manifest.json" if is_root else f"{digest.hex}.manifest.json"
            files[name] = temporary / name
            with disk_full_is_a_limit(temporary):
                files[name].write_bytes(data)
        return {f"{BASE_NAME}/{name}": path for name, path in files.items()}

    def _run(
        self,
        image: ImageReference,
        inputs: Mapping[str, Path],
        collect: Callable[[memoryview], None],
    ) -> None:
        plan = self._builder.unpack(self._platform)
        spec = SandboxSpec(
            # Whoever is trusted with the Dockerfile did not write the image, and what is made of
            # it here is for everybody's builds.
            isolation=max(self._decision.isolation, Isolation.GVISOR),
            limits=replace(self._decision.limits, wall_seconds=ceil(self._seconds_left())),
            plan=plan,
            root=self._root.root,
            root_digest=self._root.digest,
            inputs=inputs,
            gateway=False,
            rootless=self._decision.grant.rootless,
        )
        log = outcome.LogTail()
        self._sandboxes += 1
        place = self._backend.reserve(f"{self._name}-base-{self._sandboxes}")
        try:
            sandbox = self._backend.launch(place, spec, log.add, collect)
            try:
                with self._cancellation.calling(sandbox.cancel):
                    ended = sandbox.wait()
            finally:
                sandbox.abandon()
            try:
                outcome.require_success(ended, plan, spec.limits, None, log)
            except RunnerError as error:
                self._journal.output(bytes(log))
                if isinstance(error, BuildFailed) and ended.command == plan.build_command:
                    raise BaseImageInvalid(
                        f"{image} cannot be unpacked: {plan.commands[ended.command][0]} ended "
                        f"with {ended.status}"
                    ) from None
                raise
        finally:
            place.release()


def _tagged(image: ImageReference) -> str:
    """A name with a tag, whatever the Dockerfile has: what it names by digest is found by that."""
    if image.digest is not None:
        return f"{image.name}:by-digest-{image.digest.hex[:12]}"
    return str(image.explicit())

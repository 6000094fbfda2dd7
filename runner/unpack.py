"""Base images before the build: fetched, checked, and unpacked once, in a sandbox of their own.

Every image that this gives to a build was resolved by the build's own session, and its repository
has delivered each blob of it: who knows a private image's digest alone gets nothing. An image that
cannot be unpacked before is pulled by the build itself, through the gateway.
"""

import contextlib
import io
import json
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from builder.model import (
    DOOR,
    LAYOUT_IMAGE,
    LAYOUT_NAME,
    MOST_BASES,
    BaseLayer,
    Builder,
    UnpackedBase,
)
from policies.facts import DockerfileFacts
from policies.model import Decision
from policies.reference import Digest, ImageReference
from runner import outcome
from runner.bases import BaseParts, parts, read_config
from runner.cancel import Cancellation
from runner.errors import (
    BaseImageInvalid,
    BuildFailed,
    ImageNotFound,
    LimitExceeded,
    RunnerError,
    SandboxFailed,
    TimeExceeded,
    VerificationFailed,
)
from runner.gateway.upstream import Upstream
from runner.journal import Journal
from runner.registry.image import LAYER_TYPES, Platform
from runner.request import Provided
from runner.stores.blobs import BlobSource
from runner.stores.rootfs import Installed
from runner.stores.unpacked import Checked, Identity, Unpacked, UnpackedStore
from runner.verify import CheckedLayer, StagedImage, verify
from sandbox.model import Backend, SandboxSpec

_T = TypeVar("_T")

FETCHED_AT_A_TIME = 3
_OCI_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


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
        """``name`` is the build's; its sandboxes are called after it."""
        self._name = name
        self._backend = backend
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

    def release(self) -> None:
        """Lets go of the images. May be called twice."""
        self._held.release()

    def provide(self, dockerfile: DockerfileFacts) -> Bases:
        """Every image that the Dockerfile names, where it is resolved and can be had unpacked.

        Raises:
            BaseImageInvalid: One is not a sound image.
            RegistryError: A repository does not deliver a blob of its image.
            RunnerError: A sandbox is not what it should be, or the build was cancelled.
        """
        return self._bases(self._patiently(partial(self._named, dockerfile)))

    def _patiently(self, work: Callable[[], _T]) -> _T:
        seconds = self._decision.limits.wall_seconds
        late = TimeExceeded(f"the base images were not fetched in {seconds} s")
        return self._cancellation.waiting(work, seconds, late)

    def _named(self, dockerfile: DockerfileFacts) -> dict[ImageReference, BaseParts | None]:
        """The parts of each resolved image, fetched; None for what is left to the builder."""
        resolved = self._upstream.resolved()
        foreign = {stage.image for stage in dockerfile.stages if stage.foreign}
        named = (image for image in dockerfile.images if image.pulled() in resolved)
        found = {image: self._only_part(image) if image not in foreign else None for image in named}
        self._fetch([base for base in found.values() if base is not None])
        return found

    def _fetch(self, bases: Sequence[BaseParts]) -> None:
        """Every blob, each from its image's own repository."""
        fetch = self._upstream.fetch
        works = [partial(fetch, base.image, blob) for base in bases for blob in base.blobs]
        _side_by_side(works, FETCHED_AT_A_TIME)

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
        if not found:
            raise ImageNotFound(f"{image} has no image for {self._platform}")
        if len(found) > 1:
            raise BaseImageInvalid(f"{image} has {len(found)} images for {self._platform}")
        self._fetch(found)
        return found[0]

    def how(self, unpacked: Unpacked) -> Provided:
        """How it comes into a build's sandbox."""
        mounts = self._backend.mounts_images() and unpacked.mountable
        return Provided.MOUNTED if mounts else Provided.COPIED

    def _only_part(self, image: ImageReference) -> BaseParts | None:
        """The image that every builder takes; None where an index leaves a choice."""
        found = self._parts(image)
        return found[0] if len(found) == 1 else None

    def _parts(self, image: ImageReference) -> list[BaseParts]:
        return parts(image.pulled(), self._upstream, Platform.parse(self._platform))

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
        identity = Identity(
            image=base.root.digest, platform=self._platform, builder=self._root.digest
        )
        if (known := self._store.find(identity, self._held)) is not None:
            return known
        with self._store.turn(identity, self._cancellation.check):
            if (known := self._store.find(identity, self._held)) is not None:
                return known
            return self._make(image, base, identity)

    # -- one image -------------------------------------------------------------------------

    def _make(self, image: ImageReference, base: BaseParts, identity: Identity) -> Unpacked:
        limits = self._decision.limits
        try:
            verified = verify(
                StagedImage(base.manifest, _Documents(base.documents, self._upstream)),
                limits=limits,
                platform=None,
                claimed=None,
                progress=self._journal.verifying(limits.wall_seconds),
            )
        except VerificationFailed as error:
            raise BaseImageInvalid(f"{image}: {error.message}") from None
        with (
            tempfile.TemporaryDirectory(prefix="runner-layout-") as temporary,
            self._store.arriving() as writer,
        ):
            inputs = self._layout(base, Path(temporary))
            self._run(image, inputs, self._journal.unpacking(image, writer))
            return self._store.add(
                identity,
                writer,
                self._held,
                name=str(image.explicit()),
                attributes=verified.attributes,
                checked=Checked.under(limits),
            )

    def _layout(self, base: BaseParts, temporary: Path) -> dict[str, Path]:
        """The files of an OCI layout, by their names in the sandbox."""
        entry = {
            "mediaType": base.root.media_type,
            "digest": base.root.digest,
            "size": base.root.size,
            "annotations": {"org.opencontainers.image.ref.name": LAYOUT_IMAGE},
        }
        written = {
            "oci-layout": _OCI_LAYOUT,
            "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
        } | {_blob(digest): data for digest, data in base.documents.items()}
        files = {_blob(blob.digest): self._upstream.path(blob.digest) for blob in base.blobs}
        for number, (name, data) in enumerate(written.items()):
            files[name] = temporary / str(number)
            files[name].write_bytes(data)
        return {f"{LAYOUT_NAME}/{name}": path for name, path in files.items()}

    def _run(
        self,
        image: ImageReference,
        inputs: Mapping[str, Path],
        collect: Callable[[memoryview], None],
    ) -> None:
        plan = self._builder.unpack(self._platform)
        spec = SandboxSpec(
            isolation=self._decision.isolation,
            limits=self._decision.limits,
            plan=plan,
            root=self._root.root,
            inputs=inputs,
            gateway=False,
        )
        log = outcome.LogTail()
        self._sandboxes += 1
        place = self._backend.reserve(f"{self._name}-base-{self._sandboxes}")
        try:
            sandbox = self._backend.launch(place, spec, log.add, collect)
            with self._cancellation.calling(sandbox.cancel):
                ended = sandbox.wait()
            try:
                outcome.require_success(ended, plan, self._decision.limits, None, log)
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


def _side_by_side(works: Sequence[Callable[[], None]], at_a_time: int) -> None:
    """Does all of it, and raises the first error. Threads that hang are left alone."""
    waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for work in works:
        waiting.put(work)

    def run() -> None:
        while not waiting.empty():
            with contextlib.suppress(queue.Empty):
                work = waiting.get_nowait()
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 - raised by whoever waits
                    ended.put(error)
                else:
                    ended.put(None)

    for _ in range(min(at_a_time, len(works))):
        threading.Thread(target=run, name="fetch", daemon=True).start()
    for _ in works:
        if (error := ended.get()) is not None:
            raise error


def _blob(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.hex}"


def _tagged(image: ImageReference) -> str:
    """A name with a tag, whatever the Dockerfile has: what it names by digest is found by that."""
    if image.digest is not None:
        return f"{image.name}:by-digest-{image.digest.hex[:12]}"
    return str(image.explicit())


class _Documents:
    """Manifests from memory and all other blobs from where they were fetched, as one source."""

    def __init__(self, documents: Mapping[Digest, bytes], blobs: BlobSource) -> None:
        self._documents = documents
        self._blobs = blobs

    def size(self, digest: Digest) -> int | None:
        document = self._documents.get(digest)
        return len(document) if document is not None else self._blobs.size(digest)

    def open(self, digest: Digest) -> BinaryIO:
        document = self._documents.get(digest)
        return io.BytesIO(document) if document is not None else self._blobs.open(digest)

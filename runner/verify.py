"""The trust boundary: hostile bytes go in, a ``VerifiedImage`` comes out, or an error.

``ImageVerifier`` is a pure state machine (in the manner of python-tuf's trusted metadata set);
``verify`` is the driver that reads the blobs for it. Whatever publishes or writes images takes
a ``VerifiedImage`` and nothing else, and no one else can make one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass
from types import MappingProxyType

from policies.model import Limits
from policies.reference import Digest
from runner.errors import VerificationFailed
from runner.hashed import blob_chunks, check_whole
from runner.layercheck import LayerCheck
from runner.layers import Special
from runner.registry.image import (
    CONFIG_BYTES,
    INDEX_TYPES,
    LAYER_TYPES,
    MANIFEST_BYTES,
    MANIFEST_TYPES,
    Config,
    Descriptor,
    Index,
    Manifest,
    Platform,
    parse_config,
    parse_document,
)
from runner.stores.blobs import BlobSource

_KEY = object()
_DEFAULT_VARIANTS = {"arm": "v7", "arm64": "v8", "amd64": "v1"}
"""What an image without a variant is taken for, as containerd does."""


@dataclass(frozen=True, slots=True)
class StagedImage:
    """What arrived: a root, and a place where all blobs, manifests too, are found by digest."""

    root: Descriptor
    blobs: BlobSource


@dataclass(frozen=True, slots=True)
class CheckedLayer:
    """A layer that ``LayerCheck`` found sound.

    Attributes:
        compression: ``gzip``, ``zstd`` or nothing: how it was read.
    """

    digest: Digest
    size: int
    compression: str
    diff_id: Digest


@dataclass(frozen=True, slots=True)
class VerifiedImage:
    """An image of which every byte was hashed and every rule of ``ImageVerifier`` holds.

    Attributes:
        root: The manifest or index.
        documents: Bytes of every manifest and index, the root included.
        media_types: Of every one of ``documents``.
        blobs_needed: Configurations and layers, each once, in order.
        source: Where those blobs were read, and can be read again.
        platforms: Such as ``linux/amd64``, as the configurations say.
        special: The most special thing in its layers.
    """

    root: Descriptor
    documents: Mapping[Digest, bytes]
    media_types: Mapping[Digest, str]
    blobs_needed: tuple[Descriptor, ...]
    source: BlobSource
    platforms: tuple[str, ...]
    special: Special
    _: KW_ONLY
    key: InitVar[object] = None

    def __post_init__(self, key: object) -> None:
        if key is not _KEY:
            raise TypeError("only runner.verify makes a VerifiedImage")

    @property
    def size_bytes(self) -> int:
        """Of all that a registry stores of it."""
        documents = sum(map(len, self.documents.values()))
        return documents + sum(blob.size for blob in self.blobs_needed)

    def begins_with(self, layers: tuple[Digest, ...]) -> bool:
        """Whether ``layers``, from the lowest, are the lowest ones of every image in it."""
        found = (parse_document(data, self.media_types[d]) for d, data in self.documents.items())
        images = [document for document in found if isinstance(document, Manifest)]
        return all(
            tuple(layer.digest for layer in image.layers[: len(layers)]) == layers
            for image in images
        )

    @property
    def layers(self) -> int:
        """Each counted once, of however many images it is a part."""
        return sum(blob.media_type in LAYER_TYPES for blob in self.blobs_needed)


class ImageVerifier:
    """Checks one image, document by document and layer by layer. Does no I/O.

    Driven in this order: ``document`` for all of ``documents_wanted`` (which grows once the
    root is known to be an index), ``config`` for all of ``configs_wanted``, ``layer`` for all of
    ``layers_wanted``, then ``verified``. What is called out of order raises RuntimeError.

    Rules, each the ``rule`` of the VerificationFailed that it raises:

    Bytes:
        blob-missing: Every blob named is there.
        blob-size, blob-digest: It has the size and the digest that its descriptor says.
        claimed-digest: The builder's claim, if it made one, is the root's digest.
        descriptor-conflict: One digest has one size and one role throughout the image.

    Documents:
        document-size, json, duplicate-key: Bounded, strict JSON that all readers read alike.
        schema, schema-version, digest, size: Each member is what the specification says.
        media-type, media-type-confusion: A document is what its descriptor says, and it alone.
        foreign-layer, embedded-data: All bytes are blobs of this image.
        subject, attestation: An image, and no statement about another one.
        nested-index, manifest-count, layer-count: Bounded, and an index holds images only.
        platform: As asked; and each entry of an index agrees with its configuration.
        diff-id-count: As many diff ids as layers.

    Layers:
        layer-stream, layer-members: Sound gzip, zstd or plain, nothing behind it.
        layer-bytes, layer-inflation: Within the limits when decompressed.
        diff-id: The decompressed bytes have the digest that the configuration says.
        tar-header, tar-type, tar-size, tar-pax, tar-sparse, tar-truncated, tar-trailing: A tar
            archive that all readers read alike (``runner.layers``).
        entry-count, entry-path-length: Within the limits.
        entry-escape, hard-link-escape: No absolute path, no ``..``; symbolic links lead anywhere.
    """

    def __init__(
        self,
        root: Descriptor,
        *,
        limits: Limits,
        platform: str | None = None,
        claimed: Digest | None = None,
        vouched: Iterable[CheckedLayer] = (),
    ) -> None:
        if claimed is not None and claimed != root.digest:
            raise VerificationFailed(
                f"the builder claims {claimed}, but {root.digest} arrived", rule="claimed-digest"
            )
        if root.media_type not in MANIFEST_TYPES + INDEX_TYPES:
            raise VerificationFailed(
                f"{ascii(root.media_type)[:200]} is no manifest or index", rule="media-type"
            )
        self._root = root
        self._limits = limits
        self._platform = platform
        self._known: dict[Digest, tuple[Descriptor, str]] = {}  # and the role
        self._documents: dict[Digest, bytes] = {}
        self._manifests: dict[Digest, Manifest] = {}
        self._stated_platforms: list[tuple[Digest, Platform]] = []
        self._configs: dict[Digest, Config] = {}
        self._diff_ids: dict[Digest, Digest] = {}
        self._layers_done: dict[Digest, Special] = {}
        self._vouched = frozenset(vouched)
        self._claim(root, "document", MANIFEST_BYTES)

    @property
    def documents_wanted(self) -> tuple[Descriptor, ...]:
        return self._of_role("document", self._documents)

    @property
    def configs_wanted(self) -> tuple[Descriptor, ...]:
        return self._of_role("config", self._configs)

    @property
    def layers_wanted(self) -> tuple[Descriptor, ...]:
        return self._of_role("layer", self._layers_done)

    def document(self, descriptor: Descriptor, data: bytes) -> None:
        """The bytes of one of ``documents_wanted``."""
        _expect(descriptor in self.documents_wanted)
        check_whole(descriptor, data)
        parsed = parse_document(data, descriptor.media_type)
        if parsed.subject is not None:
            raise VerificationFailed(
                "a manifest about another one; builds publish images only", rule="subject"
            )
        if isinstance(parsed, Index):
            self._take_index(parsed)
        else:
            self._take_manifest(descriptor.digest, parsed)
        self._documents[descriptor.digest] = data

    def config(self, descriptor: Descriptor, data: bytes) -> None:
        """The bytes of one of ``configs_wanted``, once every document is known."""
        _expect(not self.documents_wanted and descriptor in self.configs_wanted)
        check_whole(descriptor, data)
        config = parse_config(data)
        for manifest in self._manifests.values():
            if manifest.config.digest == descriptor.digest:
                self._pair_layers(manifest, config)
        self._configs[descriptor.digest] = config
        if not self.configs_wanted:
            self._check_platforms()

    def layer(self, descriptor: Descriptor) -> "LayerCheck":
        """A check to feed with one of ``layers_wanted``, once every configuration is known."""
        _expect(
            not (self.documents_wanted or self.configs_wanted) and descriptor in self.layers_wanted
        )
        diff_id = self._diff_ids[descriptor.digest]
        return LayerCheck(descriptor, diff_id, self._limits, self._layers_done.__setitem__)

    def verified(self, source: BlobSource) -> VerifiedImage:
        """The image, once nothing is wanted any more; ``source`` is where its blobs were read."""
        _expect(not (self.documents_wanted or self.configs_wanted or self.layers_wanted))
        self._check_platforms()  # again, lest somebody went on after the first error
        known = self._known
        return VerifiedImage(
            root=self._root,
            documents=MappingProxyType(dict(self._documents)),
            media_types=MappingProxyType({d: known[d][0].media_type for d in self._documents}),
            blobs_needed=tuple(d for d, role in known.values() if role != "document"),
            source=source,
            platforms=tuple(dict.fromkeys(str(p) for p in self._real_platforms().values())),
            special=max(self._layers_done.values(), default=Special.NOTHING),
            key=_KEY,
        )

    def _of_role(self, role: str, done: Mapping[Digest, object]) -> tuple[Descriptor, ...]:
        known = self._known.values()
        return tuple(d for d, its_role in known if its_role == role and d.digest not in done)

    def _claim(self, descriptor: Descriptor, role: str, most_bytes: int) -> None:
        """Notes that the image needs these bytes; the same bytes twice are needed once."""
        if descriptor.size > most_bytes:
            raise VerificationFailed(
                f"{descriptor.digest} of {descriptor.size} bytes, at most {most_bytes} are read",
                rule="size" if role == "layer" else "document-size",
            )
        known, known_role = self._known.setdefault(descriptor.digest, (descriptor, role))
        if (
            known_role != role
            or known.size != descriptor.size
            or _reading(known) != _reading(descriptor)
        ):
            raise VerificationFailed(
                f"{descriptor.digest} is described in two ways", rule="descriptor-conflict"
            )

    def _take_index(self, index: Index) -> None:
        if not index.manifests:
            raise VerificationFailed("an index of nothing", rule="manifest-count")
        for entry in index.manifests:
            if entry.is_attestation:
                raise VerificationFailed("an attestation in the index", rule="attestation")
            self._claim(entry.descriptor, "document", MANIFEST_BYTES)
            if entry.platform:
                self._stated_platforms.append((entry.descriptor.digest, entry.platform))

    def _take_manifest(self, digest: Digest, manifest: Manifest) -> None:
        if len(manifest.layers) > self._limits.layers:
            raise VerificationFailed(
                f"{len(manifest.layers)} layers, at most {self._limits.layers}", rule="layer-count"
            )
        self._claim(manifest.config, "config", CONFIG_BYTES)
        for layer in manifest.layers:
            self._claim(layer, "layer", self._limits.layer_bytes)
        self._manifests[digest] = manifest

    def _pair_layers(self, manifest: Manifest, config: Config) -> None:
        if len(manifest.layers) != len(config.diff_ids):
            raise VerificationFailed(
                f"{len(manifest.layers)} layers, {len(config.diff_ids)} diff ids",
                rule="diff-id-count",
            )
        for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
            if self._diff_ids.setdefault(layer.digest, diff_id) != diff_id:
                raise VerificationFailed(f"two diff ids for {layer.digest}", rule="diff-id")
            compression = LAYER_TYPES[layer.media_type]
            if CheckedLayer(layer.digest, layer.size, compression, diff_id) in self._vouched:
                self._layers_done[layer.digest] = Special.NOTHING

    def _real_platforms(self) -> dict[Digest, Platform]:
        """Of each manifest, in the order of the index."""
        return {
            digest: self._configs[manifest.config.digest].platform
            for digest, manifest in self._manifests.items()
        }

    def _check_platforms(self) -> None:
        real = self._real_platforms()
        for digest, stated in self._stated_platforms:
            if not stated.agrees_with(real[digest]):
                raise VerificationFailed(
                    f"the index says {stated}, the image {real[digest]}", rule="platform"
                )
        if self._platform is not None and not any(
            _is_platform(self._platform, platform) for platform in real.values()
        ):
            found = ", ".join(map(str, real.values()))
            raise VerificationFailed(
                f"asked for {ascii(self._platform)[1:-1]}, this image is for {found}",
                rule="platform",
            )


def verify(
    staged: StagedImage,
    *,
    limits: Limits,
    platform: str | None,
    claimed: Digest | None,
    progress: Callable[[int], None] | None = None,
    vouched: Iterable[CheckedLayer] = (),
) -> VerifiedImage:
    """Reads the whole image, once, and checks it.

    Args:
        staged: What arrived, or what a registry has.
        limits: Those on layers count here.
        platform: ``OS/ARCHITECTURE[/VARIANT]`` that must be among the image's, or None.
        claimed: The root's digest as the builder tells it, or None.
        progress: Told how many bytes were read since the last call. May raise to cancel.
        vouched: Layers that were checked before, under limits as strict, and are there by their
            digests since: they are not read again.

    Raises:
        VerificationFailed: A rule of ``ImageVerifier`` is broken.
    """
    verifier = ImageVerifier(
        staged.root,
        limits=limits,
        platform=platform,
        claimed=claimed,
        vouched=(layer for layer in vouched if staged.blobs.size(layer.digest) == layer.size),
    )

    def chunks(descriptor: Descriptor) -> Iterator[bytes]:
        for chunk in blob_chunks(staged.blobs, descriptor):
            if progress:
                progress(len(chunk))
            yield chunk

    while wanted := verifier.documents_wanted:
        for descriptor in wanted:
            verifier.document(descriptor, b"".join(chunks(descriptor)))
    for descriptor in verifier.configs_wanted:
        verifier.config(descriptor, b"".join(chunks(descriptor)))
    for descriptor in verifier.layers_wanted:
        check = verifier.layer(descriptor)
        for chunk in chunks(descriptor):
            check.feed(chunk)
        check.finish()
    return verifier.verified(staged.blobs)


def _expect(in_order: bool) -> None:
    if not in_order:
        raise RuntimeError("the verifier was driven out of order")


def _reading(descriptor: Descriptor) -> str:
    """What the media type means for the reader; OCI and Docker have two names for most."""
    return LAYER_TYPES.get(descriptor.media_type, descriptor.media_type)


def _is_platform(asked: str, found: Platform) -> bool:
    os, _, rest = asked.partition("/")
    architecture, _, variant = rest.partition("/")
    if (os, architecture) != (found.os, found.architecture):
        return False
    return variant in {"", found.variant or _DEFAULT_VARIANTS.get(architecture, "")}

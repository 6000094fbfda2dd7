"""Images as documents: media types, descriptors, manifests, indexes and configurations.

The OCI image specification 1.1 and Docker's image manifest version 2, schema 2. Everything here
is read from hostile bytes: what is refused is refused with ``VerificationFailed`` and a rule that
``runner.verify`` lists. Unknown members are left alone, within the bounds of ``strictjson``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from builder.bases import BaseImage
from policies.reference import Digest
from runner.errors import VerificationFailed
from runner.registry import strictjson
from runner.registry.strictjson import JsonObject, as_digest

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_LIST)
CONFIG_TYPES = (OCI_CONFIG, DOCKER_CONFIG)
LAYER_TYPES = {
    "application/vnd.oci.image.layer.v1.tar": "",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
}
"""Media type of a layer to its compression. Foreign layers are not among them."""
FOREIGN_WORDS = ("nondistributable", "foreign")

MANIFEST_BYTES = 4 << 20
"""The distribution specification asks registries to accept at least this much."""
CONFIG_BYTES = 8 << 20
MANIFESTS = 64
"""In one index. The widest official images list some 20, and as many attestations."""
CONFIG_TEXTS = 2000
"""In the environment, or of ONBUILD instructions."""
LAYERS = 127
"""In one manifest; overlay file systems mount no more, and ``Limits.layers`` may ask for less."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest says of some bytes: a claim, until they were hashed."""

    media_type: str
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on.

    >>> str(Platform("linux", "arm", "v7"))
    'linux/arm/v7'
    """

    os: str
    architecture: str
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of ``OS/ARCHITECTURE[/VARIANT]``."""
        system, _, rest = text.partition("/")
        architecture, _, variant = rest.partition("/")
        return cls(system, architecture, variant or None)

    def agrees_with(self, other: "Platform") -> bool:
        """Whether both name the same; a variant counts where both have one."""
        return (self.os, self.architecture) == (other.os, other.architecture) and (
            self.variant == other.variant or None in {self.variant, other.variant}
        )

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


@dataclass(frozen=True, slots=True)
class Manifest:
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One image, or, on the platform ``unknown``, what BuildKit attests of another entry."""

    descriptor: Descriptor
    platform: Platform | None = None

    @property
    def is_attestation(self) -> bool:
        return self.platform is not None and self.platform.os == "unknown"


@dataclass(frozen=True, slots=True)
class Index:
    manifests: tuple[IndexEntry, ...]
    subject: Descriptor | None = None


@dataclass(frozen=True, slots=True)
class Config:
    architecture: str
    os: str
    variant: str | None
    diff_ids: tuple[Digest, ...]

    @property
    def platform(self) -> Platform:
        return Platform(self.os, self.architecture, self.variant)


def parse_document(data: bytes, media_type: str) -> Manifest | Index:
    """A manifest or an index, whichever ``media_type`` (of the descriptor or header) says."""
    if media_type in INDEX_TYPES:
        return parse_index(data, media_type)
    return parse_manifest(data, media_type)


def parse_manifest(data: bytes, media_type: str) -> Manifest:
    """The manifest of one image.

    Raises:
        VerificationFailed: It is none, or not soundly one.
    """
    document = _document(data, media_type, MANIFEST_TYPES)
    _refuse_members(document, "manifests", "fsLayers")
    document.only_spelled("schemaVersion", "mediaType", "config", "layers", "subject", "manifests")
    config = _descriptor(document.child("config"), CONFIG_TYPES)
    _refuse_count(len(document.array("layers")), LAYERS, "layer-count")
    layers = tuple(_descriptor(item, tuple(LAYER_TYPES)) for item in document.children("layers"))
    return Manifest(config, layers, _subject(document))


def parse_index(data: bytes, media_type: str) -> Index:
    """The manifests of one image for several platforms. An index in an index is refused.

    Raises:
        VerificationFailed: It is none, or not soundly one.
    """
    document = _document(data, media_type, INDEX_TYPES)
    _refuse_members(document, "config", "layers", "fsLayers")
    document.only_spelled("schemaVersion", "mediaType", "manifests", "subject", "config", "layers")
    _refuse_count(len(document.array("manifests")), MANIFESTS, "manifest-count")
    return Index(tuple(_entries(document)), _subject(document))


def parse_config(data: bytes) -> Config:
    """What of an image's configuration has to agree with its manifest and layers.

    Raises:
        VerificationFailed: It is none, or not soundly one.
    """
    document = strictjson.parse(data, most_bytes=CONFIG_BYTES)
    document.only_spelled("architecture", "os", "variant", "rootfs")
    rootfs = document.child("rootfs")
    rootfs.only_spelled("type", "diff_ids")
    if rootfs.text("type") != "layers":
        raise VerificationFailed("rootfs is not of type layers", rule="schema")
    diff_ids = rootfs.array("diff_ids")
    _refuse_count(len(diff_ids), LAYERS, "layer-count")
    return Config(
        architecture=document.word("architecture"),
        os=document.word("os"),
        variant=document.optional_word("variant"),
        diff_ids=tuple(as_digest(item, "rootfs: diff_ids") for item in diff_ids),
    )


def parse_base(data: bytes) -> BaseImage:
    """What a build that starts from the image inherits, from its configuration.

    Raises:
        VerificationFailed: It is none, or not soundly one.
    """
    document = strictjson.parse(data, most_bytes=CONFIG_BYTES)
    document.only_spelled("config")
    if not document.given("config"):
        return BaseImage({}, ())
    config = document.child("config")
    config.only_spelled("Env", "OnBuild")
    environment = dict(text.partition("=")[::2] for text in _texts(config, "Env"))
    return BaseImage(environment, _texts(config, "OnBuild"))


def _texts(config: JsonObject, name: str) -> tuple[str, ...]:
    texts = config.array(name) if config.given(name) else []
    if not all(isinstance(text, str) for text in texts):
        raise VerificationFailed(f"{name} is not a list of texts", rule="schema")
    _refuse_count(len(texts), CONFIG_TEXTS, "schema")
    return tuple(texts)


def _document(data: bytes, media_type: str, kinds: tuple[str, ...]) -> JsonObject:
    if media_type not in kinds:
        raise VerificationFailed(f"{ascii(media_type)[:200]} is not of {kinds}", rule="media-type")
    document = strictjson.parse(data, most_bytes=MANIFEST_BYTES)
    if document.integer("schemaVersion") != 2:  # noqa: PLR2004 - the number is its name
        raise VerificationFailed("schemaVersion is not 2", rule="schema-version")
    # OCI lets mediaType be absent, Docker does not; registries guess differently without one.
    own = document.text("mediaType") if "mediaType" in document else kinds[0]
    if own != media_type:
        raise VerificationFailed(
            f"a document that calls itself {ascii(own)[:200]} arrived as {media_type}",
            rule="media-type",
        )
    return document


def _refuse_members(document: JsonObject, *names: str) -> None:
    """One reader's manifest must not be another reader's index (GHSA-77vh-xpmg-72qh)."""
    for name in names:
        if name in document:
            raise VerificationFailed(
                f"{name} is no member of this kind of document", rule="media-type-confusion"
            )


def _refuse_count(count: int, most: int, rule: str) -> None:
    if count > most:
        raise VerificationFailed(f"{count} of at most {most}", rule=rule)


def _subject(document: JsonObject) -> Descriptor | None:
    if "subject" not in document:
        return None
    return _descriptor(document.child("subject"), MANIFEST_TYPES + INDEX_TYPES)


def _entries(document: JsonObject) -> Iterator[IndexEntry]:
    for item in document.children("manifests"):
        descriptor = _descriptor(item, MANIFEST_TYPES + INDEX_TYPES)
        if descriptor.media_type in INDEX_TYPES:
            raise VerificationFailed("an index within an index", rule="nested-index")
        item.only_spelled("platform")
        yield IndexEntry(
            descriptor, _platform(item.child("platform")) if "platform" in item else None
        )


def _platform(item: JsonObject) -> Platform:
    item.only_spelled("os", "architecture", "variant")
    return Platform(item.word("os"), item.word("architecture"), item.optional_word("variant"))


def _descriptor(item: JsonObject, kinds: tuple[str, ...]) -> Descriptor:
    item.only_spelled("mediaType", "digest", "size", "urls", "data")
    media_type = item.text("mediaType")
    if "urls" in item or any(word in media_type for word in FOREIGN_WORDS):
        raise VerificationFailed(
            "a layer that lies elsewhere; its bytes cannot be vouched for", rule="foreign-layer"
        )
    if media_type not in kinds:
        raise VerificationFailed(
            f"{ascii(media_type)[:200]} where one of {', '.join(kinds)} belongs", rule="media-type"
        )
    if "data" in item:  # a second copy that some readers prefer to the blob
        raise VerificationFailed("a descriptor with embedded data", rule="embedded-data")
    size = item.integer("size")
    if size < 0:
        raise VerificationFailed(f"a size of {size}", rule="size")
    return Descriptor(media_type, item.digest("digest"), size)

"""A builder's root filesystem as one file: an image that hosts without a registry can be given.

The image has one layer, with nothing in it but files, directories and symbolic links of root. It
is not compressed: each version of zlib packs differently, and the same tree has to give the same
file on every host. Nothing of it says when or where it was made.

What arrives is as hostile as any image. It goes through ``runner.verify``, and its layer through
``Plain``: whatever ``export`` would not write is refused.
"""

import hashlib
import io
import json
import re
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from builder.model import Builder
from builder.rootfs import Recipe
from policies.model import Limits
from policies.reference import Digest, ImageReference
from runner.errors import (
    BuilderInstallFailed,
    ImageNotFound,
    LayoutInvalid,
    VerificationFailed,
)
from runner.hashed import hashed_chunks
from runner.inflate import inflated
from runner.output import Output, write_output
from runner.pieces import stream_of
from runner.registry import strictjson
from runner.registry.archive import LayoutArchive
from runner.registry.image import (
    CONFIG_BYTES,
    INDEX_TYPES,
    LAYER_TYPES,
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    parse_manifest,
)
from runner.registry.layout import LayoutClient
from runner.stores.blobs import CHUNK_BYTES
from runner.stores.plant import plant
from runner.stores.rootfs import Installed, RootfsStore, walk
from runner.verify import StagedImage, VerifiedImage, verify

BUILDER = "runner.builder"
VERSION = "runner.builder.version"
RECIPE = "runner.builder.recipe"
TREE = "runner.builder.tree"
"""Labels of the image. TREE is the digest that the store knows the root filesystem by."""

Layer = Callable[[], Iterator[bytes]]
"""Gives the bytes of a tar, the same ones each time."""
_PLAIN_TAR = "application/vnd.oci.image.layer.v1.tar"
_PLATFORM = {"os": "linux", "architecture": "amd64"}
"""The only one that builders run on yet."""
_ANY = ImageReference("archive.invalid", "builder", "latest")
"""Stands for the only image of an archive; no such host exists."""
_VERSION = re.compile(r"[\x20-\x7e]{1,128}")
_ADVICE = "`runner builder export` writes what can be imported."
_FOREIGN = "`runner builder install --image oci:DIR` takes any image, and unpacks it in a sandbox."


# -- out -------------------------------------------------------------------------------------


def export(recipe: Recipe, installed: Installed, output: Output) -> Digest:
    """Writes the root filesystem, which the caller has verified, and returns the image's digest.

    Raises:
        OutputInvalid: Something is there already, or cannot be written there.
        DiskExceeded: The file system is full.
        VerificationFailed: The tree changed meanwhile.
    """
    image = packed(recipe, installed)
    write_output(image, output, None)
    return image.root.digest


def packed(recipe: Recipe, installed: Installed, *over: Layer) -> VerifiedImage:
    """The root filesystem as an image, with other layers over it where there are any.

    The image is what lies on the disk: it is read when it is written somewhere.

    Raises:
        VerificationFailed: The tree changed meanwhile.
    """
    labels = {
        BUILDER: installed.name,
        VERSION: installed.version,
        RECIPE: recipe.digest,
        TREE: installed.digest,
    }
    image = _Packed(labels, (partial(tree_layer, installed.root), *over))
    return verify(StagedImage(image.root, image), limits=Limits(), platform=None, claimed=None)


class _Packed:
    """Trees as the blobs of an image. A layer is made anew each time it is read."""

    def __init__(self, labels: Mapping[str, str], layers: Sequence[Layer]) -> None:
        described = [_described(_PLAIN_TAR, layer()) for layer in layers]
        self._layers = {each.digest: layer for each, layer in zip(described, layers, strict=True)}
        self._sizes = {each.digest: each.size for each in described}
        config = {
            **_PLATFORM,
            "created": "1970-01-01T00:00:00Z",
            "config": {"Labels": labels},
            "rootfs": {"type": "layers", "diff_ids": [each.digest for each in described]},
        }
        self._documents: dict[Digest, bytes] = {}
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": _as_json(self._document(OCI_CONFIG, config)),
            "layers": [_as_json(each) for each in described],
        }
        self.root = self._document(OCI_MANIFEST, manifest)

    def size(self, digest: Digest) -> int | None:
        return self._sizes.get(digest)

    def open(self, digest: Digest) -> BinaryIO:
        if digest in self._layers:
            return stream_of(self._layers[digest]())
        return io.BytesIO(self._documents[digest])

    def _document(self, media_type: str, value: Mapping[str, Any]) -> Descriptor:
        data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        descriptor = _described(media_type, iter([data]))
        self._documents[descriptor.digest] = data
        self._sizes[descriptor.digest] = descriptor.size
        return descriptor


def _described(media_type: str, chunks: Iterator[bytes]) -> Descriptor:
    total, size = hashlib.sha256(), 0
    for chunk in chunks:
        total.update(chunk)
        size += len(chunk)
    return Descriptor(media_type, Digest(f"sha256:{total.hexdigest()}"), size)


def _as_json(descriptor: Descriptor) -> dict[str, str | int]:
    return {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    }


def tree_layer(root: Path) -> Iterator[bytes]:
    """The tree as a tar: sorted, of root, of 1970. The same tree gives the same bytes."""
    for path, status in walk(root):
        member = tarfile.TarInfo(path)
        member.mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISDIR(status.st_mode):
            member.type = tarfile.DIRTYPE
        elif stat.S_ISLNK(status.st_mode):
            member.type, member.mode = tarfile.SYMTYPE, 0o777
            member.linkname = str((root / path).readlink())
        else:
            member.size = status.st_size
        yield member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        if member.isreg():
            with (root / path).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
            yield bytes(-member.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


# -- in --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderImage:
    """A verified image that says of itself that it is a builder's root filesystem.

    Attributes:
        builder: Its name.
        version: For people.
        tree: Digest that the installed tree must have; None where the image does not tell.
    """

    image: VerifiedImage
    layer: Descriptor
    builder: str
    version: str
    tree: Digest | None

    @property
    def digest(self) -> Digest:
        return self.image.root.digest


@contextmanager
def opened(path: Path, digest: Digest | None) -> Iterator[BuilderImage]:
    """The builder's image in an archive, verified; its layer can be read while the block runs.

    Args:
        path: Of a tar of an OCI layout.
        digest: What the image must have, as somebody vouches for it; None for any.

    Raises:
        ImageNotFound: There is no such file.
        LayoutInvalid: It is no sound image of a builder, or not the one that was vouched for.
    """
    try:
        with closing(LayoutArchive(path)) as archive:
            yield _read(archive, digest)
    except (ImageNotFound, LayoutInvalid) as error:
        error.advice = _ADVICE
        raise
    except VerificationFailed as error:
        raise LayoutInvalid(f"{path}: {error.message}", advice=_ADVICE) from None


def install(store: RootfsStore, builder: Builder, found: BuilderImage, source: str) -> Installed:
    """Makes ``found`` the root filesystem of ``builder``, or leaves all as it was.

    Raises:
        BuilderInstallFailed: It lacks what the builder needs, or holds more than an export would.
        VerificationFailed: Its bytes changed since it was verified.
    """

    def make(root: Path) -> str:
        chunks = hashed_chunks(found.image.source, found.layer)
        tar = inflated(chunks, LAYER_TYPES[found.layer.media_type])
        plant(tar, root, check=Plain().check)
        return found.version

    return store.install(
        builder.name, builder.recipe, f"{source}@{found.digest}", make, expected=found.tree
    )


class Plain:
    """Refuses what ``export`` would not write, and what two readers might take differently.

    That is devices, FIFOs, whiteouts, other owners than root, other modes than an installed tree
    has (setuid among them), and a name that comes twice.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def check(self, member: tarfile.TarInfo) -> None:
        """Raises BuilderInstallFailed."""
        name = "/".join(part for part in member.name.split("/") if part not in {"", "."})
        reason = _not_plain(member)
        if name in self._seen:
            reason = "comes twice"
        elif any(part.startswith(".wh.") for part in name.split("/")):
            reason = "is a whiteout"
        if reason:
            raise BuilderInstallFailed(
                f"no plain archive of a builder: {member.name[:200]!a} {reason}", advice=_FOREIGN
            )
        self._seen.add(name)


def _not_plain(member: tarfile.TarInfo) -> str | None:
    modes = {0o755} if member.isdir() else {0o755, 0o644}
    mode = stat.S_IMODE(member.mode)  # Docker writes the file's type beside it
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        return f"is of type {member.type!a}"
    if (member.uid, member.gid) != (0, 0):
        return f"belongs to {member.uid}:{member.gid}"
    if (member.isreg() or member.isdir()) and mode not in modes:
        return f"has mode {mode:o}"
    return None


class _ArchiveBlobs:
    """An archive in the shape that the verifier reads."""

    def __init__(self, archive: LayoutArchive) -> None:
        self._archive = archive

    def size(self, digest: Digest) -> int | None:
        return self._archive.size(_name(digest))

    def open(self, digest: Digest) -> BinaryIO:
        if self.size(digest) is None:
            raise FileNotFoundError(digest)
        return self._archive.open(_name(digest))


def _name(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.hex}"


def _read(archive: LayoutArchive, digest: Digest | None) -> BuilderImage:
    root, data = LayoutClient(archive).manifest(_ANY)
    if digest not in {None, root.digest}:
        raise VerificationFailed(f"it holds {root.digest}, and {digest} was asked for")
    if root.media_type in INDEX_TYPES:
        raise VerificationFailed("an index, where one image belongs")
    staged = StagedImage(root, _ArchiveBlobs(archive))
    platform = "{os}/{architecture}".format(**_PLATFORM)
    image = verify(staged, limits=Limits(), platform=platform, claimed=digest)
    manifest = parse_manifest(data, root.media_type)
    if len(manifest.layers) != 1:
        raise VerificationFailed(f"{len(manifest.layers)} layers, where one belongs")
    if image.special:
        raise VerificationFailed("extended attributes, or devices")
    with staged.blobs.open(manifest.config.digest) as stream:
        labels = _labels(stream.read(CONFIG_BYTES + 1))
    version = labels.get(VERSION, "")
    if BUILDER not in labels or not _VERSION.fullmatch(version):
        raise VerificationFailed(f"no labels {BUILDER} and {VERSION}")
    return BuilderImage(
        image=image,
        layer=manifest.layers[0],
        builder=labels[BUILDER],
        version=version,
        tree=strictjson.as_digest(labels[TREE], TREE) if TREE in labels else None,
    )


def _labels(config: bytes) -> dict[str, str]:
    document = strictjson.parse(config, most_bytes=CONFIG_BYTES)
    document.only_spelled("config")
    inner = document.child("config")
    inner.only_spelled("Labels")
    return inner.texts("Labels")

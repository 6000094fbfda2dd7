"""Small sound images in memory, with a place to spoil each part."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import zstandard

from policies.reference import Digest
from runner.registry.image import (
    DOCKER_CONFIG,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
)
from runner.verify import StagedImage

Edit = Callable[[dict[str, Any]], object]
Spoil = Callable[[bytes], bytes]


@dataclass(frozen=True)
class MemoryBlobs:
    """A BlobSource that tests fill by hand, also with bytes under a digest that is not theirs."""

    blobs: dict[Digest, bytes] = field(default_factory=dict)

    def add(self, data: bytes) -> Digest:
        digest = Digest.of(data)
        self.blobs[digest] = data
        return digest

    def size(self, digest: Digest) -> int | None:
        data = self.blobs.get(digest)
        return None if data is None else len(data)

    def open(self, digest: Digest) -> BinaryIO:
        if digest not in self.blobs:
            raise FileNotFoundError(digest)
        return io.BytesIO(self.blobs[digest])


def tar_of(
    *members: tarfile.TarInfo | tuple[str, bytes], tar_format: int = tarfile.PAX_FORMAT
) -> bytes:
    """A tar of files, given as name and content, and of entries without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """An entry without content."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    return info


HELLO_TAR = tar_of(
    entry("./", tarfile.DIRTYPE),
    ("./bin/hello", b"#!/bin/sh\necho hello\n"),
    entry("./bin/hi", tarfile.LNKTYPE, "bin/hello"),
    entry("etc/link", tarfile.SYMTYPE, "../../../etc/passwd"),
    ("etc/.wh.gone", b""),
    ("opt/.wh..wh..opq", b""),
)
MORE_TAR = tar_of(("usr/share/doc/" + "long/" * 40 + "name", bytes(3000)))


def packed(plain: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(plain, mtime=0)
    if compression == "zstd":
        return zstandard.ZstdCompressor().compress(plain)
    return plain


def layer_type(compression: str, *, docker: bool) -> str:
    if docker:
        return "application/vnd.docker.image.rootfs.diff.tar" + (compression and f".{compression}")
    return "application/vnd.oci.image.layer.v1.tar" + (compression and f"+{compression}")


def described(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data)}


def _nothing(_: dict[str, Any]) -> None:
    pass


def _same(data: bytes) -> bytes:
    return data


def make_image(
    *,
    tars: Sequence[bytes] = (HELLO_TAR, MORE_TAR),
    compression: str = "gzip",
    docker: bool = False,
    platform: tuple[str, str, str | None] = ("linux", "amd64", None),
    blobs: MemoryBlobs | None = None,
    edit_config: Edit = _nothing,
    edit_manifest: Edit = _nothing,
    spoil_layer: Spoil = _same,
    spoil_config: Spoil = _same,
    spoil_manifest: Spoil = _same,
) -> StagedImage:
    """A sound image of one platform.

    Edits change the document before it is written; spoilers change the bytes before they are
    hashed, so that all digests and sizes stay right.
    """
    blobs = MemoryBlobs() if blobs is None else blobs
    layers = [spoil_layer(packed(tar, compression)) for tar in tars]
    system, architecture, variant = platform
    config = {
        "architecture": architecture,
        "os": system,
        **({"variant": variant} if variant else {}),
        "config": {"Env": ["PATH=/bin"], "Labels": {"a": "1", "A": "2"}},
        "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(tar)) for tar in tars]},
    }
    edit_config(config)
    config_data = spoil_config(json.dumps(config).encode())
    media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": described(DOCKER_CONFIG if docker else OCI_CONFIG, config_data),
        "layers": [described(layer_type(compression, docker=docker), layer) for layer in layers],
        "annotations": {"org.example.note": "anything"},
    }
    edit_manifest(manifest)
    data = spoil_manifest(json.dumps(manifest).encode())
    for blob in (*layers, config_data):
        blobs.add(blob)
    return StagedImage(Descriptor(media_type, blobs.add(data), len(data)), blobs)


def make_index(
    *platforms: tuple[str, str, str | None],
    docker: bool = False,
    edit_index: Edit = _nothing,
) -> StagedImage:
    """A sound index with an image for each platform, all with the same layers."""
    blobs = MemoryBlobs()
    entries = []
    for platform in platforms:
        root = make_image(platform=platform, docker=docker, blobs=blobs).root
        system, architecture, variant = platform
        stated = {"os": system, "architecture": architecture}
        entries.append(
            {
                **described(root.media_type, blobs.blobs[root.digest]),
                "platform": {**stated, "variant": variant} if variant else stated,
            }
        )
    media_type = DOCKER_LIST if docker else OCI_INDEX
    index = {"schemaVersion": 2, "mediaType": media_type, "manifests": entries}
    edit_index(index)
    data = json.dumps(index).encode()
    return StagedImage(Descriptor(media_type, blobs.add(data), len(data)), blobs)

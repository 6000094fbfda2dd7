"""A verified image as local files: an OCI image layout, or a tar of one.

``tar:`` carries a ``manifest.json`` too, as ``docker save`` writes it since version 25, so that
``docker load``, ``podman load`` and ``skopeo`` (``oci-archive:`` and ``docker-archive:``) read it.
``oci-archive:`` is the layout and nothing else, as ``runner.registry.archive`` wants it. The same
image and reference give the same bytes.
"""

import contextlib
import errno
import io
import json
import os
import secrets
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from policies.reference import ImageReference
from runner.errors import DiskExceeded, OutputInvalid
from runner.hashed import hashed_chunks
from runner.pieces import stream_of
from runner.registry.image import OCI_INDEX, Descriptor, Manifest, parse_document
from runner.verify import VerifiedImage

_KINDS = ("oci", "oci-archive", "tar")
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_EXISTS = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


@dataclass(frozen=True, slots=True)
class Output:
    """Where the image goes: ``oci:DIR``, ``oci-archive:FILE`` or ``tar:FILE``."""

    kind: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises OutputInvalid for anything else, and where ``check`` does."""
        kind, colon, path = text.partition(":")
        if kind not in _KINDS or not colon or not path or "\0" in path:
            raise OutputInvalid(f"not an output: {text[:200]!a}")
        output = cls(kind, Path(path))
        output.check()
        return output

    def check(self) -> None:
        """Refuses early what ``write_output`` would refuse after the build.

        Raises:
            OutputInvalid: Something is there already, or the place for it is not.
        """
        with _errors_of(self):
            if not self.path.parent.is_dir():
                raise OutputInvalid(f"{self.path.parent} is no directory")
            if not os.access(self.path.parent, os.W_OK | os.X_OK):
                raise OutputInvalid(f"{self.path.parent} is not writable")
            if os.path.lexists(self.path) and not (
                self.kind == "oci" and _is_empty_directory(self.path)
            ):
                raise OutputInvalid(f"{self.path} exists already; nothing is overwritten")

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}"


def write_output(image: VerifiedImage, output: Output, reference: ImageReference | None) -> None:
    """Writes ``image``, whole or not at all; ``reference`` is the name that it gets inside.

    Blobs are hashed once more on the way.

    Raises:
        OutputInvalid: Something is there already, or cannot be written there.
        DiskExceeded: The file system is full.
        VerificationFailed: A blob changed since it was verified.
    """
    output.check()
    # A sibling, hence of the same file system; a name that nobody can have put there before.
    temporary = output.path.parent / f".runner-{secrets.token_hex(8)}"
    with _errors_of(output):
        try:
            if output.kind == "oci":
                _write_directory(image, temporary, reference)
                temporary.rename(output.path)  # replaces an empty directory and nothing else
            else:
                small = _small_files(image, reference)
                if output.kind == "tar":
                    small["manifest.json"] = _docker_manifest(image, reference)
                _write_tar(image, temporary, small)
                output.path.hardlink_to(temporary)  # unlike a rename, never replaces
        finally:
            _remove(temporary)


def _write_directory(
    image: VerifiedImage, directory: Path, reference: ImageReference | None
) -> None:
    directory.mkdir()
    for name, content in _small_files(image, reference).items():
        with _created(directory / name) as file:
            file.write(content)
    for descriptor in image.blobs_needed:
        with _created(directory / _blob_name(descriptor)) as file:
            for chunk in hashed_chunks(image.source, descriptor):
                file.write(chunk)


def _write_tar(image: VerifiedImage, path: Path, small: Mapping[str, bytes]) -> None:
    blobs = {_blob_name(descriptor): descriptor for descriptor in image.blobs_needed}
    with (
        _created(path) as file,
        tarfile.open(fileobj=file, mode="w") as archive,
    ):
        for name in sorted(small.keys() | blobs.keys()):
            if name in small:
                archive.addfile(_member(name, len(small[name])), io.BytesIO(small[name]))
            else:
                chunks = hashed_chunks(image.source, blobs[name])
                archive.addfile(_member(name, blobs[name].size), stream_of(chunks))
                next(chunks, None)  # what checks the digest comes after the last byte


def _small_files(image: VerifiedImage, reference: ImageReference | None) -> dict[str, bytes]:
    """Everything of the layout but configurations and layers."""
    annotations = {}
    if reference is not None:
        annotations["io.containerd.image.name"] = str(reference)
        if reference.tag:
            annotations["org.opencontainers.image.ref.name"] = reference.tag
    root = image.root
    entry: dict[str, Any] = {
        "mediaType": root.media_type,
        "digest": root.digest,
        "size": root.size,
        **({"annotations": annotations} if annotations else {}),
    }
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    documents = {
        f"blobs/{digest.algorithm}/{digest.hex}": data for digest, data in image.documents.items()
    }
    return {"oci-layout": _LAYOUT, "index.json": _json(index), **documents}


def _docker_manifest(image: VerifiedImage, reference: ImageReference | None) -> bytes:
    """What ``docker load`` looks for. It knows one platform only: the image's first."""
    manifest = next(
        parsed
        for digest, data in image.documents.items()
        if isinstance(parsed := parse_document(data, image.media_types[digest]), Manifest)
    )
    tagged = reference is not None and reference.tag is not None
    entry = {
        "Config": _blob_name(manifest.config),
        "RepoTags": [f"{reference.name}:{reference.tag}"] if reference and tagged else None,
        "Layers": [_blob_name(layer) for layer in manifest.layers],
    }
    return _json([entry])


def _json(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _blob_name(descriptor: Descriptor) -> str:
    return f"blobs/{descriptor.digest.algorithm}/{descriptor.digest.hex}"


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)  # owner root, time 0
    member.size = size
    return member


@contextlib.contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    """A file that did not exist before, on the disk when it is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _errors_of(output: Output) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise DiskExceeded(f"{output}: {os.strerror(error.errno or 0)}") from error
        if error.errno in _EXISTS:
            raise OutputInvalid(f"{output.path} exists already; nothing is overwritten") from error
        raise OutputInvalid(f"{output}: {error.strerror or error}") from error


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

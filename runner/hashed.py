"""Blobs held against the descriptors that name them: size and digest."""

import hashlib
from collections.abc import Iterator
from typing import NoReturn

from policies.reference import Digest
from runner.errors import VerificationFailed
from runner.registry.image import Descriptor
from runner.stores.blobs import CHUNK_BYTES, BlobSource


def blob_chunks(source: BlobSource, descriptor: Descriptor) -> Iterator[bytes]:
    """The blob's bytes in pieces of a MiB, never more than its size; not hashed.

    Raises:
        VerificationFailed: Rules ``blob-missing`` and ``blob-size``.
    """
    try:
        stream = source.open(descriptor.digest)
    except FileNotFoundError:
        raise VerificationFailed(
            f"{descriptor.digest} never arrived", rule="blob-missing"
        ) from None
    left = descriptor.size
    with stream:
        while chunk := stream.read(CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                break
            yield chunk
    if left:
        fail_size(descriptor)


def hashed_chunks(source: BlobSource, descriptor: Descriptor) -> Iterator[bytes]:
    """As ``blob_chunks``; after the last, the digest is checked too (rule ``blob-digest``)."""
    running = hashlib.new(descriptor.digest.algorithm)
    for chunk in blob_chunks(source, descriptor):
        running.update(chunk)
        yield chunk
    check_digest(descriptor.digest, running.hexdigest(), "blob-digest")


def check_whole(descriptor: Descriptor, data: bytes) -> None:
    if len(data) != descriptor.size:
        fail_size(descriptor)
    found = hashlib.new(descriptor.digest.algorithm, data).hexdigest()
    check_digest(descriptor.digest, found, "blob-digest")


def check_digest(expected: Digest, found: str, rule: str) -> None:
    if expected.hex != found:
        raise VerificationFailed(f"expected {expected}, found {found}", rule=rule)


def fail_size(descriptor: Descriptor) -> NoReturn:
    raise VerificationFailed(
        f"{descriptor.digest} is not of {descriptor.size} bytes", rule="blob-size"
    )

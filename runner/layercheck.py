"""One layer held against the rules that ``runner.verify`` lists, as a stream. Pure."""

import hashlib
from collections.abc import Callable

from policies.model import MIB, Limits
from policies.reference import Digest
from runner.errors import VerificationFailed
from runner.hashed import check_digest, fail_size
from runner.inflate import Inflater
from runner.layers import HeaderReader, Special
from runner.registry.image import LAYER_TYPES, Descriptor

INFLATION = 200
"""Bytes that a layer may make of one compressed byte. File systems reach 3 to 20; a deflate stream
of zeros reaches 1,032, and a zstd stream 30,000."""
FREE_BYTES = 256 * MIB
"""What any layer may become whatever its size: hashed in a second, and room for preallocated files
such as a database's."""


class LayerCheck:
    """One layer on its way through: fed in pieces of any size, then finished."""

    def __init__(
        self,
        descriptor: Descriptor,
        diff_id: Digest,
        limits: Limits,
        done: Callable[[Digest, Special], None],
    ) -> None:
        self._descriptor = descriptor
        self._diff_id = diff_id
        self._done = done
        self._layer_bytes = limits.layer_bytes
        self._inflated_bytes = max(FREE_BYTES, INFLATION * descriptor.size)
        compression = LAYER_TYPES[descriptor.media_type]
        self._inflater = Inflater(compression) if compression else None
        self._hash = hashlib.new(descriptor.digest.algorithm)
        # The plain bytes of an uncompressed layer are the blob: one hash does.
        same = not compression and diff_id.algorithm == descriptor.digest.algorithm
        self._plain_hash = self._hash if same else hashlib.new(diff_id.algorithm)
        self._headers = HeaderReader(
            most_entries=limits.layer_entries, path_bytes=limits.path_bytes
        )
        self._size = 0
        self._plain_size = 0

    def feed(self, data: bytes) -> None:
        """The blob goes on with ``data``."""
        self._size += len(data)
        if self._size > self._descriptor.size:
            fail_size(self._descriptor)
        self._hash.update(data)
        for plain in self._inflater.feed(data) if self._inflater else (data,):
            self._take_plain(plain)

    def finish(self) -> None:
        """The blob ends here."""
        if self._size != self._descriptor.size:
            fail_size(self._descriptor)
        check_digest(self._descriptor.digest, self._hash.hexdigest(), "blob-digest")
        if self._inflater:
            self._inflater.finish()
        self._headers.finish()
        check_digest(self._diff_id, self._plain_hash.hexdigest(), "diff-id")
        self._done(self._descriptor.digest, self._headers.special)

    def _take_plain(self, plain: bytes) -> None:
        self._plain_size += len(plain)
        if self._plain_size > self._layer_bytes:
            raise VerificationFailed(
                f"a layer of more than {self._layer_bytes} bytes", rule="layer-bytes"
            )
        if self._plain_size > self._inflated_bytes:
            raise VerificationFailed(
                f"{self._descriptor.size} bytes that become more than {self._inflated_bytes}",
                rule="layer-inflation",
            )
        if self._plain_hash is not self._hash:
            self._plain_hash.update(plain)
        self._headers.feed(plain)

"""The cache in which containers/image keeps what it knows about blobs, made beforehand.

With it a push names a base layer by the compressed digest that the registry has already. Without
it, it compresses the layer again. The tables are those of ``blob-info-cache-v1.sqlite``
(containers/image 5.28 and later); whoever changes them changes the file's name as well.
"""

import io
import sqlite3
import tarfile
from collections.abc import Iterable

from builder.model import BaseLayer

NAME = "cache/blob-info-cache-v1.sqlite"
"""Below the directory of all storage."""

_UNCOMPRESSED = "uncompressed"
_TABLES = """
CREATE TABLE DigestUncompressedPairs(
    anyDigest TEXT PRIMARY KEY NOT NULL, uncompressedDigest TEXT NOT NULL);
CREATE INDEX DigestUncompressedPairs_index_uncompressedDigest
    ON DigestUncompressedPairs(uncompressedDigest);
CREATE TABLE DigestCompressors(digest TEXT PRIMARY KEY NOT NULL, compressor TEXT NOT NULL);
"""
"""The others are made when they are missing."""


def database(layers: Iterable[BaseLayer]) -> bytes:
    """The file."""
    with sqlite3.connect(":memory:") as connection:
        connection.executescript(_TABLES)
        for layer in layers:
            connection.executemany(
                "INSERT OR REPLACE INTO DigestUncompressedPairs VALUES (?, ?)",
                [(layer.digest, layer.diff_id), (layer.diff_id, layer.diff_id)],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO DigestCompressors VALUES (?, ?)",
                [
                    (layer.diff_id, _UNCOMPRESSED),
                    (layer.digest, layer.compression or _UNCOMPRESSED),
                ],
            )
        connection.commit()
        data = connection.serialize()
    connection.close()
    return data


def archive(layers: Iterable[BaseLayer]) -> bytes:
    """The file in a tar, for a sandbox that has no other way to write one."""
    data = database(layers)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo(NAME)
        member.size, member.mode = len(data), 0o600
        tar.addfile(member, io.BytesIO(data))
    return out.getvalue()

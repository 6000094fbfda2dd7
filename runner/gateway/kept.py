"""What the cache of base images holds besides bytes.

::

    DATA/base/
        blobs/ALGORITHM/HEX     manifests, configurations and layers, by digest
        notes/HEX/NAME          says that a repository delivered the blob HEX; has the media type
                                of a manifest that is kept for a time without a way out
        tags/NAME               what a tag was last resolved to: its digest, and the tag itself
        arriving/, held/        see ``runner.stores.blobs``

NAME stands for the repository, or for the tag, that a registry is asked for. Notes go with their
blob. Whatever a tag was resolved to may be evicted before the tag is: then the tag is none.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from policies.errors import InvalidReference
from policies.reference import Digest, ImageReference
from runner.files import disk_full_is_a_limit, write_whole
from runner.registry.image import Descriptor
from runner.stores.blobs import BlobStore, Held, read_all


def mark(cache: BlobStore, asked: ImageReference, digest: Digest) -> Path:
    """Exists where the repository of ``asked`` has delivered the blob."""
    return cache.notes(digest) / Digest.of(f"{asked.name}@{digest}".encode()).hex


class Kept:
    """Manifests of one cache, and what tags were resolved to."""

    def __init__(self, cache: BlobStore) -> None:
        self._cache = cache
        self._tags = cache.directory / "tags"

    def add(self, asked: ImageReference, descriptor: Descriptor, data: bytes, held: Held) -> None:
        """Keeps what ``asked`` was resolved to, and holds it from now on.

        Raises:
            DiskExceeded: The host's file system is full.
        """
        digest = descriptor.digest
        with disk_full_is_a_limit(self._cache.directory):
            if not held.take(digest):
                with self._cache.arriving(digest.algorithm) as writer:
                    writer.write(data)
                    writer.sync()
                    held.adopt(digest, writer)
                    writer.commit()
            note = mark(self._cache, asked, digest)
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, descriptor.media_type.encode())
            if asked.digest is None and self.tagged(asked) != digest:
                self._tags.mkdir(exist_ok=True)
                write_whole(self._tag(asked), f"{digest} {asked}\n".encode())

    def find(
        self, asked: ImageReference, held: Held, most_bytes: int
    ) -> tuple[Descriptor, bytes] | None:
        """What ``asked`` was last resolved to, held from now on; None where that is gone."""
        digest = asked.digest or self.tagged(asked)
        if digest is None:
            return None
        with contextlib.suppress(FileNotFoundError, ValueError):
            media_type = mark(self._cache, asked, digest).read_text()
            if held.take(digest):
                data = read_all(held, digest, most_bytes)
                return Descriptor(media_type, digest, len(data)), data
        return None

    def tagged(self, asked: ImageReference) -> Digest | None:
        """What a tag was last resolved to, whether that is still here or not."""
        found = _read(self._tag(asked))
        return found[0] if found is not None else None

    def forget(self, digest: Digest) -> None:
        """Removes the manifest with this digest, and all tags that were resolved to it."""
        self._cache.forget(digest)
        self.collect()

    def collect(self) -> list[str]:
        """Removes the tags whose manifest is gone, and returns them."""
        removed = []
        for path, (digest, text) in self._all():
            if self._cache.size(digest) is None:
                path.unlink(missing_ok=True)
                removed.append(text)
        return removed

    def _all(self) -> Iterator[tuple[Path, tuple[Digest, str]]]:
        for path in sorted(self._tags.glob("[!.]*")):
            if (found := _read(path)) is not None:
                yield path, found

    def _tag(self, asked: ImageReference) -> Path:
        return self._tags / Digest.of(str(asked).encode()).hex


def _read(path: Path) -> tuple[Digest, str] | None:
    try:
        digest, _, text = path.read_text().strip().partition(" ")
        return Digest(digest), text
    except (FileNotFoundError, UnicodeDecodeError, InvalidReference):
        return None

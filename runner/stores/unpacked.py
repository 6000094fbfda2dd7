"""Base images unpacked once: file-system images, each made by a sandbox of its own.

::

    DATA/unpacked/
        blobs/sha256/HEX    EROFS images, named by the digest of their bytes
        records/KEY.json    which of them is which base image, for which builder
        turns/KEY           held by whoever is making one

KEY stands for the base image's digest, the platform and the builder's root filesystem: builders of
another version do not share a store. Nothing here says who may see an image. Whoever asks has
resolved it and has shown that its repository gives them every blob of it.
"""

import contextlib
import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from policies.model import Limits
from policies.reference import Digest
from runner.errors import InvalidReference, SandboxFailed
from runner.files import write_whole
from runner.stores.blobs import BlobStore, BlobWriter, Held, remove_unlocked, turn

RULES = 1
"""Counted up whenever a rule about layers becomes stricter: then older images are checked anew."""
_SUPERBLOCK_AT = 1024
_SUPERBLOCK = struct.Struct("<I8xB23xI")
"""Magic number, bits of a block's size, number of blocks (erofs_fs.h in Linux)."""
_MAGIC = 0xE0F5E1E2


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What an unpacked image is named by.

    Attributes:
        image: Digest of the manifest or index that was resolved.
        platform: Taken of an index.
        builder: Digest of the root filesystem whose builder unpacked it, and of how it was told to.
    """

    image: Digest
    platform: str
    builder: Digest

    @property
    def key(self) -> str:
        return Digest.of(f"{self.image}\n{self.platform}\n{self.builder}".encode()).hex


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Limits that every layer of an image was found to keep, as in ``policies.model.Limits``."""

    layer_bytes: int
    layer_entries: int
    path_bytes: int
    rules: int = RULES

    @classmethod
    def under(cls, limits: Limits) -> Self:
        return cls(
            layer_bytes=limits.layer_bytes,
            layer_entries=limits.layer_entries,
            path_bytes=limits.path_bytes,
        )

    def will_do(self, limits: Limits) -> bool:
        """Whether ``limits`` ask for nothing stricter."""
        return (
            self.rules == RULES
            and self.layer_bytes <= limits.layer_bytes
            and self.layer_entries <= limits.layer_entries
            and self.path_bytes <= limits.path_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """One unpacked base image.

    Attributes:
        name: What it was called when it was unpacked; for people.
        packed: Digest of the EROFS image.
        modified_ns: When its last byte was written, in nanoseconds since the epoch.
        attributes: Whether something in it is a device or has extended attributes.
        checked: What its layers were held against.
    """

    identity: Identity
    name: str
    packed: Digest
    size_bytes: int
    modified_ns: int
    attributes: bool
    checked: Checked

    @property
    def mountable(self) -> bool:
        """Whether a sandbox can: EROFS in gVisor refuses files with extended attributes."""
        return not self.attributes


class UnpackedStore:
    """Every base image that is unpacked on this host for this user."""

    def __init__(self, directory: Path) -> None:
        self._blobs = BlobStore(directory)
        self._records = directory / "records"
        self._turns = directory / "turns"
        for made in (self._records, self._turns):
            made.mkdir(exist_ok=True)

    def hold(self) -> Held:
        """Keeps images from eviction, for a build that uses them."""
        return self._blobs.hold()

    def find(self, identity: Identity, held: Held) -> Unpacked | None:
        """The image, checked to be as it was written, and held from now on; None for none."""
        found = self._read(self._record(identity.key))
        if found is None or found.identity != identity or not held.take(found.packed):
            return None
        if not _as_written(held.path(found.packed), found):
            held.drop(found.packed)
            self.remove(found)
            return None
        return found

    @contextlib.contextmanager
    def turn(self, identity: Identity, waiting: Callable[[], None]) -> Iterator[None]:
        """One at a time makes an image; ``waiting`` is called meanwhile and may raise."""
        path = self._turns / identity.key
        with turn(path, waiting=waiting, patience_seconds=float("inf")):
            yield

    def arriving(self) -> contextlib.AbstractContextManager[BlobWriter]:
        """Where a new image is written; forgotten again unless ``add`` takes it."""
        return self._blobs.arriving()

    def add(
        self,
        identity: Identity,
        writer: BlobWriter,
        held: Held,
        *,
        name: str,
        attributes: bool,
        checked: Checked,
    ) -> Unpacked:
        """Makes what was written the image of ``identity``, held from now on.

        Raises:
            SandboxFailed: It is no EROFS image of its own length.
        """
        if not _is_erofs(writer):
            raise SandboxFailed("what the sandbox handed out is no EROFS image")
        writer.sync()
        packed = writer.digest
        held.adopt(packed, writer)
        writer.commit()
        status = held.path(packed).stat()
        made = Unpacked(
            identity=identity,
            name=name,
            packed=packed,
            size_bytes=status.st_size,
            modified_ns=status.st_mtime_ns,
            attributes=attributes,
            checked=checked,
        )
        write_whole(self._record(identity.key), json.dumps(asdict(made)).encode(), 0o600)
        return made

    # -- looking after it ------------------------------------------------------------------

    def all(self) -> list[Unpacked]:
        """In the order of their names. Records of images that are gone go too."""
        found = []
        for path in sorted(self._records.glob("*.json")):
            unpacked = self._read(path)
            if unpacked is None or self._blobs.size(unpacked.packed) is None:
                path.unlink(missing_ok=True)
            else:
                found.append(unpacked)
        return sorted(found, key=lambda unpacked: (unpacked.name, unpacked.identity.key))

    def last_used(self, unpacked: Unpacked) -> float:
        """Seconds since the epoch."""
        with contextlib.suppress(FileNotFoundError):
            return self._blobs.path(unpacked.packed).stat().st_atime
        return time.time()

    def is_sound(self, unpacked: Unpacked) -> bool:
        """Whether every byte is as it was written."""
        path = self._blobs.path(unpacked.packed)
        with contextlib.suppress(FileNotFoundError):
            # Without O_NOATIME the image would be one that was used just now.
            fd = os.open(path, os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == unpacked.packed.hex
        return False

    def remove(self, unpacked: Unpacked) -> None:
        """A build that uses it keeps it until its end."""
        self._record(unpacked.identity.key).unlink(missing_ok=True)
        if all(other.packed != unpacked.packed for other in self.all()):
            self._blobs.remove(unpacked.packed)

    def collect(self) -> list[Path]:
        """Removes what killed builds left, and returns it: an image without a record, too."""
        removed = [*self._blobs.collect(), *remove_unlocked(self._turns)]
        # Looked at before the records are: what is being added is held until it has one.
        unheld = self._blobs.unheld()
        recorded = {unpacked.packed.hex for unpacked in self.all()}
        for path in unheld:
            if path.name not in recorded:
                path.unlink(missing_ok=True)
                removed.append(path)
        return removed

    def evict(self, most_bytes: int) -> list[Unpacked]:
        """Removes the images used longest ago until no more than ``most_bytes`` are left."""
        before = self.all()
        gone = {path.name for path in self._blobs.evict(most_bytes)}
        self.all()
        return [unpacked for unpacked in before if unpacked.packed.hex in gone]

    def _record(self, key: str) -> Path:
        return self._records / f"{key}.json"

    @staticmethod
    def _read(path: Path) -> Unpacked | None:
        try:
            document = json.loads(path.read_bytes())
            identity = document.pop("identity")
            return Unpacked(
                identity=Identity(
                    image=Digest(identity["image"]),
                    platform=identity["platform"],
                    builder=Digest(identity["builder"]),
                ),
                packed=Digest(document.pop("packed")),
                checked=Checked(**document.pop("checked")),
                **document,
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, InvalidReference):
            return None


def _is_erofs(writer: BlobWriter) -> bool:
    """By magic number and length alone: what is in it, nobody but a sandbox's kernel reads."""
    with writer.path.open("rb") as file:
        file.seek(_SUPERBLOCK_AT)
        head = file.read(_SUPERBLOCK.size)
    if len(head) < _SUPERBLOCK.size:
        return False
    magic, block_bits, blocks = _SUPERBLOCK.unpack(head)
    return bool(magic == _MAGIC and blocks << block_bits == writer.size)


def _as_written(path: Path, unpacked: Unpacked) -> bool:
    status = path.stat()
    return (status.st_size, status.st_mtime_ns) == (unpacked.size_bytes, unpacked.modified_ns)

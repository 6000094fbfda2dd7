"""The tar inside a layer, read as a stream of headers. Nothing is ever extracted.

    >>> reader = HeaderReader(most_entries=10, path_bytes=100)
    >>> reader.feed(bytes(1024))
    >>> reader.finish()

Tar readers disagree about malformed archives, and what one skips as data another unpacks as a
file. So only what GNU tar, bsdtar, Go's ``archive/tar`` and Python's ``tarfile`` write and all
read alike passes: POSIX and GNU headers with sound checksums, one long name for one entry, no
data after entries that have none, nothing but zeros after the end.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn

from runner.errors import VerificationFailed

BLOCK = 512
PAX_BYTES = 1 << 20
"""Of one PAX header, extended attributes included; Go's reader takes as much."""
PAX_RECORDS = 1024
"""In one header. Each extended attribute is one; real files have a few."""
_ZERO_BLOCK = bytes(BLOCK)
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_PAX_LENGTH = re.compile(rb"[1-9][0-9]{0,7}")
_PAX_SIZE = re.compile(rb"[0-9]{1,19}")
_OCTAL_SIZES = 8**11
"""From here on a size does not fit the field of a header."""

_POSIX_MAGIC = b"ustar\x0000"
_GNU_MAGIC = b"ustar  \0"
_NUMBERS = (
    slice(100, 108),  # mode
    slice(108, 116),  # user
    slice(116, 124),  # group
    slice(136, 148),  # time of change
    slice(329, 337),  # device, major
    slice(337, 345),  # device, minor
)
_POSITIVE, _NEGATIVE = 0x80, 0xFF
"""First byte of a binary number."""
_FILES = frozenset({b"0", b"\0", b"7"})
_HARD_LINK = b"1"
_WITHOUT_DATA = frozenset({_HARD_LINK, b"2", b"3", b"4", b"5", b"6"})
_DEVICES = frozenset({b"3", b"4"})
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK, _GNU_SPARSE = b"x", b"g", b"L", b"K", b"S"
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
"""Hides what lower layers have in its directory; file systems keep that as an attribute."""
_ATTRIBUTES = (b"SCHILY.xattr.", b"LIBARCHIVE.xattr.")


class Special(IntEnum):
    """What not every file system and every tool keeps."""

    NOTHING = 0
    ATTRIBUTES = 1
    """An extended attribute, or the number of a device."""
    SECURITY = 2
    """An attribute that goes when an owner is set after it, such as a file's capabilities."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one header says, long names resolved. Names are bytes: file systems know no others."""

    name: bytes
    kind: bytes
    size: int
    link: bytes


class HeaderReader:
    """Checks a tar archive that is fed to it in pieces of any size.

    Every method raises VerificationFailed, with the rules ``tar-header``, ``tar-type``,
    ``tar-size``, ``tar-pax``, ``tar-sparse``, ``tar-truncated``, ``tar-trailing``,
    ``entry-count``, ``entry-path-length``, ``entry-escape`` and ``hard-link-escape``.
    """

    def __init__(
        self,
        *,
        most_entries: int,
        path_bytes: int,
        seen: Callable[[Entry], None] | None = None,
    ) -> None:
        self._most_entries = most_entries
        self._path_bytes = path_bytes
        self._seen = seen
        self.entries = 0
        self.special = Special.NOTHING
        """The most special thing in the archive so far."""
        self._skip = 0  # bytes of file data and padding until the next header
        self._want = BLOCK  # bytes that make the next header, or extended header with padding
        self._gathered = bytearray()
        self._extended: tuple[bytes, int] | None = None  # kind and size of what is gathered
        self._pax: dict[bytes, bytes] | None = None
        self._long: dict[bytes, bytes] = {}
        self._zero_blocks = 0

    def feed(self, data: bytes) -> None:
        """The archive goes on with ``data``."""
        position, end = 0, len(data)
        while position < end:
            if self._skip:
                step = min(self._skip, end - position)
                self._skip -= step
                position += step
                continue
            if self._zero_blocks > 1:  # the end; tools pad to whole records
                if data.count(0, position) != end - position:
                    _fail("something follows the end of the archive", "tar-trailing")
                return
            step = min(self._want - len(self._gathered), end - position)
            self._gathered += data[position : position + step]
            position += step
            if len(self._gathered) == self._want:
                block = bytes(self._gathered)
                self._gathered.clear()
                self._take(block)

    @property
    def skipping(self) -> int:
        """Bytes of the entry at hand that are still to come, with what fills its last block."""
        return self._skip

    def finish(self) -> None:
        """The archive ends here; some tools leave out the two zero blocks."""
        if self._skip or self._gathered or self._extended or self._long or self._pax is not None:
            _fail("the archive is cut short", "tar-truncated")

    def _take(self, block: bytes) -> None:
        if self._extended:
            kind, size = self._extended
            self._extended, self._want = None, BLOCK
            self._take_extended(kind, block[:size])
        elif block == _ZERO_BLOCK:
            if self._long or self._pax is not None:
                _fail("the archive is cut short", "tar-truncated")
            self._zero_blocks += 1
        elif self._zero_blocks:
            _fail("a lone zero block", "tar-header")
        else:
            self._take_header(block)

    def _take_header(self, block: bytes) -> None:
        prefix = _checked_prefix(block)
        size = _number(block[124:136])
        kind = block[156:157]
        if kind in {_GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL}:
            self._expect_extended(kind, size)
            return
        if self._pax is not None and self._long:
            _fail("long names of two kinds for one entry", "tar-header")
        pax = self._pax or {}
        self._note_attributes(pax)
        if b"size" in pax:
            size = _pax_size(pax[b"size"], size)
        short = prefix + b"/" + _text(block[:100]) if prefix else _text(block[:100])
        name = pax.get(b"path", self._long.get(_GNU_NAME, short))
        if kind == b"\0" and b"/" in {short[-1:], name[-1:]}:
            _fail("a file that some readers take for a directory without data", "tar-type")
        link = pax.get(b"linkpath", self._long.get(_GNU_LINK, _text(block[157:257])))
        self._pax, self._long = None, {}
        self._check(Entry(name, kind, size, link))
        self._skip = _padded(size)

    def _check(self, entry: Entry) -> None:
        self._count()
        if entry.kind == _GNU_SPARSE:
            _fail("a sparse file, which readers unpack differently", "tar-sparse")
        if entry.kind in _WITHOUT_DATA:
            if entry.size:
                _fail("data after an entry that has none", "tar-size")
        elif entry.kind not in _FILES:
            _fail(f"an entry of type {entry.kind!a}", "tar-type")
        if max(len(entry.name), len(entry.link)) > self._path_bytes:
            _fail(f"a path of more than {self._path_bytes} bytes", "entry-path-length")
        if _escapes(entry.name):
            _fail(f"an entry named {_shown(entry.name)}", "entry-escape")
        if entry.kind == _HARD_LINK and _escapes(entry.link):
            _fail(f"a hard link to {_shown(entry.link)}", "hard-link-escape")
        if entry.kind in _DEVICES or entry.name.rstrip(b"/").endswith(_OPAQUE):
            self.special = max(self.special, Special.ATTRIBUTES)
        if self._seen:
            self._seen(entry)

    def _note_attributes(self, pax: Mapping[bytes, bytes]) -> None:
        for key in pax:
            name = next((key.removeprefix(p) for p in _ATTRIBUTES if key.startswith(p)), None)
            if name is not None:
                security = name.startswith(b"security.")
                special = Special.SECURITY if security else Special.ATTRIBUTES
                self.special = max(self.special, special)

    def _count(self) -> None:
        self.entries += 1
        if self.entries > self._most_entries:
            _fail(f"more than {self._most_entries} entries", "entry-count")

    def _expect_extended(self, kind: bytes, size: int) -> None:
        if kind in self._long or (kind == _PAX and self._pax is not None):
            _fail("two long names for one entry", "tar-header")
        if kind in {_GNU_NAME, _GNU_LINK}:
            if size > self._path_bytes + 1:  # with a zero byte at its end
                _fail(f"a path of more than {self._path_bytes} bytes", "entry-path-length")
        elif size > PAX_BYTES:
            _fail(f"a PAX header of {size} bytes", "tar-pax")
        if not size:
            _fail("an extended header without content", "tar-header")
        self._extended, self._want = (kind, size), _padded(size)

    def _take_extended(self, kind: bytes, payload: bytes) -> None:
        if kind in {_GNU_NAME, _GNU_LINK}:
            name = payload.removesuffix(b"\0")
            if b"\0" in name or not name:
                _fail("a long name with a zero byte inside", "tar-header")
            self._long[kind] = name
            return
        records = _pax_records(payload)
        if kind == _PAX:
            self._pax = records
            return
        self._count()
        if records.keys() - {b"comment"}:  # Go ignores what Python and GNU tar apply
            _fail("a global PAX header that changes entries", "tar-pax")


def _fail(message: str, rule: str) -> NoReturn:
    raise VerificationFailed(f"the layer's tar: {message}", rule=rule)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _shown(name: bytes) -> str:
    return ascii(name[:200])[1:]


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _checked_prefix(block: bytes) -> bytes:
    """What stands before the name of a sound header, where the format has such a field."""
    stated = block[148:156]
    if _number(stated) != sum(block) - sum(stated) + 8 * ord(" "):
        _fail("a header whose checksum is wrong", "tar-header")
    magic = block[257:265]
    # GNU may have times and the map of a sparse file where POSIX has the prefix. Only incremental
    # backups use them; Python takes them for a prefix, and old Go wrote one there.
    zeros = block[500:] if magic == _POSIX_MAGIC else block[345:]
    if magic not in {_POSIX_MAGIC, _GNU_MAGIC} or any(zeros):
        _fail("a header that is neither POSIX nor GNU", "tar-header")
    for field in _NUMBERS:
        if block[field][0] != _NEGATIVE:  # times before 1970
            _number(block[field])
    return _text(block[345:500])


def _number(field: bytes) -> int:
    """An octal number or, from GNU, a binary one."""
    if field[0] == _POSITIVE:
        return int.from_bytes(field[1:])
    octal = _OCTAL.fullmatch(field)
    if octal is None:
        _fail("a number that is none", "tar-header")
    return int(octal[1] or b"0", 8)


def _pax_size(text: bytes, stated: int) -> int:
    """The size that a PAX record gives, which readers without PAX must not misread.

    Writers use it where the header's field is too small, and leave zero there (CVE-2025-62518
    is a reader that believed the zero and took file data for headers).
    """
    size = int(text) if _PAX_SIZE.fullmatch(text) else -1
    if size < 0 or (size != stated and (stated or size < _OCTAL_SIZES)):
        _fail("a PAX size that differs from the header's", "tar-pax")
    return size


def _pax_records(payload: bytes) -> dict[bytes, bytes]:
    """``LENGTH KEY=VALUE NEWLINE`` again and again; the length counts all of the record."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(payload):
        digits = payload[position : position + 9].partition(b" ")[0]
        if not _PAX_LENGTH.fullmatch(digits):
            _fail("a PAX record without a length", "tar-pax")
        end = position + int(digits)
        record = payload[position + len(digits) + 1 : end]
        key, equals, value = record.partition(b"=")
        if len(records) == PAX_RECORDS:
            _fail(f"a PAX header of more than {PAX_RECORDS} records", "tar-pax")
        if end > len(payload) or not equals or not value.endswith(b"\n") or key in records:
            _fail("a malformed or repeated PAX record", "tar-pax")
        if key.startswith(b"GNU.sparse."):
            _fail("a sparse file, which readers unpack differently", "tar-sparse")
        records[key] = value[:-1]
        position = end
    for key in (b"path", b"linkpath"):
        if b"\0" in records.get(key, b"") or records.get(key) == b"":
            _fail("an empty path or a zero byte in one", "tar-pax")
    return records


def _escapes(name: bytes) -> bool:
    """Whether ``name`` leads out of the directory that it is meant for, whiteouts included."""
    if not name or name.startswith(b"/"):
        return True
    parts = name.split(b"/")
    # containerd and Docker delete what a whiteout's name says after its mark.
    return b".." in parts or any(
        part.removeprefix(_WHITEOUT) in {b"", b".", b".."}
        for part in parts
        if part.startswith(_WHITEOUT)
    )

"""Writes a tar and hashes it on the way."""

import errno
import hashlib
import os
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Self

from policies.reference import Digest
from runner.context.names import shown
from runner.errors import DiskExceeded, StateUnusable

_BUFFER_BYTES = 1 << 20


class TarSink:
    """A new tar file that vanishes unless it was finished."""

    def __init__(self, path: Path) -> None:
        """Creates ``path`` exclusively. Raises StateUnusable where that cannot be done."""
        self._path = path
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._finished = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise self._failed(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
        if not self._finished:
            self._path.unlink(missing_ok=True)

    def header(self, header: tarfile.TarInfo) -> None:
        """Starts an entry; PAX records carry what the old format cannot."""
        self.write(header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def write(self, data: bytes) -> None:
        """Adds bytes of an entry. Raises DiskExceeded or StateUnusable."""
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def pad(self, size: int) -> None:
        """Ends an entry of ``size`` bytes at a full block."""
        self.write(bytes(-size % tarfile.BLOCKSIZE))

    def finish(self) -> Digest:
        """Ends the tar, which now stays. The digest is of all its bytes."""
        self.write(bytes(2 * tarfile.BLOCKSIZE))
        self._flush()
        self._finished = True
        return Digest(f"sha256:{self._hash.hexdigest()}")

    def _flush(self) -> None:
        self._hash.update(self._buffer)
        with memoryview(self._buffer) as view:
            written = 0
            while written < len(view):
                try:
                    written += os.write(self._fd, view[written:])
                except OSError as error:
                    raise self._failed(error) from None
        self._buffer.clear()

    def _failed(self, error: OSError) -> DiskExceeded | StateUnusable:
        reason = os.strerror(error.errno or 0)
        message = f"the snapshot {shown(str(self._path))} cannot be written: {reason}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            return DiskExceeded(message, advice="Free some disk space; `runner gc` helps.")
        return StateUnusable(message)

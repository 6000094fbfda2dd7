"""What a session asked for: one line of JSON per request, in the order of their ends."""

import json
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from runner.files import disk_full_is_a_limit

MOST_BYTES = 32 << 20
"""A build that asks for more than this is asking to fill the disk; the last line says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One request. Every value is bounded and printable: it comes from the sandbox."""

    method: str
    target: str
    status: int
    bytes_in: int
    bytes_out: int
    note: str = ""


class Ledger:
    """Append-only; usable by several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._written = 0

    def record(self, entry: Entry) -> None:
        """Notes one request; after the end, nothing. Raises DiskExceeded."""
        line = json.dumps({"time": round(time.time(), 3), **asdict(entry)}).encode() + b"\n"
        with self._lock, disk_full_is_a_limit(self._path):
            if self._written > MOST_BYTES or self._file.closed:
                return
            self._written += len(line)
            self._file.write(line if self._written <= MOST_BYTES else b'{"note":"full"}\n')

    def close(self) -> None:
        with self._lock:
            self._file.close()

"""The directory of one build: what was asked, decided, seen, written and done.

::

    STATE/builds/ID/
        lock            held by the living runner
        request.json  decision.json  evidence.json  result.json
        events.jsonl  ledger.jsonl  build.log
        staged/         what arrived, until it was published
        image/          an OCI layout, where the image is nowhere else
"""

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from policies.grants import CLOSED
from policies.model import plain
from runner.events import Event, Output, Progress, as_line
from runner.files import disk_full_is_a_limit, write_whole
from runner.stores.rootfs import remove_tree
from sandbox.locks import abandoned, make_locked

_DAY_SECONDS = 86_400
_LARGE = ("context.tar", "staged")


def new_id() -> str:
    """Sorts by time; unique without asking anybody."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{secrets.token_hex(3)}"


class BuildDirectory:
    """Written by one build alone."""

    def __init__(self, builds: Path, build_id: str) -> None:
        self.id = build_id
        self.path = builds / build_id
        self._lock = make_locked(self.path)
        self._events = (self.path / "events.jsonl").open("ab", buffering=0)
        self._log = self.log.open("ab", buffering=0)

    @classmethod
    def create(cls, builds: Path) -> Self:
        return cls(builds, new_id())

    @property
    def log(self) -> Path:
        return self.path / "build.log"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def context(self) -> Path:
        return self.path / "context.tar"

    @property
    def image(self) -> Path:
        return self.path / "image"

    @property
    def staged(self) -> Path:
        return self.path / "staged"

    def listen(self, event: Event) -> None:
        """Keeps the raw log, and all other events but progress."""
        with disk_full_is_a_limit(self.path):
            if isinstance(event, Output):
                self._log.write(event.data)
            elif not isinstance(event, Progress):
                self._events.write(as_line(event))

    def write(self, name: str, value: Any) -> None:  # noqa: ANN401 - any of our frozen values
        """Writes ``NAME.json`` whole."""
        data = json.dumps(plain(value), indent=1, ensure_ascii=True).encode() + b"\n"
        write_whole(self.path / f"{name}.json", data, 0o600)

    def close(self) -> None:
        drop_large(self.path)
        self._events.close()
        self._log.close()
        self._lock.release()


def drop_large(directory: Path) -> bool:
    """Removes what only a running build needs; whether there was anything."""
    large = [path for name in _LARGE if (path := directory / name).exists()]
    for path in large:
        remove_tree(path)
    return bool(large)


def ended(builds: Path) -> Iterator[Path]:
    """Directories of builds that ended with a result."""
    return (directory for directory in abandoned(builds) if (directory / "result.json").exists())


def expired(directory: Path, now: float) -> bool:
    """Whether the record of a build that ended was kept for as long as its policy asks.

    Never where an image lies in it that is nowhere else.
    """
    if (directory / "image").exists():
        return False
    try:
        decision = json.loads((directory / "decision.json").read_bytes())["decision"]
        days = decision["grant"]["retention_days"]
    except (OSError, ValueError, LookupError, TypeError):  # denied, or never decided
        days = CLOSED.retention_days
    ended_at = (directory / "result.json").stat().st_mtime
    return bool(now - ended_at > days * _DAY_SECONDS)


def killed(builds: Path) -> Iterator[Path]:
    """Directories of builds that neither ended nor run."""
    return (
        directory for directory in abandoned(builds) if not (directory / "result.json").exists()
    )

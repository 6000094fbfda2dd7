"""Where the time of a build goes inside our own process: clocks around some functions."""

import functools
import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar
from unittest import mock

from runner import pipeline, state
from runner.registry import dial
from runner.stores.rootfs import RootfsStore
from sandbox import processes, runsc
from sandbox.local import backend as local
from sandbox.local.backend import LocalBackend
from sandbox.local.place import LocalPlace
from sandbox.place import HostPlace
from sandbox.supervise import SupervisedSandbox

P = ParamSpec("P")
R = TypeVar("R")

CLOCKED: tuple[tuple[str, Any, str], ...] = (
    ("`runsc --version`, every call", runsc, "find"),
    ("builder's seal: stat of every file", RootfsStore, "verified"),
    ("context: walk, tar, hash", pipeline, "snapshot"),
    ("certificates of the system read, every call", ssl, "create_default_context"),
    ("place of the sandbox: uid, directories, lock", LocalBackend, "reserve"),
    ("guest files and config.json", local, "_write_place"),
    ("fork and exec of the launcher", local, "_start"),
    ("runsc start to the canary", SupervisedSandbox, "_await_canary"),
    ("judging the canary against /proc", local, "_accept"),
    ("release: link of the context", HostPlace, "hand_in_all"),
    ("after the build: processes killed and looked for", processes, "kill_all"),
    ("after the build: place removed", LocalPlace, "release"),
    ("supervision: processor time, every 0.2 s", processes, "cpu_seconds"),
    ("supervision: memory, where no cgroup counts it", processes, "memory_bytes"),
    ("files written whole, with fsync", state, "write_whole"),
    ("verify", pipeline, "verify"),
)  # fmt: skip


@contextmanager
def clocks() -> Iterator[Mapping[str, float]]:
    """Seconds spent in each of CLOCKED while the block runs, by name."""
    spent: dict[str, float] = defaultdict(float)
    # A command is a process of its own and remembers nothing of the build before.
    runsc._shown_version.cache_clear()
    dial._trust.cache_clear()
    with ExitStack() as stack:
        for name, owner, attribute in CLOCKED:
            clocked = _clocked(getattr(owner, attribute), spent, name)
            stack.enter_context(mock.patch.object(owner, attribute, clocked))
        yield spent


def _clocked(function: Callable[P, R], spent: dict[str, float], name: str) -> Callable[P, R]:
    @functools.wraps(function)
    def timed(*args: P.args, **kwargs: P.kwargs) -> R:
        started = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.monotonic() - started

    return timed

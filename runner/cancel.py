"""Asking a build to end, from any thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runner.errors import Cancelled


class Cancellation:
    """Set once; whoever waits is told, whoever works asks."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def cancel(self) -> None:
        with self._lock:
            self._event.set()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()

    def check(self) -> None:
        """Raises Cancelled once somebody asked for it."""
        if self._event.is_set():
            raise Cancelled("the build was cancelled")

    @contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """Calls ``callback`` on cancellation while the block runs, at once where it has come."""
        with self._lock:
            self._callbacks.append(callback)
        if self._event.is_set():
            callback()
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)

"""Asking a build to end, from any thread."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from runner.errors import Cancelled, RunnerError

_T = TypeVar("_T")


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

    def waiting(self, work: Callable[[], _T], seconds: float, late: RunnerError) -> _T:
        """Does ``work`` in a thread of its own, which is left alone when it takes too long.

        For what waits on other people's servers, one slow byte after the other.

        Raises:
            Cancelled: Somebody asked for it meanwhile.
            RunnerError: ``late`` after ``seconds``, or what ``work`` raised.
        """
        over = threading.Event()
        results: list[_T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:  # noqa: BLE001 - raised below, by whoever waits
                errors.append(error)
            over.set()

        threading.Thread(target=run, name="waited-for", daemon=True).start()
        with self.calling(over.set):
            over.wait(seconds)
        if results:
            return results[0]
        if errors:
            raise errors[0]
        self.check()
        raise late

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


def side_by_side(works: Sequence[Callable[[], None]], at_a_time: int) -> None:
    """Does all of it, and raises the first error. Threads that hang are left alone."""
    waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for work in works:
        waiting.put(work)

    def run() -> None:
        while not waiting.empty():
            with contextlib.suppress(queue.Empty):
                work = waiting.get_nowait()
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 - raised by whoever waits
                    ended.put(error)
                else:
                    ended.put(None)

    for _ in range(min(at_a_time, len(works))):
        threading.Thread(target=run, name="fetch", daemon=True).start()
    for _ in works:
        if (error := ended.get()) is not None:
            raise error

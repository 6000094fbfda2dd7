"""Signals that end a command cleanly."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from runner.cancel import Cancellation


@contextmanager
def cancelled_by_signals(cancellation: Cancellation) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP cancels cleanly; a second one interrupts that too."""

    def first(number: int, frame: object) -> None:
        del frame
        signal.signal(number, signal.default_int_handler)
        # Never in the handler itself: it may have interrupted a holder of the locks it needs.
        threading.Thread(target=cancellation.cancel, name="cancel").start()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, first) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

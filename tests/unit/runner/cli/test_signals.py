"""Signals cancel once, and leave the process as it was."""

import os
import signal
import time

import pytest

from runner.cancel import Cancellation
from runner.cli.signals import cancelled_by_signals


def test_the_first_signal_cancels_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cancellation = Cancellation()
    with cancelled_by_signals(cancellation):
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not cancellation._event.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cancellation._event.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before

import threading

import pytest

from runner.cancel import Cancellation
from runner.errors import Cancelled, TimeExceeded


def test_nothing_happens_until_somebody_asks() -> None:
    cancellation = Cancellation()
    cancellation.check()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        cancellation.check()


def test_whoever_waits_is_told_and_nobody_else() -> None:
    cancellation, told = Cancellation(), []
    with cancellation.calling(lambda: told.append("gone")):
        pass
    with cancellation.calling(lambda: told.append("here")):
        cancellation.cancel()
        assert told == ["here"]


def test_a_cancellation_that_has_come_is_told_at_once() -> None:
    cancellation, told = Cancellation(), []
    cancellation.cancel()
    with cancellation.calling(lambda: told.append(1)):
        assert told == [1]


def test_a_callback_is_forgotten_when_the_block_fails() -> None:
    cancellation, told = Cancellation(), []
    with pytest.raises(KeyError), cancellation.calling(lambda: told.append(1)):
        raise KeyError
    cancellation.cancel()
    assert told == []


def late() -> TimeExceeded:
    return TimeExceeded("too long")


def test_what_is_waited_for_gives_its_answer_or_its_error() -> None:
    assert Cancellation().waiting(lambda: 3, 5, late()) == 3
    with pytest.raises(ZeroDivisionError):
        Cancellation().waiting(lambda: 1 / 0, 5, late())


def test_who_takes_too_long_is_left_alone() -> None:
    release = threading.Event()
    with pytest.raises(TimeExceeded, match="too long"):
        Cancellation().waiting(release.wait, 0.05, late())
    release.set()


def test_a_cancellation_ends_the_waiting_at_once() -> None:
    cancellation, release = Cancellation(), threading.Event()
    threading.Timer(0.05, cancellation.cancel).start()
    with pytest.raises(Cancelled):
        cancellation.waiting(release.wait, 60, late())
    release.set()

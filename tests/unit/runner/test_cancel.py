import pytest

from runner.cancel import Cancellation
from runner.errors import Cancelled


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

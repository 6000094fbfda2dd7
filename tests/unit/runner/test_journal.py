"""What a build tells, and where telling ends it."""

import time

import pytest

from policies.reference import Digest, ImageReference
from runner import events
from runner.cancel import Cancellation
from runner.errors import Cancelled, TimeExceeded
from runner.events import Event, Stage
from runner.journal import Journal
from runner.publish import BlobProgress, ManifestPushed

IMAGE = ImageReference("h", "r", "t")
DIGEST = Digest.of(b"")


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def cancellation() -> Cancellation:
    return Cancellation()


@pytest.fixture
def journal(told: list[Event], cancellation: Cancellation) -> Journal:
    return Journal(told.append, cancellation)


def test_a_stage_is_timed_and_told(journal: Journal, told: list[Event]) -> None:
    with journal.stage(Stage.BUILD):
        pass
    assert told == [
        events.StageStarted(Stage.BUILD),
        events.StageEnded(Stage.BUILD, journal.timings["build"]),
    ]


def test_no_stage_starts_once_the_build_was_cancelled(
    journal: Journal, cancellation: Cancellation, told: list[Event]
) -> None:
    cancellation.cancel()
    with pytest.raises(Cancelled), journal.stage(Stage.BUILD):
        pytest.fail("it started")
    assert told == []


def test_every_progress_asks_for_cancellation(journal: Journal, cancellation: Cancellation) -> None:
    checked = journal.verifying(60)
    cancellation.cancel()
    with pytest.raises(Cancelled):
        journal.fetching(IMAGE, DIGEST, 1, 2)
    with pytest.raises(Cancelled):
        journal.publishing(ManifestPushed(DIGEST))
    with pytest.raises(Cancelled):
        checked(1)


def test_verifying_has_a_time_limit(journal: Journal) -> None:
    checked = journal.verifying(0.01)
    time.sleep(0.02)
    with pytest.raises(TimeExceeded, match="verifying"):
        checked(1)


def test_progress_warnings_and_output_are_told(journal: Journal, told: list[Event]) -> None:
    checked = journal.verifying(60)
    checked(2)
    checked(3)
    journal.fetching(IMAGE, DIGEST, 1, 2)
    journal.publishing(BlobProgress(DIGEST, 1, 2))
    journal.publishing(ManifestPushed(DIGEST))
    journal.warn("odd")
    journal.output(b"No space left on device")
    short = DIGEST.hex[:12]
    assert told == [
        events.Progress("verify", 2, 0),
        events.Progress("verify", 5, 0),
        events.Progress(f"pull {IMAGE} {short}", 1, 2),
        events.Progress(f"push {short}", 1, 2),
        events.Warned("odd"),
        events.Output(b"No space left on device"),
    ]
    assert journal.warnings == ["odd"]
    assert b"no space left" in journal.log_tail

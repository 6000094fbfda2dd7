"""What a build tells while it goes on: its events, stage by stage, and what the result repeats."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from policies.reference import Digest, ImageReference
from runner import events, publish
from runner.cancel import Cancellation
from runner.errors import TimeExceeded
from runner.events import Listener, Stage
from runner.outcome import LogTail
from runner.stores.blobs import BlobWriter


class Journal:
    """Every callback that reports progress also asks whether the build was cancelled."""

    def __init__(self, emit: Listener, cancellation: Cancellation) -> None:
        self.emit = emit
        self.timings: dict[str, float] = {}
        self.warnings: list[str] = []
        self.log_tail = LogTail()
        self._waits_for = ""
        self._cancellation = cancellation

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Times one stage. Raises Cancelled instead of starting it."""
        self._cancellation.check()
        self.emit(events.StageStarted(stage))
        started = time.monotonic()
        yield
        seconds = round(time.monotonic() - started, 3)
        self.timings[stage] = seconds
        self.emit(events.StageEnded(stage, seconds))

    def warn(self, message: str) -> None:
        """Once for each message: the Dockerfile is read twice."""
        if message in self.warnings:
            return
        self.warnings.append(message)
        self.emit(events.Warned(message))

    def waiting(self, words: str) -> None:
        """A sandbox waits for what ``words`` say; told again and again."""
        self._cancellation.check()
        if words not in {"", self._waits_for}:
            self._waits_for = words
            self.emit(events.Waiting(words))

    def output(self, data: bytes) -> None:
        """Takes the build's own output."""
        self.log_tail.add(data)
        self.emit(events.Output(data))

    def fetching(self, image: ImageReference, digest: Digest, done: int, total: int) -> None:
        """A blob of a base image is on its way."""
        self._cancellation.check()
        self.emit(events.Progress(f"pull {image} {digest.hex[:12]}", done, total))

    def unpacking(self, image: ImageReference, writer: BlobWriter) -> Callable[[memoryview], None]:
        """What takes an unpacked image into the store, piece by piece."""
        what = f"unpack {image}"
        self.emit(events.Progress(what, 0, 0))  # the first piece comes when all of it is packed

        def take(piece: memoryview) -> None:
            self._cancellation.check()
            writer.write(piece)
            self.emit(events.Progress(what, writer.size, 0))

        return take

    def verifying(self, within_seconds: float) -> Callable[[int], None]:
        """What to call with each number of bytes that were checked.

        It raises TimeExceeded once that took too long: the image is the build's, and may be made
        so that checking it takes days.
        """
        end = time.monotonic() + within_seconds
        done = 0

        def checked(read: int) -> None:
            nonlocal done
            self._cancellation.check()
            if time.monotonic() > end:
                raise TimeExceeded(f"verifying the image took longer than {within_seconds:g} s")
            done += read
            self.emit(events.Progress("verify", done, 0))

        return checked

    def publishing(self, event: publish.PublishEvent) -> None:
        """A step of publishing was done."""
        self._cancellation.check()
        if isinstance(event, publish.BlobProgress):
            what = f"push {event.digest.hex[:12]}"
            self.emit(events.Progress(what, event.sent_bytes, event.size_bytes))

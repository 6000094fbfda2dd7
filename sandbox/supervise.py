"""One running sandbox, whatever backend started it: read, watched, and waited for.

The conversation with its first process is the same everywhere: a canary comes, is judged, the
inputs are handed in and the process is released; then output, and at the end one line of report.
"""

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from policies.errors import RunnerError
from policies.model import Limits
from sandbox.canary import Observation
from sandbox.errors import IsolationMismatch, SandboxFailed
from sandbox.model import Ending, Evidence, Outcome, Usage
from sandbox.outlet import Outlet
from sandbox.report import CANARY_BYTES, ExitReport, OutputSplitter, ReportInvalid, parse_exit

START_SECONDS = 60.0
"""From the start of the runtime to the canary; 0.2 s on a quiet machine."""

_CANARY_LINE = re.compile(rb"^(runner-canary [^\n]*)\n", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What is known of a sandbox that is gone.

    Attributes:
        status: That its first process ended with, as the host saw it; None where nobody did.
        ending: Why, where the host knows: a limit that the kernel kept.
    """

    status: int | None
    ending: Ending | None
    cpu_seconds: float | None
    memory_peak_bytes: int | None


class Machine(Protocol):
    """What a backend started. Every method may be called from any thread."""

    enforced: dict[str, str]
    """Of each limit that the backend keeps or does not: as in ``Outcome.enforced``."""
    poll_seconds: float
    """Between two calls of ``sample``."""

    def read(self) -> bytes:
        """Of the first process's output, or of the runtime's; empty at its end."""

    def write(self, data: bytes) -> None:
        """To the first process. Raises BrokenPipeError where it is gone."""

    def sample(self) -> Ending | None:
        """Notes what is used; and says which limit is exceeded that only the supervisor keeps."""

    def kill(self) -> None:
        """Ends every process of the sandbox, whatever state it is in. May be called again."""

    def reap(self) -> Remains:
        """Waits until the sandbox is gone."""

    def close(self) -> None:
        """Lets go of everything that this process holds of it. May be called again."""


class SupervisedSandbox:
    """See ``sandbox.model.Sandbox``. Two threads: one reads it, one keeps its limits."""

    def __init__(
        self,
        machine: Machine,
        limits: Limits,
        *,
        nonce: str,
        accept: Callable[[Observation], Evidence],
        hand_in: Callable[[], None],
        log: Callable[[bytes], None],
        outlet: Outlet | None,
    ) -> None:
        """Accepts the sandbox and releases it, or leaves nothing of it.

        Args:
            machine: Started a moment ago.
            limits: Of the build.
            nonce: That its first process was given.
            accept: Judges what that process saw.
            hand_in: Gives the sandbox its inputs.
            log: Gets the build's raw output, from another thread.
            outlet: That the sandbox hands a file out by.

        Raises:
            IsolationMismatch: It is not what it should be.
            SandboxFailed: It did not start.
        """
        self._machine = machine
        self._limits = limits
        self._nonce = nonce
        self._log = log
        self._logged_bytes = 0
        self._outlet = outlet
        self._ending: Ending | None = None
        self._report: ExitReport | None = None
        self._error: Exception | None = None
        self._over = threading.Event()
        self._started = time.monotonic()
        try:
            early, line = self._await_canary()
            self.evidence = accept(Observation.parse(line, nonce))
            hand_in()
            self._release()
        except BaseException:
            self._leave_nothing()
            raise
        self._reader = threading.Thread(
            target=self._read, args=(early,), name="sandbox-output", daemon=True
        )
        self._watcher = threading.Thread(target=self._watch, name="sandbox-limits", daemon=True)
        self._reader.start()
        self._watcher.start()

    # -- start ---------------------------------------------------------------------------

    def _await_canary(self) -> tuple[bytes, bytes]:
        """What stood behind the canary's line, and the line itself."""
        timer = threading.Timer(START_SECONDS, self._machine.kill)
        timer.start()
        received = b""
        try:
            while (line := _CANARY_LINE.search(received)) is None:
                data = self._machine.read()
                received += data
                if not data or len(received) > CANARY_BYTES:
                    shown = received[-2000:].decode("utf-8", "backslashreplace").strip()
                    raise SandboxFailed(
                        f"the runtime did not start the sandbox: {shown or 'no output'}",
                        advice="runner doctor; and runner base verify, where it names an image.",
                    )
        finally:
            timer.cancel()
        return received[line.end() :], line[1]

    def _release(self) -> None:
        try:
            self._machine.write(f"release {self._nonce}\n".encode())
        except BrokenPipeError:
            raise IsolationMismatch("the sandbox ended before it was released") from None

    def _leave_nothing(self) -> None:
        self._machine.kill()
        try:
            self._machine.reap()
        finally:
            self._close()

    # -- while it runs -------------------------------------------------------------------

    def _read(self, early: bytes) -> None:
        try:
            self._read_to_the_end(early)
        except Exception as error:  # noqa: BLE001 - a thread's last resort; wait() raises it
            self._fail(error)

    def _read_to_the_end(self, early: bytes) -> None:
        splitter, data = OutputSplitter(), early
        while True:
            self._take(splitter.feed(data))
            data = self._machine.read()
            if not data:
                break
        rest, line = splitter.finish()
        self._take(rest)
        if line is not None:
            try:
                self._report = parse_exit(line, self._nonce)
            except ReportInvalid:
                self._report = None

    def _take(self, output: bytes) -> None:
        """Output of the build, whenever it is known to be that."""
        room = self._limits.log_bytes - self._logged_bytes
        self._logged_bytes += len(output)
        if output and room > 0:
            self._log(output[:room])
        if self._logged_bytes > self._limits.log_bytes:
            self._end(Ending.LOG)

    def _watch(self) -> None:
        try:
            while not self._over.wait(self._machine.poll_seconds):
                if time.monotonic() - self._started > self._limits.wall_seconds:
                    self._end(Ending.TIME)
                if (exceeded := self._machine.sample()) is not None:
                    self._end(exceeded)
        except Exception as error:  # noqa: BLE001 - nothing would keep the limits any more
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._end(Ending.CANCELLED)

    def _end(self, ending: Ending) -> None:
        if self._ending is None:
            self._ending = ending
        self._machine.kill()

    # -- the end -------------------------------------------------------------------------

    def cancel(self) -> None:
        self._end(Ending.CANCELLED)

    def abandon(self) -> None:
        if self._over.is_set():
            return
        self.cancel()
        with suppress(RunnerError):
            self.wait()

    def wait(self) -> Outcome:
        self._reader.join()
        try:
            remains = self._machine.reap()
        finally:
            self._over.set()
            self._watcher.join()
            self._close()
        if self._error is not None:
            raise self._error
        ending = self._ending or self._judge(remains)
        report = self._report or ExitReport(command=0, status=125, claim=None)
        if self._outlet is not None and ending is Ending.EXITED:
            self._outlet.require_untroubled()
            if report.status == 0:
                self._outlet.require_whole()
        return Outcome(
            ending=ending,
            status=report.status,
            command=report.command,
            claim=report.claim,
            evidence=self.evidence,
            usage=Usage(
                wall_seconds=round(time.monotonic() - self._started, 3),
                cpu_seconds=_rounded(remains.cpu_seconds),
                memory_peak_bytes=remains.memory_peak_bytes,
            ),
            enforced={
                **self._machine.enforced,
                "wall_seconds": "supervisor",
                "log_bytes": "supervisor",
            },
        )

    def _judge(self, remains: Remains) -> Ending:
        if remains.ending is Ending.MEMORY:
            return Ending.MEMORY
        # The host saw how the first process ended: whoever killed it has another status.
        if self._report is not None and self._report.status == remains.status:
            return Ending.EXITED
        return remains.ending or Ending.BROKEN

    def _close(self) -> None:
        self._machine.close()
        if self._outlet is not None:
            self._outlet.close()


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)

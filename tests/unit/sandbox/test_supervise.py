"""The conversation with a first process, whose machine is made up: it says what a test wants."""

import os
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.model import Isolation, Limits
from sandbox import supervise
from sandbox.canary import Observation
from sandbox.errors import EngineLost, IsolationMismatch, SandboxFailed
from sandbox.model import Ending, Evidence, HostView, Outcome
from sandbox.outlet import Outlet
from sandbox.supervise import Remains, SupervisedSandbox

NONCE = "0123"
FIELDS = {"release": "4.4.0", "version": "#1", "boot_id": "", "log": "", "gvisor": "",
          "ids": "0:0:0", "mounts": "", "net_dev": "", "reached": ""}  # fmt: skip
CANARY = (
    f"runner-canary 1 nonce={NONCE} "
    + " ".join(f"{name}={value.encode().hex()}" for name, value in FIELDS.items())
    + "\n"
).encode()
EVIDENCE = Evidence(
    isolation=Isolation.GVISOR,
    kernel_release="4.4.0",
    kernel_version="#1",
    runtime="made up",
    runtime_version="1",
    interfaces=(),
    inside_uid=0,
    outside=HostView(()),
)
ENDED_WELL = Remains(status=0, ending=None, cpu_seconds=1.234, memory_peak_bytes=42)
LIMITS = Limits(log_bytes=100)


def left(status: int | None, ending: Ending | None = None) -> Remains:
    return replace(ENDED_WELL, status=status, ending=ending)


def report(status: int = 0, *, nonce: str = NONCE, claim: str = "") -> bytes:
    line = f"runner-exit 1 nonce={nonce} command=1 status={status} claim={claim.encode().hex()}"
    return f"\n{line}\n".encode()


@dataclass
class MadeUp:
    """A machine that says ``says`` piece by piece; what it says after that comes with ``say``.

    Attributes:
        stays: Whether it goes on until it is killed, once everything is said.
        samples: What ``sample`` finds, one after the other; an error is raised.
        trouble: That ``reap`` raises.
        deaf: Whether it is gone when it is written to.
    """

    says: tuple[bytes, ...] = (CANARY, report())
    stays: bool = False
    remains: Remains = ENDED_WELL
    samples: list[Ending | Exception | None] = field(default_factory=list)
    trouble: Exception | None = None
    deaf: bool = False
    poll_seconds: float = 0.005
    enforced: dict[str, str] = field(default_factory=lambda: {"pids": "made up"})
    written: list[bytes] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    _output: "queue.SimpleQueue[bytes]" = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        for each in self.says:
            self.say(each)
        if not self.stays:
            self.say(b"")

    def say(self, data: bytes) -> None:
        self._output.put(data)

    def read(self) -> bytes:
        return self._output.get(timeout=30)

    def write(self, data: bytes) -> None:
        if self.deaf:
            raise BrokenPipeError
        self.written.append(data)

    def sample(self) -> Ending | None:
        found = self.samples.pop(0) if self.samples else None
        if isinstance(found, Exception):
            raise found
        return found

    def kill(self) -> None:
        self.calls.append("kill")
        self.say(b"")

    def reap(self) -> Remains:
        self.calls.append("reap")
        if self.trouble is not None:
            raise self.trouble
        return self.remains

    def close(self) -> None:
        self.calls.append("close")


def accepted(seen: Observation) -> Evidence:
    return EVIDENCE


def launched(
    machine: MadeUp,
    *,
    limits: Limits = LIMITS,
    accept: Callable[[Observation], Evidence] = accepted,
    hand_in: Callable[[], None] = lambda: None,
    log: Callable[[bytes], None] = lambda _: None,
    outlet: Outlet | None = None,
) -> SupervisedSandbox:
    return SupervisedSandbox(
        machine, limits, nonce=NONCE, accept=accept, hand_in=hand_in, log=log, outlet=outlet
    )


def ended(machine: MadeUp, **options: object) -> Outcome:
    return launched(machine, **options).wait()  # type: ignore[arg-type]  # as launched has them


# -- an orderly way --------------------------------------------------------------------------------


def test_what_the_first_process_reports_and_the_host_saw_is_the_outcome() -> None:
    machine = MadeUp((CANARY, b"building\n", report(7, claim="sha256:0")))
    machine.remains = replace(ENDED_WELL, status=7)
    outcome = ended(machine)
    assert (outcome.ending, outcome.status, outcome.command) == (Ending.EXITED, 7, 1)
    assert outcome.claim == "sha256:0"
    assert outcome.evidence is EVIDENCE
    assert (outcome.usage.cpu_seconds, outcome.usage.memory_peak_bytes) == (1.23, 42)
    assert outcome.usage.wall_seconds >= 0
    assert outcome.enforced == {
        "pids": "made up", "wall_seconds": "supervisor", "log_bytes": "supervisor",
    }  # fmt: skip
    assert machine.calls == ["reap", "close"]


def test_inputs_come_after_the_judgement_and_the_release_after_the_inputs() -> None:
    order: list[str] = []
    machine = MadeUp()

    def accept(seen: Observation) -> Evidence:
        order.append(f"judged {seen.release}")
        return EVIDENCE

    def hand_in() -> None:
        assert not machine.written
        order.append("handed in")

    ended(machine, accept=accept, hand_in=hand_in)
    assert order == ["judged 4.4.0", "handed in"]
    assert machine.written == [f"release {NONCE}\n".encode()]


@given(cuts=st.lists(st.integers(0, 2000), max_size=8))
def test_the_stream_may_be_cut_anywhere(cuts: list[int]) -> None:
    whole = b"the runtime warns\n" + CANARY + b"one\ntwo" + report(claim="c")
    bounds = sorted({0, len(whole), *(cut % len(whole) for cut in cuts)})
    machine = MadeUp(tuple(whole[a:b] for a, b in pairwise(bounds)))
    logged: list[bytes] = []
    outcome = ended(machine, log=logged.append)
    # A line's end right before the report may have been given already.
    assert b"".join(logged).removesuffix(b"\n") == b"one\ntwo"
    assert (outcome.ending, outcome.claim) == (Ending.EXITED, "c")


# -- no start --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "shown"),
    [
        ((), "no output"),
        ((b"runsc: no such file\n",), "no such file"),
        ((CANARY[:-1],), "runner-canary 1"),
        ((b"x" + CANARY,), "xrunner-canary"),
        ((b"\xff\x00",), r"\\xff"),
    ],
)
def test_without_a_whole_canary_nothing_is_released(says: tuple[bytes, ...], shown: str) -> None:
    machine = MadeUp(says)
    with pytest.raises(SandboxFailed, match=shown):
        launched(machine)
    assert machine.written == []
    assert machine.calls == ["kill", "reap", "close"]


def test_a_runtime_that_writes_without_end_is_not_listened_to_for_ever() -> None:
    machine = MadeUp((b"x" * 40_000, b"y" * 40_000), stays=True)
    with pytest.raises(SandboxFailed, match="yyyy"):
        launched(machine)
    assert machine.calls == ["kill", "reap", "close"]


def test_a_runtime_that_says_nothing_is_killed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "START_SECONDS", 0.02)
    machine = MadeUp((), stays=True)
    with pytest.raises(SandboxFailed, match="no output"):
        launched(machine)
    assert machine.calls == ["kill", "kill", "reap", "close"]


def test_the_canary_of_another_sandbox_is_not_this_ones() -> None:
    machine = MadeUp((CANARY.replace(NONCE.encode(), b"3210"),))
    with pytest.raises(IsolationMismatch, match="nonce"):
        launched(machine)
    assert machine.calls == ["kill", "reap", "close"]


@pytest.mark.parametrize("step", ["accept", "hand_in"])
def test_what_was_refused_is_killed_before_it_is_released(step: str) -> None:
    def refuse(*_: object) -> Evidence:
        raise IsolationMismatch("no")

    machine = MadeUp(stays=True)
    with pytest.raises(IsolationMismatch, match="no"):
        launched(machine, **{step: refuse})  # type: ignore[arg-type]  # one of the two
    assert machine.written == []
    assert machine.calls == ["kill", "reap", "close"]


def test_a_process_that_is_gone_cannot_be_released() -> None:
    machine = MadeUp(deaf=True)
    with pytest.raises(IsolationMismatch, match="before it was released"):
        launched(machine)
    assert machine.calls == ["kill", "reap", "close"]


def test_what_cannot_be_reaped_is_let_go_of_all_the_same() -> None:
    machine = MadeUp((), trouble=EngineLost("gone"))
    with pytest.raises(EngineLost):
        launched(machine)
    assert machine.calls == ["kill", "reap", "close"]


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(150,), (60, 60, 1000), (100, 1)])
def test_a_log_is_cut_at_its_bound_and_the_build_ends(pieces: tuple[int, ...]) -> None:
    machine = MadeUp((CANARY, *(b"x" * size for size in pieces), report()))
    logged: list[bytes] = []
    outcome = ended(machine, log=logged.append)
    assert b"".join(logged) == b"x" * 100
    assert outcome.ending is Ending.LOG
    assert "kill" in machine.calls


def test_a_log_that_is_just_full_is_fine() -> None:
    logged: list[bytes] = []
    outcome = ended(MadeUp((CANARY, b"x" * 100, report())), log=logged.append)
    assert (outcome.ending, b"".join(logged)) == (Ending.EXITED, b"x" * 100)


@pytest.mark.parametrize("before", [1, 95, 100])
def test_what_was_held_back_for_the_report_counts_as_well(before: int) -> None:
    # It begins as the report does, and is not one.
    held = b"\nrunner-exit 1 nonce=" + b"y" * 30
    logged: list[bytes] = []
    outcome = ended(MadeUp((CANARY, b"x" * before, held)), log=logged.append)
    assert b"".join(logged) == (b"x" * before + held)[:100]
    assert outcome.ending is (Ending.BROKEN if before + len(held) <= 100 else Ending.LOG)


def test_time_is_over() -> None:
    outcome = ended(MadeUp((CANARY,), stays=True), limits=replace(LIMITS, wall_seconds=0))
    assert outcome.ending is Ending.TIME


def test_the_first_reason_is_the_reason() -> None:
    machine = MadeUp((CANARY,), stays=True, samples=[None, Ending.MEMORY, Ending.PIDS])
    machine.remains = replace(ENDED_WELL, status=None, ending=Ending.PIDS)
    assert ended(machine).ending is Ending.MEMORY


def test_limits_that_nobody_can_keep_any_more_end_the_build() -> None:
    machine = MadeUp((CANARY,), stays=True, samples=[ValueError("unreadable")])
    with pytest.raises(ValueError, match="unreadable"):
        ended(machine)
    assert machine.calls[-2:] == ["reap", "close"]


def test_a_log_that_cannot_be_written_ends_the_build() -> None:
    def full(_: bytes) -> None:
        raise OSError("no space")

    machine = MadeUp((CANARY, b"building\n"), stays=True)
    with pytest.raises(OSError, match="no space"):
        ended(machine, log=full)
    assert "kill" in machine.calls
    assert machine.calls[-2:] == ["reap", "close"]


def test_the_first_error_is_the_one_that_is_told() -> None:
    failed = threading.Event()

    def full(_: bytes) -> None:
        failed.set()
        raise OSError("first")

    sandbox = launched(machine := MadeUp((CANARY, b"x\n"), stays=True), log=full)
    failed.wait(10)
    sandbox._reader.join(10)
    machine.samples.append(ValueError("second"))
    with pytest.raises(OSError, match="first"):
        sandbox.wait()


# -- the end ---------------------------------------------------------------------------------------


def test_who_cancels_ends_it() -> None:
    machine = MadeUp((CANARY, b"building\n"), stays=True)
    sandbox = launched(machine)
    sandbox.cancel()
    sandbox.cancel()
    assert sandbox.wait().ending is Ending.CANCELLED
    assert machine.calls.count("close") == 1


def test_cancelling_after_the_end_changes_nothing() -> None:
    sandbox = launched(MadeUp())
    outcome = sandbox.wait()
    sandbox.cancel()
    assert outcome.ending is Ending.EXITED


@pytest.mark.parametrize(
    ("says", "remains", "ending"),
    [
        (report(), left(0), Ending.EXITED),
        (report(), left(0, Ending.PIDS), Ending.EXITED),
        (report(), left(0, Ending.MEMORY), Ending.MEMORY),
        (report(), left(137), Ending.BROKEN),
        (report(), left(137, Ending.PIDS), Ending.PIDS),
        (report(), left(None), Ending.BROKEN),
        (report(nonce="9999"), left(0), Ending.BROKEN),
        (b"", left(125), Ending.BROKEN),
        (b"\n" + report(3)[1:-1], left(3), Ending.BROKEN),
    ],
    ids=["well", "refused-a-task", "memory", "killed", "pids", "unseen", "forged", "mute", "cut"],
)  # fmt: skip
def test_a_report_is_believed_where_the_host_saw_the_same(
    says: bytes, remains: Remains, ending: Ending
) -> None:
    assert ended(MadeUp((CANARY, says or b"x"), remains=remains)).ending is ending


def test_without_a_report_the_status_is_our_own_trouble() -> None:
    outcome = ended(MadeUp((CANARY,)))
    assert (outcome.ending, outcome.status, outcome.claim) == (Ending.BROKEN, 125, None)


def test_an_engine_that_is_lost_is_told_and_everything_is_let_go_of() -> None:
    machine = MadeUp(trouble=EngineLost("gone"))
    sandbox = launched(machine)
    with pytest.raises(EngineLost):
        sandbox.wait()
    assert machine.calls[-1] == "close"
    assert not sandbox._watcher.is_alive()


# -- the file that it hands out --------------------------------------------------------------------


@pytest.fixture
def outlet(tmp_path: Path) -> Outlet:
    return Outlet(tmp_path, "outlet.sock", lambda _: None, peer_uid=os.geteuid(), most_bytes=1)


def test_an_orderly_end_without_the_file_is_none(outlet: Outlet) -> None:
    with pytest.raises(SandboxFailed, match="did not hand out"):
        ended(MadeUp(), outlet=outlet)


def test_a_build_that_failed_has_no_file_to_hand_out(outlet: Outlet, tmp_path: Path) -> None:
    machine = MadeUp((CANARY, report(7)), remains=left(7))
    assert ended(machine, outlet=outlet).status == 7
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(tmp_path / "outlet.sock"))


def test_of_a_build_that_was_ended_no_file_is_asked_for(outlet: Outlet) -> None:
    sandbox = launched(MadeUp((CANARY,), stays=True), outlet=outlet)
    sandbox.cancel()
    assert sandbox.wait().ending is Ending.CANCELLED

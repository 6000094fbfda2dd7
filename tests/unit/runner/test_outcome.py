"""One ending, one error."""

from dataclasses import replace

import pytest

from builder.model import BuildPlan
from policies.model import Limits
from runner import errors
from runner.errors import RegistryRefused, RunnerError
from runner.outcome import LogTail, require_success
from sandbox.model import Ending, Evidence, Outcome, Usage

LIMITS = Limits(wall_seconds=9, memory_bytes=5 << 20, pids=7, log_bytes=11, disk_bytes=3 << 20)
REFUSED = RegistryRefused("no")


@pytest.fixture
def ended(evidence: Evidence) -> Outcome:
    usage = Usage(wall_seconds=1, cpu_seconds=1, memory_peak_bytes=1)
    return Outcome(
        ending=Ending.EXITED, status=0, command=2, claim=None, evidence=evidence, usage=usage,
        enforced={},
    )  # fmt: skip


def log(text: bytes = b"") -> LogTail:
    tail = LogTail()
    tail.add(text)
    return tail


def test_success_is_silent(ended: Outcome, plan: BuildPlan) -> None:
    require_success(ended, plan, LIMITS, REFUSED, log(b"no space left on device"))


@pytest.mark.parametrize(
    ("ending", "error", "says"),
    [
        (Ending.TIME, errors.TimeExceeded, "9 s"),
        (Ending.MEMORY, errors.MemoryExceeded, "5 MiB"),
        (Ending.PIDS, errors.PidsExceeded, "7 tasks"),
        (Ending.LOG, errors.LogExceeded, "11 bytes"),
        (Ending.CANCELLED, errors.Cancelled, "cancelled"),
        (Ending.BROKEN, errors.SandboxFailed, "without a report"),
    ],
)
def test_each_ending_has_its_own_error_whatever_the_build_claims(
    ended: Outcome, plan: BuildPlan, ending: Ending, error: type[RunnerError], says: str
) -> None:  # fmt: skip
    for status in (0, 1):
        with pytest.raises(error, match=says):
            require_success(
                replace(ended, ending=ending, status=status),
                plan, LIMITS, REFUSED, log(),
            )  # fmt: skip


def test_every_ending_is_known(ended: Outcome, plan: BuildPlan) -> None:
    for ending in set(Ending) - {Ending.EXITED}:
        with pytest.raises(RunnerError):
            require_success(replace(ended, ending=ending), plan, LIMITS, None, log())


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (0, "tar failed around the build"),
        (1, "the build failed: buildah ended with 3"),
        (2, "push failed around the build"),
        (16, "push failed around the build"),
    ],
)
def test_a_failed_command_is_named(
    ended: Outcome, plan: BuildPlan, command: int, says: str
) -> None:
    with pytest.raises(errors.BuildFailed, match=says):
        require_success(replace(ended, status=3, command=command), plan, LIMITS, None, log())


def test_what_the_gateway_refused_explains_a_failure(ended: Outcome, plan: BuildPlan) -> None:
    with pytest.raises(RegistryRefused):
        require_success(replace(ended, status=1), plan, LIMITS, REFUSED, log())


def test_a_full_disk_in_the_sandbox_is_a_limit(ended: Outcome, plan: BuildPlan) -> None:
    full = log(b"cp: write error: No space left on device\n")
    with pytest.raises(errors.DiskExceeded, match="3 MiB"):
        require_success(replace(ended, status=1), plan, LIMITS, None, full)


def test_the_tail_of_the_log_is_bounded_and_its_pieces_are_joined() -> None:
    tail = log(b"No space left ")
    tail.add(b"on device")
    assert b"no space left on device" in tail
    tail.add(b"x" * LogTail.MOST_BYTES)
    assert b"no space left on device" not in tail
    assert len(tail._data) == LogTail.MOST_BYTES

"""From how a sandbox ended to what the user is told. Pure."""

from builder.model import BuildPlan
from policies.model import Limits
from runner.errors import (
    BuildFailed,
    Cancelled,
    DiskExceeded,
    LogExceeded,
    MemoryExceeded,
    PidsExceeded,
    RunnerError,
    SandboxFailed,
    TimeExceeded,
)
from sandbox.model import Ending, Outcome


class LogTail:
    """The last bytes of the build's output; hostile, only ever searched for a phrase."""

    MOST_BYTES = 16 << 10

    def __init__(self) -> None:
        self._data = b""

    def add(self, data: bytes) -> None:
        self._data = (self._data + data)[-self.MOST_BYTES :]

    def __bytes__(self) -> bytes:
        return self._data

    def __contains__(self, phrase: bytes) -> bool:
        return phrase in self._data.lower()


def require_success(
    ended: Outcome, plan: BuildPlan, limits: Limits, refused: RunnerError | None, log: LogTail
) -> None:
    """Returns where every command of the plan ended well.

    Args:
        ended: What the backend reports.
        plan: What was run.
        limits: What the sandbox was given.
        refused: The first thing that the gateway refused this session, if any.
        log: Of the build. Which error a failed build ends in may depend on its own words;
            whether it failed does not.

    Raises:
        RunnerError: One class for each way that a sandbox ends.
    """
    endings: dict[Ending, RunnerError] = {
        Ending.TIME: TimeExceeded(f"the build took longer than {limits.wall_seconds} s"),
        Ending.MEMORY: MemoryExceeded(
            f"the sandbox needed more than {limits.memory_bytes >> 20} MiB of memory"
        ),
        Ending.PIDS: PidsExceeded(f"the sandbox started more than {limits.pids} tasks"),
        Ending.DISK: DiskExceeded(
            f"the sandbox filled more than {limits.disk_bytes >> 20} MiB of its node"
        ),
        Ending.LOG: LogExceeded(f"the build wrote more than {limits.log_bytes} bytes of output"),
        Ending.CANCELLED: Cancelled("the build was cancelled"),
        Ending.BROKEN: SandboxFailed(
            "the sandbox ended without a report",
            advice="The last lines of build.log may say why; runner doctor checks the runtime.",
        ),
    }
    if ended.ending in endings:
        raise endings[ended.ending]
    if ended.status == 0:
        return
    if refused is not None:
        raise refused
    if b"no space left on device" in log:
        raise DiskExceeded(
            f"a file system in the sandbox is full: each holds {limits.disk_bytes >> 20} MiB"
        )
    command = plan.commands[min(ended.command, len(plan.commands) - 1)][0]
    if ended.command == plan.build_command:
        raise BuildFailed(f"the build failed: {command} ended with {ended.status}")
    raise BuildFailed(f"{command} failed around the build: it ended with {ended.status}")

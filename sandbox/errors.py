"""What can go wrong with containment. ``runner.errors`` draws the whole tree."""

from policies.errors import ExitStatus, RunnerError


class IsolationError(RunnerError):
    """The isolation that was decided is not the isolation that could be had."""

    code = "isolation"
    status = ExitStatus.ISOLATION
    default_advice = "runner doctor"


class IsolationUnavailable(IsolationError):
    """This host cannot contain a build as decided. Nothing untrusted was given to a sandbox."""

    code = "isolation-unavailable"


class IsolationMismatch(IsolationError):
    """The sandbox is not what it was asked to be. The context was not released to it."""

    code = "isolation-mismatch"
    default_advice = "Something on this host answers to the runtime's name, as the message tells."


class SandboxFailed(IsolationError):
    """The runtime itself failed, before the build could."""

    code = "sandbox-failed"


class EngineUnavailable(IsolationUnavailable):
    """The container engine does not answer, or not to this user. Nothing was started."""

    code = "engine-unavailable"
    default_advice = (
        "Is it running, and may this user use its socket? That is for root and the socket's group, "
        "often docker, whose members are root on the host: runner doctor --backend docker"
    )


class RuntimeUnknown(IsolationUnavailable):
    """The container engine has no such runtime. Nothing was started."""

    code = "runtime-unknown"


class RuntimeTooOld(IsolationUnavailable):
    """A runtime of a release that was never measured, or that has known holes."""

    code = "runtime-too-old"


class EngineLost(SandboxFailed):
    """The container engine went away in the middle of a build, which ended by that."""

    code = "engine-lost"
    default_advice = (
        "Nothing was published. When the engine is back, runner gc removes what is left of the "
        "sandbox, and the build can be submitted again."
    )

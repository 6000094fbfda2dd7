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

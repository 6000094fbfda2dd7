"""The root of every error that a user can meet, and the errors of policy itself.

``runner.errors`` draws the whole tree.
"""

from enum import IntEnum
from typing import ClassVar


class ExitStatus(IntEnum):
    """What the process ends with. Stable: scripts depend on it."""

    DONE = 0
    BUILD_FAILED = 1
    USAGE = 2
    DENIED = 3
    ISOLATION = 4
    VERIFICATION = 5
    REGISTRY = 6
    LIMIT = 7
    CANCELLED = 8
    BUG = 70


class RunnerError(Exception):
    """Something a user can act on: what happened, to which object, and what to do next.

    Attributes:
        code: Stable, kebab-case, for scripts and documentation.
        status: Exit status of the group this error belongs to.
        advice: The next step, one sentence.
    """

    code: ClassVar[str]
    status: ClassVar[ExitStatus]
    default_advice: ClassVar[str] = ""

    def __init__(self, message: str, *, advice: str | None = None) -> None:
        super().__init__(message)
        self.advice = self.default_advice if advice is None else advice

    @property
    def message(self) -> str:
        return str(self.args[0])


class UsageError(RunnerError):
    """The request itself is wrong."""

    code = "usage"
    status = ExitStatus.USAGE
    default_advice = "runner submit --help"


class InvalidReference(UsageError):
    """An image reference or digest outside the grammar of the distribution specification."""

    code = "invalid-reference"
    default_advice = "Write HOST/REPOSITORY:TAG, in lower case but for the tag."


class PolicyInvalid(UsageError):
    """A policy file that cannot be read or means nothing."""

    code = "policy-invalid"
    default_advice = "Nothing was built. Mend the file; docs/policy.md describes each field."


class PolicyDenied(RunnerError):
    """Policy allows no way to run this build."""

    code = "policy-denied"
    status = ExitStatus.DENIED
    default_advice = "The trace in decision.json names the rule."

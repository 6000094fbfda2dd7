"""What a probe says of a host, row by row."""

from dataclasses import dataclass
from enum import StrEnum

from policies.errors import RunnerError


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    detail: str
    mend: str = ""


def failed(name: str, error: RunnerError) -> Row:
    """The row of something that ended in ``error``."""
    return Row(name=name, verdict=Verdict.FAIL, detail=error.message, mend=error.advice)

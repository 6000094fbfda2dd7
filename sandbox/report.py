"""The two lines that the first process writes to the host, and nothing else of its output.

Both are claims from inside: parsed strictly, bounded, and only ever compared. Pure.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

CANARY_BYTES = 64 << 10
EXIT_BYTES = 2 << 10
COMMANDS = 64
"""In one plan, as ``guest/init.h`` has it."""
_WORD = re.compile(rb"([a-z_]+)=([A-Za-z0-9]*)")
_EXIT_MARK = b"\nrunner-exit 1 nonce="


class ReportInvalid(ValueError):
    """A line that is not what our first process writes."""


def words(line: bytes, kind: bytes) -> Mapping[str, bytes]:
    """The ``name=value`` words of a report line.

    Raises:
        ReportInvalid: Not a line of this kind, or a name twice.
    """
    head, version, *rest = line.split(b" ") if line.count(b" ") >= 1 else (line, b"")
    if head != kind or version != b"1":
        raise ReportInvalid(f"not a line of {kind.decode()}")
    found: dict[str, bytes] = {}
    for word in rest:
        match = _WORD.fullmatch(word)
        if match is None or match[1].decode() in found:
            raise ReportInvalid(f"malformed or repeated word in a line of {kind.decode()}")
        found[match[1].decode()] = match[2]
    return found


def text(found: Mapping[str, bytes], name: str) -> str:
    """A hex value as text; bytes that are no UTF-8 become escapes. Raises ReportInvalid."""
    try:
        return bytes.fromhex(found[name].decode("ascii")).decode("utf-8", "backslashreplace")
    except (KeyError, ValueError):
        raise ReportInvalid(f"no usable {name}") from None


@dataclass(frozen=True, slots=True)
class ExitReport:
    """How the first process says that the commands ended."""

    command: int
    status: int
    claim: str | None


def parse_exit(line: bytes, nonce: str) -> ExitReport:
    """Raises ReportInvalid."""
    found = words(line, b"runner-exit")
    try:
        command, status = int(found["command"]), int(found["status"])
    except (KeyError, ValueError):
        raise ReportInvalid("no usable exit status") from None
    if (
        found.get("nonce") != nonce.encode()
        or not 0 <= status <= 255  # noqa: PLR2004 - exit statuses
        or not 0 <= command <= COMMANDS
    ):
        raise ReportInvalid("exit report of another sandbox")
    return ExitReport(command, status, text(found, "claim").strip()[:256] or None)


class OutputSplitter:
    """Separates the build's output from the exit report, the last line of the stream.

    A build can write such a line too; only the one at the very end counts. The first process alone
    has the way to the host, and writes it after everything else was killed. Still a claim: root in
    the sandbox may take the first process over, and gains an image that is verified as any other.
    """

    def __init__(self) -> None:
        self._held = b""
        self._given = 0

    def feed(self, data: bytes) -> bytes:
        """Takes what arrived, gives what is certainly the build's own output.

        A line's end at the end of the buffer may begin the mark too. It is given all the same:
        otherwise the last line that a build writes would show only when the next one comes.
        """
        buffer = self._held + data
        keep = buffer.rfind(_EXIT_MARK)
        if keep < 0 or len(buffer) - keep > EXIT_BYTES:
            keep = len(buffer) - _overlap(buffer)
        output = buffer[self._given : keep]
        self._given = max(0, self._given - keep)
        self._held = buffer[keep:]
        if self._held == b"\n" and not self._given:
            output, self._given = output + b"\n", 1
        return output

    def finish(self) -> tuple[bytes, bytes | None]:
        """The rest of the output, and the report line if the stream ended with one."""
        if self._held.startswith(_EXIT_MARK) and self._held.endswith(b"\n"):
            line = self._held[1:-1]
            if b"\n" not in line:
                return b"", line
        return self._held[self._given :], None


def _overlap(buffer: bytes) -> int:
    """How many bytes at the end may be the beginning of the mark."""
    for length in range(min(len(_EXIT_MARK) - 1, len(buffer)), 0, -1):
        if buffer.endswith(_EXIT_MARK[:length]):
            return length
    return 0

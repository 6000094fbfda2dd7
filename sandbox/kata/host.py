"""What the Kata preflight asks of a host: files below a root, one ioctl, one process."""

import fcntl
import os
import select
import stat
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_KVM_CREATE_VM = 0xAE01


class Host(Protocol):
    """A host that is looked at.

    Attributes:
        root: Where its file system starts; ``/`` but for hosts that are made up.
    """

    @property
    def root(self) -> Path: ...

    def create_vm(self, device: Path) -> None:
        """Makes a virtual machine without anything in it, and drops it. Raises OSError."""

    def output(self, argv: Sequence[str], at_most: int, within_seconds: float) -> bytes:
        """The first ``at_most`` bytes that a program writes.

        Raises:
            OSError: It cannot be started.
            subprocess.SubprocessError: It failed, or did not end in time.
        """


@dataclass(frozen=True, slots=True)
class ThisHost:
    """The host that this process runs on."""

    root: Path = Path("/")

    def create_vm(self, device: Path) -> None:
        kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.close(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
        finally:
            os.close(kvm)

    def output(self, argv: Sequence[str], at_most: int, within_seconds: float) -> bytes:
        deadline = time.monotonic() + within_seconds
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={}
        ) as process:
            assert process.stdout is not None
            try:
                written = _gather(process.stdout.fileno(), at_most, deadline)
                process.stdout.close()  # who writes on is ended by that
                status = process.wait(max(0.1, deadline - time.monotonic()))
            finally:
                process.kill()
        if status != 0 and len(written) < at_most:
            raise subprocess.CalledProcessError(status, argv, written)
        return written


def _gather(pipe: int, at_most: int, deadline: float) -> bytes:
    written = b""
    while len(written) < at_most:
        remaining = max(0.0, deadline - time.monotonic())
        if not select.select([pipe], [], [], remaining)[0]:
            break
        piece = os.read(pipe, at_most - len(written))
        if not piece:
            break
        written += piece
    return written


def read(path: Path, at_most: int) -> bytes:
    """The first bytes of a regular file. Raises OSError, also for pipes and devices."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(at_most)
    finally:
        os.close(descriptor)


def text(path: Path, at_most: int) -> str:
    """Likewise, whatever its encoding; empty where it cannot be read."""
    try:
        return read(path, at_most).decode("utf-8", "replace")
    except OSError:
        return ""


def printable(words: str) -> str:
    """At most 400 characters for one line of a terminal: others' bytes are shown escaped."""
    cut = words if len(words) <= 400 else f"{words[:400]}..."  # noqa: PLR2004 - the docstring's
    return cut if cut.isprintable() else ascii(cut)

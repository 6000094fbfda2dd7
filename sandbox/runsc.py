"""The ``runsc`` executable of this host: which one, and whether it will do."""

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sandbox.errors import IsolationUnavailable, RuntimeTooOld

OLDEST = 20240729
"""Release of the oldest runsc that the sandbox was measured with (Debian 12 backports)."""
_MOUNTS_EROFS = 20260126
"""First release with it (gVisor's commit cff6d213c)."""
_INSTALL = (
    "Install runsc: deploy/debian/install-host-tools.sh, or see gvisor.dev for other systems."
)
_VERSION_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Runsc:
    """A usable runsc."""

    path: Path
    version: str
    release: int

    @property
    def mounts_erofs(self) -> bool:
        """Whether a mount of type erofs works; older ones show an empty directory instead."""
        return self.release >= _MOUNTS_EROFS


def find(name: str) -> Runsc:
    """The runsc that ``name`` stands for, on PATH or as a path.

    Raises:
        RuntimeTooOld: It is before OLDEST.
        IsolationUnavailable: Absent, or it does not answer.
    """
    found = shutil.which(name)
    if found is None:
        raise IsolationUnavailable(f"gVisor is needed, but {name} is not on PATH", advice=_INSTALL)
    path = Path(found).resolve()
    try:
        status = path.stat()
        shown = _shown_version(path, (status.st_dev, status.st_ino, status.st_ctime_ns))
    except (OSError, subprocess.SubprocessError) as error:
        raise IsolationUnavailable(f"{path} --version failed: {error}", advice=_INSTALL) from None
    first = shown.decode("utf-8", "replace").partition("\n")[0]
    version = first.removeprefix("runsc version ").strip()
    release = re.search(r"\b(20\d{6})\b", version.replace("~", " "))
    if not first.startswith("runsc version ") or release is None:
        raise IsolationUnavailable(f"{path} does not say which release of runsc it is: {first!r}")
    if int(release[1]) < OLDEST:
        raise RuntimeTooOld(
            f"{path} is of {release[1]}; runsc {OLDEST} or newer is needed", advice=_INSTALL
        )
    return Runsc(path, version, int(release[1]))


@functools.lru_cache(maxsize=4)
def _shown_version(path: Path, identity: tuple[int, int, int]) -> bytes:
    """What ``--version`` writes. A build asks three times, 25 ms each; another file asks anew."""
    del identity
    return subprocess.run(
        [path, "--version"], capture_output=True, timeout=_VERSION_SECONDS, check=True, env={}
    ).stdout[:4096]


def command(runsc: Runsc, state: Path, *arguments: str) -> list[str]:
    """How runsc is called for every sandbox.

    rootless: all its processes run as the calling user, without subordinate ids. network none:
    loopback is the only interface there is. host-uds open: the gateway's socket, the only one in
    any mount, can be connected to. overlay2 none: every writable place is a bounded tmpfs. directfs
    false: the gofer keeps mounts read-only on the host; otherwise root of the sandbox, who can
    remount them, writes to the host's files as whoever the sandbox is there. Never --platform=kvm:
    it hangs where the virtual machine is a nested one.
    """
    return [
        str(runsc.path),
        "--rootless",
        f"--root={state}",
        "--network=none",
        "--host-uds=open",
        "--overlay2=none",
        "--directfs=false",
        "--ignore-cgroups",
        *arguments,
    ]


def user_namespaces_refused() -> str | None:
    """Why this host gives an ordinary user no user namespace, or None where it does."""
    for path, bad in (
        ("/proc/sys/user/max_user_namespaces", "0"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
    ):
        try:
            value = Path(path).read_text().strip()
        except OSError:
            continue
        if value == bad:
            return f"{path} is {value}"
    return None

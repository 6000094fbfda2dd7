"""Kata Containers: the shim of this host, and what a host must have for its virtual machines.

Nothing here proves isolation. Only a container whose kernel is not the host's does, which the
canary sees; the rows of ``preflight`` say why there is none, and what mends it.
"""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sandbox.errors import IsolationUnavailable, RuntimeTooOld
from sandbox.kata import config as kata_config
from sandbox.kata.config import Configuration
from sandbox.kata.host import Host, printable, read, text
from sandbox.rows import Row, Verdict

SHIM = "containerd-shim-kata-v2"
OLDEST = (3, 31, 0)
"""Before it a build may get the host's root mounted: GHSA-rr59-xxvx-96qr, GHSA-2gv2-cffp-j227."""

NOT_ENFORCED: Mapping[str, str] = MappingProxyType(
    # Measured up to 4.1: the runtime clears the container's pids limit before the guest sees it.
    # RLIMIT_NPROC is no limit for uid 0 of the initial user namespace; there memory and time end a
    # fork bomb, which is the guest's own.
    {"pids": "not enforced (ulimit -u inside, which does not bind root of the guest)"}
)
"""What Kata does not keep of our limits, as ``Outcome.enforced`` says it."""

_DEFAULT_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_INSTALL = f"Install Kata {'.'.join(map(str, OLDEST))} or later, its shim on containerd's PATH."
_VERSION = re.compile(r"\bversion: v?((\d{1,6})\.(\d{1,6})\.(\d{1,6})[-+.~\w]*)")
_VERSION_SECONDS = 10
_VERSION_BYTES = 4096
_VMM_MEMORY_MIB = 128


@dataclass(frozen=True, slots=True)
class Shim:
    """The program that containerd starts for each Kata container.

    Attributes:
        path: Of the file.
        version: Major, minor, patch.
        shown: The version as it says it itself.
        rust: Whether it is the one in Rust, whose configuration lies apart.
    """

    path: Path
    version: tuple[int, int, int]
    shown: str
    rust: bool = False

    @property
    def older(self) -> bool:
        """Whether it is before OLDEST, whose release candidates are."""
        return self.version < OLDEST or (self.version == OLDEST and "-" in self.shown)


@dataclass(frozen=True, slots=True)
class _SearchPath:
    """Where a containerd looks for shims, and how that is known."""

    directories: tuple[str, ...]
    known_from: str


def find_shim(host: Host) -> Shim:
    """The shim that this host's containerd would start, or dockerd's own containerd.

    Raises:
        IsolationUnavailable: Absent, or it does not say its version.
    """
    return ask(host, _locate(host)[0])


def require_version(shim: Shim, allow_older: bool) -> str:
    """The version as evidence has it; it says so when an older one was allowed.

    Raises:
        RuntimeTooOld: It is older, and that was not allowed.
    """
    if not shim.older:
        return shim.shown
    oldest = ".".join(map(str, OLDEST))
    if allow_older:
        return f"{shim.shown} (older than {oldest}; allowed by configuration)"
    raise RuntimeTooOld(
        f"{shim.path} is Kata {shim.shown}; {oldest} or later is needed, "
        "as older ones can be made to mount the host's root into a guest",
        advice=_INSTALL,
    )


def _locate(host: Host) -> tuple[Path, _SearchPath]:
    looked = _search_paths(host.root)
    for place in looked:
        below = [str(host.root / name.lstrip("/")) for name in place.directories]
        if found := shutil.which(SHIM, path=os.pathsep.join(below)):
            return Path(found), place
    where = "; ".join(
        f"{place.known_from}: {printable(os.pathsep.join(place.directories))}" for place in looked
    )
    raise IsolationUnavailable(f"no {SHIM} on {where}", advice=_INSTALL)


def _search_paths(root: Path) -> list[_SearchPath]:
    """One for each containerd that runs; of dockerd if none does: it would start one."""
    for name in ("containerd", "dockerd"):
        found = [_search_path(root, process, name) for process in _processes(root, name)]
        if places := [place for place in found if place is not None]:
            return places
    return [_SearchPath(_DEFAULT_PATH, "the default PATH, as no containerd runs")]


def _processes(root: Path, name: str) -> list[Path]:
    """Those of root and our own: what others put on a PATH must not be started by us."""
    found = []
    for path in root.glob("proc/[0-9]*"):
        uid = re.search(r"^Uid:\s+(\d+)", text(path / "status", 4096), re.MULTILINE)
        if uid and int(uid[1]) in {0, os.geteuid()} and text(path / "comm", 64).strip() == name:
            found.append(path)
    return sorted(found, key=lambda path: int(path.name))


def _search_path(root: Path, process: Path, called: str) -> _SearchPath | None:
    """None for a process of another root: a container's, which may call itself anything."""
    name = f"{called} (process {process.name})"
    try:
        if not os.path.samestat((process / "root").stat(), root.stat()):
            return None
        variables = read(process / "environ", 1 << 20).split(b"\0")
        # containerd looks beside its own file, too.
        beside = str((process / "exe").readlink().parent)
    except OSError:
        return _SearchPath(_DEFAULT_PATH, f"the default PATH, as that of {name} cannot be read")
    paths = (os.fsdecode(v.removeprefix(b"PATH=")) for v in variables if v.startswith(b"PATH="))
    named = next(paths, "").split(os.pathsep)
    # Go's LookPath takes nothing from relative directories.
    return _SearchPath(
        tuple(path for path in (*named, beside) if path.startswith("/")), f"the PATH of {name}"
    )


def ask(host: Host, path: Path) -> Shim:
    """What ``path --version`` says. Raises IsolationUnavailable where that is not of Kata."""
    try:
        written = host.output([str(path), "--version"], _VERSION_BYTES, _VERSION_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise IsolationUnavailable(
            f"{path} --version failed: {printable(str(error))}", advice=_INSTALL
        ) from None
    first = written.decode("utf-8", "replace").partition("\n")[0]
    version = _VERSION.search(first)
    if "kata" not in first.lower() or version is None:
        raise IsolationUnavailable(
            f"{path} does not say which version of Kata it is: {printable(first)}", advice=_INSTALL
        )
    major, minor, patch = map(int, version.group(2, 3, 4))
    return Shim(path, (major, minor, patch), version[1], "(Rust)" in first)


def preflight(
    host: Host, *, allow_older: bool = False, configuration: Path | None = None
) -> Iterator[Row]:
    """Looks at everything that a Kata container needs, and starts none.

    Args:
        host: Which is looked at.
        allow_older: Whether the operator allowed a Kata before OLDEST.
        configuration: That the runtime's entry names (ConfigPath); else the shim's default.
    """
    shim, shim_rows = _shim(host, allow_older)
    loaded, configuration_row = _configuration(host.root, shim, configuration)
    yield _kvm(host)
    yield _processor(host.root)
    yield _module(host.root)
    yield _vhost_vsock(host.root, loaded)
    yield _vhost_net(host.root, loaded)
    yield _device(host.root, "net/tun", "The guest's interface hangs on it", "modprobe tun")
    yield from shim_rows
    yield configuration_row
    if loaded is not None:
        yield _files(host.root, loaded)
        yield from _settings(loaded)
    yield _propagation(host.root)
    yield _memory(host.root, loaded)


def _row(verdict: Verdict, name: str, detail: str, mend: str = "") -> Row:
    return Row(name=f"kata {name}", verdict=verdict, detail=detail, mend=mend)


def _kvm(host: Host) -> Row:
    device = host.root / "dev/kvm"
    mend = "modprobe kvm_intel or kvm_amd; in a virtual machine its provider must allow nesting"
    try:
        host.create_vm(device)
    except PermissionError:
        detail = f"{device}: uid {os.geteuid()} may not open it, so nothing was tried"
        return _row(Verdict.WARN, "kvm", detail, "Run runner doctor as root, as containerd is.")
    except OSError as error:
        return _row(Verdict.FAIL, "kvm", f"{device}: {error.strerror or error}", mend)
    # Measured with kvm_pvm: KVM_CREATE_VM succeeds, and no stock kernel boots.
    detail = f"{device} makes a virtual machine; whether a guest boots in it, only one shows"
    return _row(Verdict.OK, "kvm", detail)


def _processor(root: Path) -> Row:
    # One processor's entry will do, and has some 2 KB.
    shown = text(root / "proc/cpuinfo", 64 << 10)
    flags = next((line.split() for line in shown.splitlines() if line.startswith("flags")), None)
    if flags is None:
        detail = "/proc/cpuinfo has no flags of an x86 processor: the row of kvm must do"
        return _row(Verdict.WARN, "cpu", detail, "Other processors were not tried.")
    virtual = [flag for flag in ("vmx", "svm") if flag in flags]
    nested = "hypervisor" in flags
    mend = "Use a host of bare metal, or a provider that documents nested virtualisation."
    if not virtual:
        where = "in this virtual machine" if nested else "here: it may be off in the firmware"
        return _row(Verdict.FAIL, "cpu", f"neither vmx nor svm {where}", mend)
    if nested:
        detail = f"{virtual[0]}, nested: this host is a virtual machine itself, and guests are slow"
        return _row(Verdict.WARN, "cpu", detail, mend)
    return _row(Verdict.OK, "cpu", virtual[0])


def _module(root: Path) -> Row:
    names = [n for n in ("kvm_intel", "kvm_amd", "kvm_pvm") if (root / "sys/module" / n).exists()]
    mend = "modprobe kvm_intel or kvm_amd, on a host whose processor has vmx or svm"
    if not names:
        return _row(Verdict.WARN, "kvm module", "neither kvm_intel nor kvm_amd is loaded", mend)
    if names == ["kvm_pvm"]:
        detail = "kvm_pvm alone: it makes virtual machines in which no stock kernel boots"
        return _row(Verdict.WARN, "kvm module", detail, mend)
    return _row(Verdict.OK, "kvm module", names[0])


def _device(root: Path, name: str, meaning: str, mend: str) -> Row:
    path = root / "dev" / name
    row = name.rpartition("/")[2]
    try:
        if stat.S_ISCHR(path.stat().st_mode):
            return _row(Verdict.OK, row, str(path))
        trouble = "no character device"
    except OSError as error:
        trouble = os.strerror(error.errno or 0)
    return _row(Verdict.FAIL, row, f"{path}: {trouble}. {meaning}.", mend)


def _vhost_vsock(root: Path, loaded: Configuration | None) -> Row:
    if loaded is not None and not loaded.needs_vhost_vsock:
        return _row(Verdict.OK, "vhost-vsock", f"not needed by {_machines(loaded)}")
    return _device(
        root, "vhost-vsock", "QEMU reaches the guest's agent by it", "modprobe vhost_vsock"
    )


def _vhost_net(root: Path, loaded: Configuration | None) -> Row:
    if loaded is not None and not loaded.needs_vhost_net:
        return _row(Verdict.OK, "vhost-net", "not needed: disable_vhost_net is true")
    mend = "modprobe vhost_net, or disable_vhost_net = true in Kata's configuration"
    return _device(root, "vhost-net", "The guest's network card needs it", mend)


def _shim(host: Host, allow_older: bool) -> tuple[Shim | None, list[Row]]:
    try:
        path, place = _locate(host)
        shim = ask(host, path)
    except IsolationUnavailable as error:
        return None, [_row(Verdict.FAIL, "shim", error.message, error.advice)]
    rows = [_row(Verdict.OK, "shim", f"{path}, on {place.known_from}")]
    try:
        words = require_version(shim, allow_older)
    except IsolationUnavailable as error:
        return shim, [*rows, _row(Verdict.FAIL, "version", error.message, error.advice)]
    if shim.older:
        return shim, [*rows, _row(Verdict.WARN, "version", f"{words}; evidence says so", _INSTALL)]
    return shim, [*rows, _row(Verdict.OK, "version", words)]


def _configuration(
    root: Path, shim: Shim | None, named: Path | None
) -> tuple[Configuration | None, Row]:
    rust = shim is not None and shim.rust
    try:
        found = (
            kata_config.find(root, rust=rust)
            if named is None
            else kata_config.Found(root / str(named).lstrip("/"), default=True)
        )
        if found is None:
            detail = "no configuration.toml where Kata's shim looks for it"
            mend = "Install Kata with its configuration, or name the file in the runtime's entry."
            return None, _row(Verdict.FAIL, "config", detail, mend)
        loaded = kata_config.load(found.path)
    except (OSError, ValueError) as error:
        mend = "Restore the file that Kata ships, and put changes into config.d beside it."
        return None, _row(Verdict.FAIL, "config", printable(str(error)), mend)
    where = f"{printable(str(found.path))}, {_machines(loaded)}"
    if found.default:
        return loaded, _row(Verdict.OK, "config", where)
    detail = f"{where}: not one that the shim takes by itself"
    mend = "Name it in the runtime's entry (ConfigPath), or link configuration.toml to it."
    return loaded, _row(Verdict.WARN, "config", detail, mend)


def _machines(loaded: Configuration) -> str:
    return printable(", ".join(loaded.hypervisor))


def _files(root: Path, loaded: Configuration) -> Row:
    named = [pair for machine in loaded.hypervisor.values() for pair in machine.files()]
    missing = [f"{key} {printable(path)}" for key, path in named if not _is_file(root, path)]
    if missing:
        mend = "Install what is missing, or correct the paths in Kata's configuration."
        return _row(Verdict.FAIL, "files", f"no such file: {', '.join(missing)}", mend)
    if not {"image", "initrd"} & {key for key, _ in named}:
        mend = "Set image, or initrd, in Kata's configuration."
        return _row(Verdict.WARN, "files", "neither an image nor an initrd is named", mend)
    keys = dict.fromkeys(key for key, _ in named)
    return _row(Verdict.OK, "files", f"there: {', '.join(keys)}")


def _is_file(root: Path, path: str) -> bool:
    try:
        return stat.S_ISREG((root / path.lstrip("/")).stat().st_mode)
    except (OSError, ValueError):  # ValueError: a path with a NUL in it
        return False


def _settings(loaded: Configuration) -> Iterator[Row]:
    fell = [trap for trap in kata_config.TRAPS if trap.found(loaded)]
    for trap in fell:
        yield _row(trap.verdict, "setting", f"{trap.setting} {trap.detail}", trap.mend)
    opened = kata_config.open_annotations(loaded)
    if opened:
        detail = (
            f"enable_annotations opens {printable(', '.join(opened))} to whoever starts containers"
        )
        mend = "Take these out of enable_annotations; runner itself sends no annotation."
        yield _row(Verdict.WARN, "setting", detail, mend)
    if not fell and not opened:
        yield _row(Verdict.OK, "setting", "none that is known to weaken a sandbox")


def _propagation(root: Path) -> Row:
    """Kata's shared directory is a slave of another one: without a peer group it stays empty."""
    at = {}
    for line in text(root / "proc/self/mountinfo", 8 << 20).splitlines():
        fields = line.split(" - ")[0].split()
        if len(fields) > 4:  # noqa: PLR2004 - proc(5): the fifth is the mount point
            at[fields[4]] = any(field.startswith("shared:") for field in fields[6:])
    point = "/run" if "/run" in at else "/"
    if at.get(point, False):
        return _row(Verdict.OK, "mounts", f"{point} is shared")
    detail = f"{point} is not a shared mount: guests would not see their root file systems"
    mend = f"mount --make-rshared {point}, before containerd starts"
    return _row(Verdict.FAIL, "mounts", detail, mend)


def _memory(root: Path, loaded: Configuration | None) -> Row:
    """One machine without its container, whose memory limit is added to it (measured)."""
    default_mib = kata_config.SHIPPED_MEMORY_MIB if loaded is None else loaded.memory_mib
    needed_mib = default_mib + _VMM_MEMORY_MIB
    shown = re.search(r"^MemAvailable: +(\d+) kB$", text(root / "proc/meminfo", 8192), re.MULTILINE)
    if shown is None:
        mend = "mount -t proc proc /proc"
        return _row(Verdict.WARN, "memory", "/proc/meminfo does not say what is available", mend)
    free_mib = int(shown[1]) >> 10
    detail = f"{free_mib} MiB available, {needed_mib} MiB for a guest without its build's limit"
    if free_mib < needed_mib:
        mend = "Free memory, or lower default_memory in Kata's configuration."
        return _row(Verdict.FAIL, "memory", detail, mend)
    return _row(Verdict.OK, "memory", detail)

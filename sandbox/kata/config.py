"""Kata's configuration file: which one, what it names, and what in it weakens a sandbox."""

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sandbox.kata.host import printable, read
from sandbox.rows import Verdict

_DIRECTORIES = (
    "etc/kata-containers",
    "usr/share/defaults/kata-containers",
    "opt/kata/share/defaults/kata-containers",
)
_MAX_BYTES = 256 << 10
"""Of one file; those that Kata 4.1 ships have 30 KB, comments included."""
_MAX_DROP_INS = 64
SHIPPED_MEMORY_MIB = 2048

_HARMLESS_ANNOTATIONS = frozenset(
    {"enable_iommu", "kernel_verity_params", "default_vcpus", "default_memory"}
)
"""Of those that Kata 4.1 ships as enabled. ``kernel_params`` is one more that it ships, and no
harmless one: it can start a debug console in the guest."""

_FILES = ("path", "jailer_path", "kernel", "image", "initrd", "firmware", "firmware_volume")
_Text = Annotated[str, Field(max_length=4096)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Hypervisor(_Table):
    """``[hypervisor.NAME]``; only what is looked at."""

    path: _Text = ""
    jailer_path: _Text = ""
    kernel: _Text = ""
    image: _Text = ""
    initrd: _Text = ""
    firmware: _Text = ""
    firmware_volume: _Text = ""
    pflashes: tuple[_Text, ...] = ()
    shared_fs: str = "virtio-fs"
    virtio_fs_daemon: _Text = ""
    default_memory: int = 0
    enable_annotations: tuple[str, ...] = ()
    disable_vhost_net: bool = False
    extra_monitor_socket: str = ""

    @property
    def memory_mib(self) -> int:
        return self.default_memory if self.default_memory > 0 else SHIPPED_MEMORY_MIB

    def files(self) -> Iterator[tuple[str, str]]:
        """Key and path of each file that a machine cannot start without."""
        for key in _FILES:
            if path := getattr(self, key):
                yield key, path
        for path in self.pflashes:
            yield "pflashes", path
        # Dragonball and Firecracker share files otherwise, whatever the daemon's key says.
        if self.virtio_fs_daemon and self.shared_fs in {"virtio-fs", "virtio-fs-nydus"}:
            yield "virtio_fs_daemon", self.virtio_fs_daemon


class Agent(_Table):
    """``[agent.NAME]``."""

    debug_console_enabled: bool = False


class Runtime(_Table):
    """``[runtime]``."""

    sandbox_cgroup_only: bool = False
    disable_new_netns: bool = False
    disable_guest_seccomp: bool = False
    internetworking_model: str = ""


class Configuration(_Table):
    """One configuration file with its drop-ins."""

    hypervisor: Mapping[str, Hypervisor] = Field(min_length=1)
    agent: Mapping[str, Agent] = {}
    runtime: Runtime = Runtime()

    @property
    def needs_vhost_vsock(self) -> bool:
        """QEMU does; the other machines speak to their agent through a Unix socket."""
        return "qemu" in self.hypervisor

    @property
    def needs_vhost_net(self) -> bool:
        return not all(machine.disable_vhost_net for machine in self.hypervisor.values())

    @property
    def memory_mib(self) -> int:
        return max(machine.memory_mib for machine in self.hypervisor.values())


@dataclass(frozen=True, slots=True)
class Found:
    """Where a configuration is.

    Attributes:
        path: Below the host's root, as the shim would open it.
        default: Whether the shim takes it by itself; others a runtime's entry must name.
    """

    path: Path
    default: bool


def find(root: Path, *, rust: bool) -> Found | None:
    """The file that the shim takes where no runtime's entry names one, or else any there is.

    The shim in Rust has a directory of its own, and reads no other.
    """
    places = [root / name / ("runtime-rs" if rust else "") for name in _DIRECTORIES]
    for place in places:
        if (path := place / "configuration.toml").exists():
            return Found(path, default=True)
    for place in places:
        # Since 3.2x kata-deploy keeps a directory per runtime, and links to them.
        for pattern in ("configuration-*.toml", "runtimes/*/configuration*.toml"):
            if paths := sorted(place.glob(pattern)):
                return Found(paths[0], default=False)
    return None


def load(path: Path) -> Configuration:
    """The configuration with its drop-ins, which lie beside the file that a link leads to.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not what Kata reads; the message is fit for a terminal.
    """
    merged = _toml(path)
    drop_ins = sorted((path.resolve().parent / "config.d").glob("*"))
    if len(drop_ins) > _MAX_DROP_INS:
        raise ValueError(f"{path}: more than {_MAX_DROP_INS} drop-ins")
    for drop_in in drop_ins:
        merged = _merge(merged, _toml(drop_in))
    try:
        return Configuration.model_validate(merged)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = printable(".".join(map(str, first["loc"])))
        raise ValueError(f"{path}: {key}: {first['msg']}") from None


def _toml(path: Path) -> dict[str, object]:
    content = read(path, _MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{path}: more than {_MAX_BYTES} bytes")
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {printable(str(error))}") from None


def _merge(base: dict[str, object], other: dict[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in other.items():
        under = merged.get(key)
        if isinstance(under, dict) and isinstance(value, dict):
            merged[key] = _merge(under, value)
        else:
            merged[key] = value
    return merged


@dataclass(frozen=True, slots=True)
class Trap:
    """A setting that makes less of a sandbox than it looks, or none at all."""

    setting: str
    verdict: Verdict
    found: Callable[[Configuration], bool]
    detail: str
    mend: str


TRAPS = (
    Trap(
        "internetworking_model",
        Verdict.FAIL,
        lambda c: c.runtime.internetworking_model == "none",
        'is "none": the guest gets no interface, and so no way to the gateway',
        'internetworking_model = "tcfilter"',
    ),
    Trap(
        "disable_new_netns",
        Verdict.FAIL,
        lambda c: c.runtime.disable_new_netns,
        "is true: the VMM stands in the host's network namespace",
        "disable_new_netns = false",
    ),
    Trap(
        "sandbox_cgroup_only",
        Verdict.WARN,
        # Measured: --memory and --cpus add to the machine, and leave the VMM on the host unbounded.
        lambda c: not c.runtime.sandbox_cgroup_only,
        "is false: a container's limits bound the guest, not its VMM on the host",
        "sandbox_cgroup_only = true, and in Kubernetes a RuntimeClass with overhead",
    ),
    Trap(
        "disable_guest_seccomp",
        Verdict.WARN,
        lambda c: c.runtime.disable_guest_seccomp,
        "is true, as shipped: the container's seccomp profile is not applied in the guest",
        "disable_guest_seccomp = false, where the guest's kernel and agent have seccomp",
    ),
    Trap(
        "debug_console_enabled",
        Verdict.WARN,
        lambda c: any(agent.debug_console_enabled for agent in c.agent.values()),
        "is true: whoever reaches the guest's vsock gets a shell of root in it",
        "debug_console_enabled = false",
    ),
    Trap(
        "extra_monitor_socket",
        Verdict.WARN,
        lambda c: any(machine.extra_monitor_socket for machine in c.hypervisor.values()),
        "is set: whoever opens that socket commands QEMU",
        'extra_monitor_socket = ""',
    ),
)


def open_annotations(configuration: Configuration) -> list[str]:
    """What ``enable_annotations`` lets a container's author change that is not harmless."""
    enabled = {
        a for machine in configuration.hypervisor.values() for a in machine.enable_annotations
    }
    return sorted(enabled - _HARMLESS_ANNOTATIONS)

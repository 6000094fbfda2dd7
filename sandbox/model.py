"""What is launched, and what came of it."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from builder.model import BuildPlan
from policies.model import Isolation, Limits
from sandbox.errors import IsolationUnavailable
from sandbox.rows import Row

GATEWAY_SOCKET = "gateway.sock"
OUTLET_SOCKET = "outlet.sock"
GATEWAY_PORT = 5000
"""On the sandbox's own loopback, where the first process forwards to the gateway's socket."""
FILES_LIMIT = 1_048_576
"""buildah sets RLIMIT_NOFILE to this and fails where it may not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """One sandbox, still plain data.

    Attributes:
        root: The builder's root filesystem, already verified.
        root_digest: What it is known by where it is kept in another form.
        image: What a cluster pulls it as, by digest; empty where it was never pushed.
        inputs: Files of the host by their names below DOOR, there once the canary was accepted.
        images: EROFS images of the host by where they are mounted, read-only.
        gateway: Whether a gateway listens in the place.
        rootless: Whether no process of the sandbox may be host uid 0, or hold a capability in the
            initial user namespace; ``launch`` ends in IsolationMismatch where one is or does.
    """

    isolation: Isolation
    limits: Limits
    plan: BuildPlan
    root: Path
    root_digest: str
    image: str = ""
    inputs: Mapping[str, Path] = field(default_factory=dict)
    images: Mapping[str, Path] = field(default_factory=dict)
    gateway: bool = True
    rootless: bool = False


class Provided(StrEnum):
    """How a base image comes into the build's sandbox."""

    MOUNTED = "mounted"
    """Unpacked before, mounted read-only."""
    COPIED = "copied"
    """Unpacked before, and copied into the sandbox's memory: this runtime or this image cannot
    be mounted."""
    PULLED = "pulled"
    """By the build itself, through the gateway."""


class Ending(StrEnum):
    """Why a sandbox ended."""

    EXITED = "exited"
    TIME = "time"
    MEMORY = "memory"
    PIDS = "pids"
    DISK = "disk"
    LOG = "log"
    CANCELLED = "cancelled"
    BROKEN = "broken"
    """The runtime ended without the report that every orderly end has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProcess:
    """One process of the sandbox as the host shows it."""

    role: str
    uid: int
    capabilities: int
    initial_user_namespace: bool
    seccomp: int
    no_new_privileges: bool


@dataclass(frozen=True, slots=True)
class HostView:
    """A sandbox as its host shows it to whoever shares that host."""

    processes: tuple[HostProcess, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """A sandbox as the API of its cluster shows it: nobody looked at the node itself.

    Attributes:
        node_kernel: Release of the node's own kernel, as its kubelet reports it.
        pod: Unique identifier of the pod.
        runtime_class: That the pod was admitted with; empty for the nodes' default runtime.
        handler: What the class stands for on the nodes.
        image: Of the builder, as the kubelet resolved it.
    """

    node: str
    node_kernel: str
    pod: str
    runtime_class: str
    handler: str
    image: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was observed of the sandbox, inside and outside, before anything untrusted was read.

    A type of its own: never to be taken for the isolation that was asked for.
    """

    isolation: Isolation
    kernel_release: str
    kernel_version: str
    runtime: str
    runtime_version: str
    interfaces: tuple[str, ...]
    inside_uid: int
    outside: HostView | ClusterView


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the sandbox used; None for what nobody could see from outside."""

    wall_seconds: float
    cpu_seconds: float | None
    memory_peak_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a sandbox ended.

    Attributes:
        status: Of the last command; a claim from inside, meaningful for EXITED alone.
        command: Index of that command in the plan; likewise.
        claim: The digest that the builder says it pushed, unchecked and at most 256 characters.
        enforced: Limit by limit, what kept it: ``cgroup v1``, ``cgroup v2``, ``cgroup of the
            engine``, ``supervisor``, ``sandbox kernel`` or ``host kernel``; or words that begin
            with ``not enforced``.
    """

    ending: Ending
    status: int
    command: int
    claim: str | None
    evidence: Evidence
    usage: Usage
    enforced: Mapping[str, str]


class Sandbox(Protocol):
    """A launched sandbox whose canary was accepted. Every method may be called from any thread."""

    evidence: Evidence

    def wait(self) -> Outcome:
        """Blocks until the sandbox is gone."""

    def cancel(self) -> None:
        """Asks for the end; ``wait`` then reports CANCELLED."""

    def abandon(self) -> None:
        """Ends it where nobody waited for its end, and leaves no thread of it. Raises nothing."""


class Place(Protocol):
    """Where one sandbox will be: reserved before it starts, so that the gateway can listen.

    A lock says that it is in use; ``gc`` takes what is not.
    """

    @property
    def door(self) -> Path:
        """Host directory that appears read-only at DOOR inside; the gateway's socket goes here."""

    @property
    def peer_uid(self) -> int:
        """Host uid that the sandbox's processes connect with."""

    def release(self) -> None:
        """Leaves no process, mount or file of the sandbox behind. May be called twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What can be had of a backend now.

    Attributes:
        refused: Of each isolation that cannot be had, why, and what mends it.
        rootless: Whether no process of its sandboxes is root on the host.
    """

    refused: Mapping[Isolation, IsolationUnavailable]
    rootless: bool

    @property
    def isolations(self) -> frozenset[Isolation]:
        """That can be had."""
        return frozenset(Isolation) - self.refused.keys()


def unheard(words: str) -> None:
    """Where nobody wants to know."""
    del words


class Backend(Protocol):
    """Where sandboxes are launched.

    Attributes:
        confined: Whether its sandboxes may have no capability beyond Pod Security's baseline.
    """

    name: str
    confined: bool

    def offer(self) -> Offer:
        """What sandboxes can be had here; cheap, and raises nothing."""

    def reserve(self, build_id: str) -> Place:
        """A place for one sandbox. Raises SandboxFailed where none can be had."""

    def provides(self, isolation: Isolation) -> Provided:
        """The best way for base images into its sandboxes of ``isolation``."""

    def probe(self, isolation: Isolation) -> Iterator[Row]:
        """Looks at all that sandboxes of ``isolation`` need, and tries one. For ``doctor``."""

    def clean(self, directory: Path) -> None:
        """Ends the sandbox whose place is ``directory``, where its runner is gone; removes all.

        Raises:
            IsolationError: Something of it could not be removed, or nobody can tell.
        """

    def sweep(self, roots: Collection[str]) -> Iterator[str]:
        """Removes what is of no place any more, and says what.

        Args:
            roots: Digests of the root filesystems that are installed.
        """

    def launch(
        self,
        place: Place,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Callable[[memoryview], None] | None = None,
        waiting: Callable[[str], None] = unheard,
    ) -> Sandbox:
        """Starts the sandbox, accepts its canary, and releases the context.

        Args:
            place: From ``reserve`` of this backend, used once.
            spec: What to start.
            log: Gets the build's raw output in pieces, from another thread.
            collect: Gets the plan's ``output``, at most the limits' ``disk_bytes`` of it, likewise.
            waiting: Is told again and again what the sandbox still waits for, where that may take
                long; nothing, while it does not. What it raises ends the launch.

        Raises:
            IsolationUnavailable: It cannot be had, whatever was offered.
            IsolationMismatch: It is not what was asked for; it is gone again.
            SandboxFailed: The runtime did not start it.
        """

"""Backends beside the real one: what they answer is said before, what is asked of them shows."""

from collections.abc import Callable
from dataclasses import dataclass, field

from policies.model import Isolation
from runner.errors import IsolationUnavailable, SandboxFailed
from sandbox.model import Backend, Place, Sandbox, SandboxSpec


class StatedBackend:
    """Offers the isolations that it is given, and starts nothing."""

    def __init__(self, name: str, *isolations: Isolation) -> None:
        self.name = name
        self.isolations = isolations
        self.asked: list[Isolation] = []

    def require(self, isolation: Isolation) -> None:
        self.asked.append(isolation)
        if isolation not in self.isolations:
            raise IsolationUnavailable(f"no {isolation} by {self.name}", advice=f"get {self.name}")

    def reserve(self, build_id: str) -> Place:
        raise SandboxFailed(f"{self.name} has no place for {build_id}")

    def mounts_images(self) -> bool:
        return False

    def launch(
        self,
        place: Place,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Callable[[memoryview], None] | None = None,
    ) -> Sandbox:
        raise SandboxFailed(f"{self.name} launches nothing in {place.door}")


@dataclass
class WatchedBackend:
    """Another one under a name of its own.

    Attributes:
        specs: Of all that was launched.
    """

    name: str
    real: Backend
    specs: list[SandboxSpec] = field(default_factory=list)

    def require(self, isolation: Isolation) -> None:
        self.real.require(isolation)

    def reserve(self, build_id: str) -> Place:
        return self.real.reserve(build_id)

    def mounts_images(self) -> bool:
        return self.real.mounts_images()

    def launch(
        self,
        place: Place,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Callable[[memoryview], None] | None = None,
    ) -> Sandbox:
        self.specs.append(spec)
        return self.real.launch(place, spec, log, collect)

"""Backends beside the real one: what they answer is said before, what is asked of them shows."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from policies.model import Isolation
from runner.errors import IsolationUnavailable, SandboxFailed
from sandbox.model import (
    Backend,
    Evidence,
    HostProcess,
    HostView,
    Offer,
    Place,
    Provided,
    Sandbox,
    SandboxSpec,
    unheard,
)
from sandbox.rows import Row


class StatedBackend:
    """Offers the isolations that it is given, and starts nothing."""

    def __init__(self, name: str, *isolations: Isolation, rootless: bool = True) -> None:
        self.name = name
        self.confined = False
        self.isolations = isolations
        self.rootless = rootless
        self.asked = 0

    def offer(self) -> Offer:
        self.asked += 1
        refused = {
            each: IsolationUnavailable(f"no {each} by {self.name}", advice=f"get {self.name}")
            for each in Isolation
            if each not in self.isolations
        }
        return Offer(refused=refused, rootless=self.rootless)

    def probe(self, isolation: Isolation) -> Iterator[Row]:
        del isolation
        yield from ()

    def clean(self, directory: Path) -> None:
        raise SandboxFailed(f"{self.name} has no {directory}")

    def sweep(self, roots: Collection[str]) -> Iterator[str]:
        del roots
        yield from ()

    def reserve(self, build_id: str) -> Place:
        raise SandboxFailed(f"{self.name} has no place for {build_id}")

    def provides(self, isolation: Isolation) -> Provided:
        del isolation
        return Provided.PULLED

    def launch(
        self,
        place: Place,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Callable[[memoryview], None] | None = None,
        waiting: Callable[[str], None] = unheard,
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
    confined: bool = False

    def offer(self) -> Offer:
        return self.real.offer()

    def probe(self, isolation: Isolation) -> Iterator[Row]:
        return self.real.probe(isolation)

    def clean(self, directory: Path) -> None:
        self.real.clean(directory)

    def sweep(self, roots: Collection[str]) -> Iterator[str]:
        return self.real.sweep(roots)

    def reserve(self, build_id: str) -> Place:
        return self.real.reserve(build_id)

    def provides(self, isolation: Isolation) -> Provided:
        return self.real.provides(isolation)

    def launch(
        self,
        place: Place,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Callable[[memoryview], None] | None = None,
        waiting: Callable[[str], None] = unheard,
    ) -> Sandbox:
        self.specs.append(spec)
        return self.real.launch(place, spec, log, collect, waiting)


def on_host(evidence: Evidence) -> tuple[HostProcess, ...]:
    """The processes of a sandbox on this host."""
    assert isinstance(evidence.outside, HostView)
    return evidence.outside.processes

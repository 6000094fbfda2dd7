"""The same builder in the same container of the same Engine, with nothing of ours around it.

The very spec that a build of ours launched, asked for over the Engine's API as ``docker run`` does
it: create, attach, start, wait, remove. What stands at the door is a plain registry, which lets
everything through: no session, no policy, no judgement of the canary, nothing verified and nothing
published. What has to lie ready lies there before the clock starts.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from runner.gateway.registry import REPOSITORY
from runner.stores.rootfs import remove_tree
from sandbox.docker import containers
from sandbox.docker import place as dockerplace
from sandbox.docker.containers import Container
from sandbox.docker.engine import Attached, Engine
from sandbox.docker.image import image_name
from sandbox.docker.place import DockerPlace
from sandbox.model import GATEWAY_SOCKET, Backend, Place, Sandbox, SandboxSpec, unheard
from tests.bench import registry
from tests.support.backends import WatchedBackend

SECONDS = 600
_NONCE = "0" * 32


class ByHandFailed(Exception):
    """The builder did not come to its end, or its build failed."""


class RecordingBackend(WatchedBackend):
    """Another one that keeps the last spec of a build, with its inputs."""

    def __init__(self, real: Backend, directory: Path) -> None:
        """``directory`` is made for the inputs, which are gone when the build is."""
        super().__init__(real.name, real)
        self._directory = directory
        self.spec: SandboxSpec | None = None

    def launch(
        self,
        place: Place,
        spec: SandboxSpec,
        log: Callable[[bytes], None],
        collect: Callable[[memoryview], None] | None = None,
        waiting: Callable[[str], None] = unheard,
    ) -> Sandbox:
        if collect is None:  # a build, and no unpacking
            self.spec = replace(spec, inputs=self._kept(spec))
        return super().launch(place, spec, log, collect, waiting)

    def _kept(self, spec: SandboxSpec) -> dict[str, Path]:
        self._directory.mkdir()
        kept = {name: self._directory / str(number) for number, name in enumerate(spec.inputs)}
        for name, path in kept.items():
            shutil.copyfile(spec.inputs[name], path)
            path.chmod(0o644)
        return kept


@dataclass(frozen=True, slots=True)
class ByHand:
    """An Engine that was built on before, so that it has the builder's image.

    Attributes:
        runtime: As the engine calls it; one that takes sockets.
        registry: Directory of the one that it pushes to.
        work: For whatever one build needs.
    """

    socket: Path
    runtime: str
    registry: Path
    work: Path

    def build(self, spec: SandboxSpec, repository: str) -> float:
        """Builds and pushes; how many seconds it took from asking for the container to its removal.

        Raises:
            ByHandFailed: With the end of what the builder wrote.
        """
        with Engine.connect(self.socket) as engine, self._place(engine) as place:
            place.furnish(spec)
            place.write_plan(_pushing_to(spec, repository), _NONCE)
            place.hand_in_all(spec.inputs)
            with registry.running_on(place.door / GATEWAY_SOCKET, self.work, self.registry):
                return self._run(engine, place, spec)

    @contextmanager
    def _place(self, engine: Engine) -> Iterator[DockerPlace]:
        place = dockerplace.reserve(
            self.work / "places", "by-hand", engine=engine, socket=self.socket, peer_uid=0
        )
        try:
            yield place
        finally:
            place.release()
            remove_tree(self.work)

    def _run(self, engine: Engine, place: DockerPlace, spec: SandboxSpec) -> float:
        asked = containers.sandbox(
            spec,
            Container(
                image=image_name(spec.root_digest),
                runtime=self.runtime,
                guest=place.title,
                network="none",
                labels=place.labels,
                apparmor=False,
            ),
        )
        started = time.monotonic()
        engine.create_volume(place.title, containers.volume(str(place.guest), place.labels))
        container = engine.create("by-hand", asked)
        streams = engine.attach(container)
        watchdog = threading.Timer(SECONDS, streams.close)
        watchdog.start()
        try:
            engine.start(container)
            output = _to_the_end(streams)
            status = engine.wait(container)
            engine.remove(container)
            seconds = time.monotonic() - started
        finally:
            watchdog.cancel()
            streams.close()
        if status != 0:
            raise ByHandFailed(output[-2000:].decode("utf-8", "replace"))
        return seconds


def _to_the_end(streams: Attached) -> bytes:
    """All that is written; whoever starts the first process has to release it."""
    with suppress(BrokenPipeError):  # then the output says why
        streams.write(f"release {_NONCE}\n".encode())
    output = b""
    while data := streams.read():
        output += data
    return output


def _pushing_to(spec: SandboxSpec, repository: str) -> SandboxSpec:
    """Every build has a repository of its own."""
    commands = tuple(
        tuple(word.replace(REPOSITORY, repository) for word in command)
        for command in spec.plan.commands
    )
    return replace(spec, plan=replace(spec.plan, commands=commands))

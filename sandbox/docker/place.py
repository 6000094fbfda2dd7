"""Where a sandbox of the Docker backend is: a directory, and what the engine has by its labels.

::

    STATE/sandboxes/ID/
        ...         as every place
        engine      path of the engine's socket
"""

import hashlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox.docker.containers import DIGEST_LABEL, LABEL, NAME_LABEL
from sandbox.docker.engine import Engine
from sandbox.errors import SandboxFailed
from sandbox.locks import make_locked
from sandbox.place import HostPlace, remove_files

ENGINE = "engine"


@dataclass(slots=True)
class DockerPlace(HostPlace):
    """See ``sandbox.model.Place``."""

    engine: Engine
    _released: bool = False

    @property
    def title(self) -> str:
        """What the engine calls what it has of this sandbox."""
        return f"untrusted-runner-{self.name}"

    @property
    def labels(self) -> dict[str, str]:
        return labels(self.directory)

    def release(self) -> None:
        if self._released:
            return
        self._released = True
        try:
            remove_labelled(self.engine, self.labels)
            remove_files(self.directory)
        finally:  # what an engine that is gone does not remove now is for gc
            self.engine.close()
            self._lock.release()


def reserve(
    sandboxes: Path, name: str, *, engine: Engine, socket: Path, peer_uid: int
) -> DockerPlace:
    """Makes the place for one sandbox. Raises SandboxFailed where it exists already."""
    directory = sandboxes.resolve() / name
    try:
        sandboxes.mkdir(parents=True, exist_ok=True)
        place = DockerPlace(name, directory, peer_uid, make_locked(directory), engine)
        (directory / ENGINE).write_text(str(socket))
        place.make("docker", {})
        directory.chmod(0o700)  # the engine mounts what is in it, whoever the sandbox is
    except OSError as error:
        raise SandboxFailed(f"no place for the sandbox: {error}") from None
    return place


def clean(directory: Path) -> None:
    """Removes what the engine has of the sandbox in ``directory``, and its files.

    Raises:
        EngineUnavailable: The engine does not answer, so nobody can say that nothing is left.
        SandboxFailed: Something could not be removed.
    """
    socket = Path((directory / ENGINE).read_text())
    with Engine.connect(socket) as engine:
        remove_labelled(engine, labels(directory))
    remove_files(directory)


def labels(directory: Path) -> dict[str, str]:
    """What everything of the sandbox in ``directory`` carries."""
    return {**of_state(directory.parent), NAME_LABEL: directory.name}


def of_state(sandboxes: Path) -> dict[str, str]:
    """What the engine has of one state directory; its path is nobody else's business."""
    return {LABEL: hashlib.sha256(os.fsencode(sandboxes.resolve())).hexdigest()[:32]}


def remove_labelled(engine: Engine, wanted: dict[str, str]) -> None:
    """Ends and removes containers first, then the networks and volumes that they had."""
    for container, _ in engine.labelled(wanted):
        engine.remove(container)
    for network, _ in engine.networks(wanted):
        engine.remove_network(network)
    for volume, _ in engine.volumes(wanted):
        engine.remove_volume(volume)


def sweep(socket: Path, sandboxes: Path, roots: Collection[str]) -> Iterator[str]:
    """Removes what an engine has of ``sandboxes`` and nobody needs, and says what.

    Args:
        socket: Where the engine listens.
        sandboxes: The directory of all places.
        roots: Digests of the root filesystems whose images stay.

    Raises:
        IsolationError: The engine does not answer, or does not remove something.
    """
    with Engine.connect(socket) as engine:
        yield from _swept(engine, sandboxes, roots)


def _swept(engine: Engine, sandboxes: Path, roots: Collection[str]) -> Iterator[str]:
    ours = of_state(sandboxes)
    things = (
        ("container", engine.labelled, engine.remove),
        ("network", engine.networks, engine.remove_network),
        ("volume", engine.volumes, engine.remove_volume),
    )
    for kind, found, remove in things:
        for each, has in found(ours):
            # A place comes before whatever is in it, and goes after that.
            name = has.get(NAME_LABEL, "")
            if not _is_place(sandboxes, name):
                remove(each)
                yield f"{kind} of sandbox {name}"
    for image, has in engine.images(ours):
        if has.get(DIGEST_LABEL) not in roots:
            engine.remove_image(image)
            yield f"image of builder {has.get(DIGEST_LABEL)}"


def _is_place(sandboxes: Path, name: str) -> bool:
    """Whether ``name``, which anybody may have written on a container, is of a place that is."""
    return sandboxes.is_dir() and name in {path.name for path in sandboxes.iterdir()}

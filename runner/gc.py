"""Removes what killed runs left and what was kept long enough; living runners hold locks."""

import time
from collections.abc import Iterator, Mapping

from runner import state
from runner.files import Home
from runner.gateway.kept import Kept
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from runner.stores.rootfs import RootfsStore, remove_tree
from runner.stores.unpacked import UnpackedStore
from sandbox.cleaning import clean
from sandbox.errors import IsolationError
from sandbox.locks import abandoned
from sandbox.model import Backend


def trim(home: Home, settings: Settings) -> list[str]:
    """Brings base images back to the sizes they may have, and says what it removed.

    What a running session uses, it holds.
    """
    unpacked = UnpackedStore(home.unpacked).evict(settings.unpacked_bytes)
    cache = BlobStore(home.base_images)
    return [
        *(f"unpacked base image {each.name} {each.identity.image}" for each in unpacked),
        *(f"blob of a base image {path.name}" for path in cache.evict(settings.cache_bytes)),
        *(f"tag {tag}, whose image is gone" for tag in Kept(cache).collect()),
    ]


def base_images(home: Home, settings: Settings) -> Iterator[str]:
    """What ``collect`` removes of base images alone."""
    for path in BlobStore(home.base_images).collect():
        yield f"half a blob {path.name}"
    for path in UnpackedStore(home.unpacked).collect():
        yield f"remains of an unpacked image {path.name}"
    yield from trim(home, settings)


def collect(home: Home, settings: Settings, backends: Mapping[str, Backend]) -> Iterator[str]:
    """Removes leftovers one by one, and says which.

    Raises:
        IsolationError: After all that could be removed: a sandbox that could not, or whose engine
            does not answer.
    """
    stays: list[IsolationError] = []
    yield from _sandboxes(home, backends, stays)
    for directory in state.killed(home.builds):
        remove_tree(directory)
        yield f"build {directory.name}"
    for directory in state.ended(home.builds):
        if state.expired(directory, time.time()):
            remove_tree(directory)
            yield f"build {directory.name}, which was kept for as long as policy asks"
        elif state.drop_large(directory):  # killed between its result and its end
            yield f"remains of build {directory.name}"
    yield from base_images(home, settings)
    for path in RootfsStore(home.builders).collect():
        yield f"root filesystem {path.parent.name}/{path.name}"
    if stays:
        raise stays[0]


def _sandboxes(
    home: Home, backends: Mapping[str, Backend], stays: list[IsolationError]
) -> Iterator[str]:
    for directory in abandoned(home.sandboxes):
        try:
            clean(directory, backends)
        except IsolationError as error:  # such as an engine that is down; the others can go
            stays.append(error)
        else:
            yield f"sandbox {directory.name}"
    roots = RootfsStore(home.builders).digests()
    for backend in backends.values():
        try:
            yield from backend.sweep(roots)
        except IsolationError as error:
            stays.append(error)

"""Removes what killed runs left and what was kept long enough; living runners hold locks."""

import time
from collections.abc import Iterator
from pathlib import Path

from runner import state
from runner.files import Home
from runner.settings import Settings
from runner.stores.blobs import BlobStore
from runner.stores.rootfs import RootfsStore, remove_tree
from runner.stores.unpacked import UnpackedStore
from sandbox import place
from sandbox.locks import abandoned


def trim(home: Home, settings: Settings) -> list[Path]:
    """Brings the cache of base images back to its size, and returns what it removed.

    What a running session uses, it holds.
    """
    UnpackedStore(home.unpacked).evict(settings.unpacked_bytes)
    return BlobStore(home.base_images).evict(settings.cache_bytes)


def collect(home: Home, settings: Settings) -> Iterator[str]:
    """Removes leftovers one by one, and says which.

    Raises:
        SandboxFailed: Processes of a sandbox do not end, or its files cannot be removed.
    """
    for directory in abandoned(home.sandboxes):
        place.clean(directory)
        yield f"sandbox {directory.name}"
    for directory in state.killed(home.builds):
        remove_tree(directory)
        yield f"build {directory.name}"
    for directory in state.ended(home.builds):
        if state.expired(directory, time.time()):
            remove_tree(directory)
            yield f"build {directory.name}, which was kept for as long as policy asks"
        elif state.drop_large(directory):  # killed between its result and its end
            yield f"remains of build {directory.name}"
    base = BlobStore(home.base_images)
    for path in base.collect():
        yield f"half a blob {path.name}"
    for path in UnpackedStore(home.unpacked).collect():
        yield f"half an unpacked image {path.name}"
    for path in trim(home, settings):
        yield f"blob of a base image {path.name}"
    for path in RootfsStore(home.builders).collect():
        yield f"root filesystem {path.parent.name}/{path.name}"

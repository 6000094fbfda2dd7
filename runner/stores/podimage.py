"""The image that pods run: a builder's root filesystem, and over it our first process.

A layer of our own on top is what a read-only mount is elsewhere: whatever the builder's image has
at that path is hidden, and a static program asks nothing of the rest. Pods name the image by its
digest, so the kubelet checks all of it.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path, PurePosixPath

from builder.rootfs import Recipe
from policies.reference import Digest, ImageReference
from runner import publish
from runner.errors import InvalidReference
from runner.files import write_whole
from runner.registry.auth import DockerConfig
from runner.registry.client import RegistryClient
from runner.settings import Settings
from runner.stores.builderimage import packed
from runner.stores.rootfs import Installed
from sandbox.kubernetes.manifests import INIT

_NOTE = "pushed.json"


def push(
    recipe: Recipe, installed: Installed, destination: ImageReference, settings: Settings
) -> ImageReference:
    """Publishes the image, and notes where it is for builds in a cluster.

    Returns:
        The image by its digest.

    Raises:
        RunnerError: As ``publish``.
    """
    image = packed(recipe, installed, lambda: _layer(_first_process()))
    with RegistryClient(settings, DockerConfig()) as client:
        done = publish.publish(image, destination, client)
    at = destination.at(done.digest)
    document = {"image": str(at), "init": Digest.of(_first_process())}
    write_whole(installed.root.parent / _NOTE, json.dumps(document).encode())
    return at


def pushed(installed: Installed) -> str:
    """The image by its digest; empty where it was not pushed, or by another version of runner.

    A note that cannot be read is none: pushing again writes it anew.
    """
    try:
        document = json.loads((installed.root.parent / _NOTE).read_bytes())
        is_current = document["init"] == Digest.of(_first_process())
        return str(ImageReference.parse(document["image"])) if is_current else ""
    except (OSError, ValueError, LookupError, TypeError, InvalidReference):
        return ""


def _first_process() -> bytes:
    return Path(str(resources.files("sandbox").joinpath("guest", "init-pod"))).read_bytes()


def _layer(program: bytes) -> Iterator[bytes]:
    """A tar with the program in a directory of its own, of root, of 1970."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        directory = tarfile.TarInfo(str(PurePosixPath(INIT.lstrip("/")).parent))
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(directory)
        member = tarfile.TarInfo(INIT.lstrip("/"))
        member.size, member.mode = len(program), 0o755
        archive.addfile(member, io.BytesIO(program))
    yield buffer.getvalue()

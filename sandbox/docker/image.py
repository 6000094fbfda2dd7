"""A builder's root filesystem as an image of an engine: made once, known by the digest it has."""

import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from sandbox.docker.containers import DIGEST_LABEL, REPOSITORY
from sandbox.docker.engine import Engine
from sandbox.errors import SandboxFailed
from sandbox.model import SandboxSpec


def builder_image(
    engine: Engine, spec: SandboxSpec, labels: Mapping[str, str], scratch: Path
) -> str:
    """The engine's image of ``spec.root``, imported where it is not there.

    Args:
        engine: Whose image.
        spec: With the root and its digest.
        labels: For a new image besides its digest.
        scratch: Where a copy of the root has room for a moment.

    Raises:
        SandboxFailed: There is no room, or the engine does not take it.
    """
    reference = image_name(spec.root_digest)
    known = engine.image(reference)
    if known is not None and known.get(DIGEST_LABEL) == spec.root_digest:
        return reference
    try:
        with tempfile.TemporaryFile(dir=scratch) as tar:
            write_tree(spec.root, tar)
            tar.seek(0)
            engine.import_image(tar, reference, {**labels, DIGEST_LABEL: spec.root_digest})
    except OSError as error:
        raise SandboxFailed(f"no image of the builder could be made: {error.strerror}") from None
    return reference


def image_name(root_digest: str) -> str:
    """What an engine calls the image of a root filesystem."""
    return f"{REPOSITORY}:{root_digest.partition(':')[2]}"


def write_tree(root: Path, tar: IO[bytes]) -> None:
    """The tree below ``root`` as a tar: sorted, and everything root's, of the year 1970."""

    def anybodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mtime = 0
        return member

    with tarfile.open(fileobj=tar, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        archive.add(root, arcname=".", filter=anybodys)

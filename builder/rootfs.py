"""What a builder's root filesystem is made of. ``runner.stores.rootfs`` carries it out."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from policies.reference import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A root filesystem from a distribution's packages.

    The packages are unpacked and not configured: nothing of them runs on the host, so an
    ordinary user without subordinate ids can do it.

    Attributes:
        suite: Of the distribution's archive.
        packages: With all that they depend on.
        leave_out: Glob patterns, relative to the root, of what is removed again.
        files: Written after unpacking, by path relative to the root.
        directories: Mount points; the tree is read-only for every sandbox, so they must be there.
        needs: Programs that must be on PATH afterwards, or the recipe has failed.
        version_package: The package whose version is the builder's.
    """

    suite: str
    packages: tuple[str, ...]
    leave_out: tuple[str, ...]
    files: Mapping[str, bytes]
    directories: tuple[str, ...]
    needs: tuple[str, ...]
    version_package: str

    @property
    def digest(self) -> Digest:
        """Over all of it, so that two versions of the runner can tell theirs apart."""
        document = json.dumps(asdict(self), sort_keys=True, default=bytes.hex)
        return Digest.of(document.encode())

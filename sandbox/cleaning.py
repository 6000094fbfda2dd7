"""Removes what a place's runner left, by the backend that it was of."""

from collections.abc import Mapping
from pathlib import Path

from sandbox.errors import SandboxFailed
from sandbox.model import Backend
from sandbox.place import backend_of


def clean(directory: Path, backends: Mapping[str, Backend]) -> None:
    """Ends the sandbox in ``directory`` and removes all of it.

    Raises:
        IsolationError: Something of it could not be removed, or nobody can tell.
    """
    name = backend_of(directory)
    if name not in backends:
        raise SandboxFailed(
            f"sandbox {directory.name} is of a backend that is not here: {name[:40]!a}",
            advice="Run gc with the version of runner that made it.",
        )
    backends[name].clean(directory)

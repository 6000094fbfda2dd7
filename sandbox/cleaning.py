"""Removes what a place's runner left, whichever backend it was of."""

from pathlib import Path

from sandbox import localplace

_ENGINE = "engine"
"""As ``sandbox.dockerplace`` has it, whose imports are dear."""


def clean(directory: Path) -> None:
    """Ends the sandbox in ``directory`` and removes all of it.

    Raises:
        IsolationError: Something of it could not be removed, or nobody can tell.
    """
    if (directory / _ENGINE).exists():
        from sandbox import dockerplace  # noqa: PLC0415 - the SDK is needed where it was used

        dockerplace.clean(directory)
    else:
        localplace.clean(directory)

"""The one logger of what does I/O, at no cost while nobody listens. ``policies`` and ``builder``
have nothing to say: they are pure.

``runner.logs`` listens with structlog where ``RUNNER_LOG`` asks for it; importing that here would
cost each command a tenth of a second.
"""

from collections.abc import Callable

Listener = Callable[[str, dict[str, object]], None]

_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Every later ``debug`` goes to ``listener`` too."""
    _listeners.append(listener)


def debug(event: str, **values: object) -> None:
    """Says what happens and why, for diagnosis. Values may be hostile: the listener's concern."""
    for listener in _listeners:
        listener(event, values)

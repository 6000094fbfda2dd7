"""The diagnostic log: what runner does and why, for whoever has to find out at 3 a.m.

Off unless ``RUNNER_LOG`` is ``debug``; then lines of JSON on stderr. Every package speaks through
``sandbox.diagnostics``; this module alone says where that goes. It is no record: that is
``events.jsonl``, with the ledger beside it.
"""

import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from runner.registry.auth import Secret
from runner.terminal import clean
from sandbox import diagnostics

_VALUE_CHARACTERS = 2000


def configure() -> None:
    """Sends diagnostics to stderr from now on."""
    logger = structlog.wrap_logger(
        structlog.WriteLogger(sys.stderr),
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            harmless,
            structlog.processors.JSONRenderer(sort_keys=True),
        ],
        wrapper_class=structlog.BoundLogger,
    )
    diagnostics.listen(lambda event, values: logger.debug(event, **values))


def harmless(
    logger: object, name: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """No secret, no control character, nothing without bound: values may come from a sandbox."""
    del logger, name
    for key, value in event.items():
        if isinstance(value, Secret):
            event[key] = repr(value)
        elif not isinstance(value, (bool, int, float)):
            event[key] = clean(str(value)[:_VALUE_CHARACTERS])
    return event

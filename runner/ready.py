"""What stands ready before anything untrusted is read: parts of this host, and leave of policy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from builder.model import Builder
from policies.model import Decision, Denial, Isolation
from runner.errors import (
    BuilderCorrupt,
    BuilderNotInstalled,
    IsolationUnavailable,
    PolicyDenied,
    UsageError,
)
from runner.facts import named_parts, offered
from runner.request import BuildRequest
from runner.stores.rootfs import Installed, RootfsStore
from runner.tools import Tools
from sandbox.model import Backend

PLATFORMS = ("linux/amd64",)
"""What sandboxes here can run: the kernel inside emulates no other processor."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a request names, as this host has it."""

    backend: Backend
    builder: Builder
    installed: Installed
    isolations: frozenset[Isolation]


def parts(request: BuildRequest, tools: Tools) -> Parts:
    """The parts that the request names.

    Raises:
        UsageError: There is no such part.
        IsolationUnavailable: No sandbox can be had.
        BuilderNotInstalled: The builder is known, and not here.
    """
    if request.platform not in PLATFORMS:
        raise UsageError(
            f"platform {request.platform!r} cannot be built here",
            advice=f"One of: {', '.join(PLATFORMS)}.",
        )
    backend, builder = named_parts(request, tools)
    isolations, unavailable = offered(backend)
    if unavailable is not None:
        raise unavailable
    installed = RootfsStore(tools.home.builders).installed(builder.name)
    if installed is None:
        raise BuilderNotInstalled(f"the root filesystem of {builder.name} is not installed")
    return Parts(backend, builder, installed, isolations)


@contextmanager
def root(tools: Tools, installed: Installed) -> Iterator[Installed]:
    """The builder's root filesystem that was decided about, verified and kept."""
    with RootfsStore(tools.home.builders).using(installed.name) as verified:
        if verified.digest != installed.digest:
            raise BuilderCorrupt(
                f"the root filesystem of {installed.name} was replaced just now",
                advice="Try it again.",
            )
        yield verified


def allowed(decision: Decision | Denial) -> Decision:
    """Raises PolicyDenied for a denial, or IsolationUnavailable where that is why."""
    if isinstance(decision, Decision):
        return decision
    if decision.rule == "isolation":
        raise IsolationUnavailable(decision.reason)
    raise PolicyDenied(f"{decision.reason} ({decision.rule})")

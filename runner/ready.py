"""What stands ready before anything untrusted is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from builder.model import Builder
from runner.choice import Candidates, candidates
from runner.errors import BuilderCorrupt, BuilderNotInstalled, UsageError
from runner.facts import named_builder
from runner.request import BuildRequest
from runner.stores.rootfs import Installed, RootfsStore
from runner.tools import Tools

PLATFORMS = ("linux/amd64",)
"""What sandboxes here can run: the kernel inside emulates no other processor."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a request names, as this host has it.

    Attributes:
        candidates: Every backend that it may run on; at least one offers something.
    """

    builder: Builder
    installed: Installed
    candidates: Candidates


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
    found, builder = candidates(request, tools), named_builder(request, tools)
    found.require_any()
    installed = RootfsStore(tools.home.builders).installed(builder.name)
    if installed is None:
        raise BuilderNotInstalled(f"the root filesystem of {builder.name} is not installed")
    return Parts(builder, installed, found)


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

"""Takes what a build may read and makes it one immutable, digest-addressed tar."""

from runner.context.directory import BuildContext, snapshot

__all__ = ["BuildContext", "snapshot"]

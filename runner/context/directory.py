"""Takes a snapshot of a directory: one deterministic tar, with what policy needs to know of it.

The tree is hostile and may change while it is read. Every name is opened relative to its
directory's descriptor and never through a symbolic link (BuildKit GHSA-g2h8-426c-7976 and kaniko
CVE-2026-28406 are what happens otherwise); what was opened is compared with what was listed.
"""

import os
import posixpath
import stat
import tarfile
from dataclasses import dataclass
from pathlib import Path

from policies.facts import ContextFacts
from policies.model import Limits
from policies.reference import Digest
from runner.context.dockerignore import FILE_BYTES, IgnoreRules
from runner.context.names import shown
from runner.context.sink import TarSink
from runner.context.tree import (
    DIRECTORY,
    FILE,
    changed,
    kind,
    open_file,
    open_root,
    opened,
    reading,
)
from runner.errors import ContextInvalid, ContextTooLarge, DockerfileMissing

DOCKERFILE_BYTES = 1 << 20
_DEFAULT_NAMES = ("Dockerfile", "Containerfile")
_DEPTH = 256
"""Directories below one another. Each costs a descriptor, of which a process has 1,024."""
_WARNINGS = 20
_LINKS_LEAVING = 1000
_VISITS_PER_ENTRY = 10
"""Names looked at, ignored ones included, for each entry that the limits allow."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """Everything that a build may read, frozen.

    Attributes:
        tar: Where the snapshot lies.
        digest: Of the tar's bytes, computed while they were written.
        dockerfile: Its path inside the context, separated by ``/``.
        dockerfile_bytes: The very bytes that went into the tar; at most 1 MiB.
        dockerfile_ignored: Whether the ignore file excludes it: sent, and not to be copied.
        warnings: What was left out, in sentences.
    """

    tar: Path
    digest: Digest
    dockerfile: str
    dockerfile_bytes: bytes
    dockerfile_ignored: bool
    facts: ContextFacts
    warnings: tuple[str, ...]


def snapshot(
    directory: Path, *, dockerfile: str | None, limits: Limits, into: Path
) -> BuildContext:
    """Writes the context at ``directory`` as a tar to ``into``, a path that does not exist yet.

    The tar holds what ``.dockerignore`` (or ``DOCKERFILE.dockerignore``, which takes precedence)
    leaves in, and always the Dockerfile. Symbolic links are kept verbatim. The same directory
    gives the same digest. Nothing is left at ``into`` on any error.

    Args:
        directory: The context; may itself be a symbolic link to a directory.
        dockerfile: Its path relative to the context, or an absolute path inside it. None means
            ``Dockerfile``, then ``Containerfile``.
        limits: Of these, the context's.
        into: Created exclusively, mode 0600.

    Raises:
        ContextInvalid: The context cannot be read, or changed while it was read.
        DockerfileMissing: There is no such Dockerfile.
        ContextTooLarge: The context is over one of the limits.
        DiskExceeded: The file system of ``into`` is full.
        StateUnusable: ``into`` cannot be written.
    """
    root = open_root(directory)
    try:
        found = _find_dockerfile(root, directory, dockerfile)
        rules = _ignore_rules(root, found)
        with TarSink(into) as sink:
            walk = _Walk(sink, rules, limits, found)
            walk.directory(root, "", -1, 0)
            if walk.dockerfile_bytes is None:
                raise changed(found)
            digest = sink.finish()
    finally:
        os.close(root)
    return BuildContext(
        tar=into,
        digest=digest,
        dockerfile=found,
        dockerfile_bytes=walk.dockerfile_bytes,
        dockerfile_ignored=rules.excluded(found),
        facts=ContextFacts(bytes=walk.bytes, entries=walk.entries, links_leaving=walk.leaving()),
        warnings=walk.warnings(),
    )


class _Walk:
    """Goes through the tree once, in the order of the names' bytes, parents first."""

    def __init__(self, sink: TarSink, rules: IgnoreRules, limits: Limits, dockerfile: str) -> None:
        self._sink = sink
        self._rules = rules
        self._limits = limits
        self._dockerfile = dockerfile
        self._held: list[tarfile.TarInfo] = []
        """Excluded directories that contain where we are; sent if anything below them is."""
        self._left_out: list[str] = []
        self._left_out_count = 0
        self._visits = 0
        self.bytes = 0
        self.entries = 0
        self.links_leaving: list[str] = []
        self.dockerfile_bytes: bytes | None = None

    def warnings(self) -> tuple[str, ...]:
        more = self._left_out_count - len(self._left_out)
        return (*self._left_out, *([f"and {more} more were left out"] if more else []))

    def leaving(self) -> tuple[str, ...] | None:
        """None where there are so many that not all were kept."""
        links = self.links_leaving
        return tuple(links) if len(links) <= _LINKS_LEAVING else None

    def directory(self, fd: int, prefix: str, above: int, depth: int) -> None:
        """Adds what lies in the directory ``fd``; ``above`` is what the rules said of it."""
        with reading(prefix or "."):
            names = sorted(os.listdir(fd), key=os.fsencode)
        self._visits += len(names)
        if self._visits > self._limits.context_entries * _VISITS_PER_ENTRY:
            raise ContextTooLarge(
                f"more than {self._limits.context_entries * _VISITS_PER_ENTRY} names were looked "
                f"at, ignored ones included, when {shown(prefix or '.')} was reached",
                advice="Exclude whole directories with .dockerignore: they are not looked into.",
            )
        for name in names:
            path = prefix + name
            decision = self._rules.decide(path, above)
            excluded = self._rules.excludes(decision) and path != self._dockerfile
            with reading(path):
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                self._directory_entry(fd, path, found, decision, depth, excluded=excluded)
            elif not excluded:
                self._leaf(fd, path, found)

    def _directory_entry(
        self,
        parent: int,
        path: str,
        found: os.stat_result,
        decision: int,
        depth: int,
        *,
        excluded: bool,
    ) -> None:
        if excluded and not (
            self._dockerfile.startswith(f"{path}/") or self._rules.may_include_below(path)
        ):
            return
        if depth == _DEPTH:
            raise ContextTooLarge(f"{shown(path)} lies deeper than {_DEPTH} directories")
        header = _header(path, found, tarfile.DIRTYPE)
        if excluded:
            self._held.append(header)
        else:
            self._add(header)
        with opened(parent, path, found, DIRECTORY) as fd:
            self.directory(fd, f"{path}/", decision, depth + 1)
        if excluded and self._held and self._held[-1] is header:
            self._held.pop()

    def _leaf(self, parent: int, path: str, found: os.stat_result) -> None:
        if stat.S_ISREG(found.st_mode):
            with opened(parent, path, found, FILE) as fd:
                self._file(fd, path, found)
        elif stat.S_ISLNK(found.st_mode):
            header = _header(path, found, tarfile.SYMTYPE)
            with reading(path):
                header.linkname = os.readlink(posixpath.basename(path), dir_fd=parent)
            if _leaves(path, header.linkname) and len(self.links_leaving) <= _LINKS_LEAVING:
                self.links_leaving.append(shown(path))
            self._add(header)
        else:
            self._left_out_count += 1
            if len(self._left_out) < _WARNINGS:
                self._left_out.append(f"{shown(path)} was left out: it is {kind(found)}")

    def _file(self, fd: int, path: str, found: os.stat_result) -> None:
        size = found.st_size
        self.bytes += size
        if self.bytes > self._limits.context_bytes:
            raise ContextTooLarge(
                f"the context has more than {self._limits.context_bytes} bytes; "
                f"{shown(path)}, {size} bytes, goes over the limit"
            )
        if path == self._dockerfile and size > DOCKERFILE_BYTES:
            raise ContextTooLarge(
                f"{shown(path)} has {size} bytes; a Dockerfile may have {DOCKERFILE_BYTES}",
                advice="Move long scripts from the Dockerfile to files of their own.",
            )
        header = _header(path, found, tarfile.REGTYPE)
        header.size = size
        self._add(header)
        kept = bytearray() if path == self._dockerfile else None
        self._copy(fd, path, size, kept)
        with reading(path):
            after = os.fstat(fd)
        if (after.st_size, after.st_mtime_ns) != (size, found.st_mtime_ns):
            raise changed(path)
        if kept is not None:
            self.dockerfile_bytes = bytes(kept)

    def _copy(self, fd: int, path: str, size: int, kept: bytearray | None) -> None:
        """Sends exactly ``size`` bytes, and keeps the same bytes in ``kept``."""
        left = size
        while left:
            with reading(path):
                data = os.read(fd, min(left, _CHUNK_BYTES))
            if not data:
                raise changed(path)
            self._sink.write(data)
            if kept is not None:
                kept += data
            left -= len(data)
        self._sink.pad(size)

    def _add(self, header: tarfile.TarInfo) -> None:
        for one in (*self._held, header):
            self.entries += 1
            length = len(os.fsencode(one.name))
            if length > self._limits.path_bytes:
                raise ContextTooLarge(
                    f"a path in the context has {length} bytes, more than "
                    f"{self._limits.path_bytes}: {shown(one.name)}"
                )
            if self.entries > self._limits.context_entries:
                raise ContextTooLarge(
                    f"the context has more than {self._limits.context_entries} entries; "
                    f"{shown(one.name)} goes over the limit"
                )
            self._sink.header(one)
        self._held.clear()


def _header(path: str, found: os.stat_result, kind: bytes) -> tarfile.TarInfo:
    """What the build may see of a file: no owner, no sub-second time, not that it was a link."""
    header = tarfile.TarInfo(path)
    header.type = kind
    header.mode = stat.S_IMODE(found.st_mode)
    header.mtime = found.st_mtime_ns // 1_000_000_000
    return header


def _leaves(path: str, target: str) -> bool:
    """Whether a link at ``path`` points out of the context, judged by its text alone."""
    if target.startswith("/"):
        return True
    depth = path.count("/")
    for part in target.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return True
    return False


def _find_dockerfile(root: int, directory: Path, asked: str | None) -> str:
    if asked is None:
        for name in _DEFAULT_NAMES:
            if _exists(root, name):
                return name
        raise DockerfileMissing("the context has neither a Dockerfile nor a Containerfile")
    path = _inside(directory, asked)
    if not _exists(root, path):
        raise DockerfileMissing(f"the context has no file {shown(path)}")
    return path


def _inside(directory: Path, asked: str) -> str:
    """``asked`` relative to the context, by its text alone. Raises ContextInvalid."""
    path = asked
    if asked.startswith("/"):
        bases = {os.path.abspath(directory), os.path.realpath(directory)}  # noqa: PTH100 - Path.absolute keeps `..`
        candidates = [os.path.relpath(posixpath.normpath(asked), base) for base in bases]
        path = next((c for c in candidates if c.split("/")[0] != ".."), asked)
    path = posixpath.normpath(path)
    if path in {".", ".."} or path.startswith(("/", "../")) or "\0" in path:
        raise ContextInvalid(
            f"the Dockerfile {shown(asked)} does not lie inside the context",
            advice="Name it with --file, relative to CONTEXT.",
        )
    return path


def _exists(root: int, path: str) -> bool:
    fd = open_file(root, path)
    if fd is not None:
        os.close(fd)
    return fd is not None


def _ignore_rules(root: int, dockerfile: str) -> IgnoreRules:
    for path in (f"{dockerfile}.dockerignore", ".dockerignore"):
        fd = open_file(root, path)
        if fd is not None:
            with os.fdopen(fd, "rb") as stream, reading(path):
                return IgnoreRules.parse(stream.read(FILE_BYTES + 1), path)
    return IgnoreRules(".dockerignore")

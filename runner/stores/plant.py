"""Lays out one flat layer, verified as any other, as a directory on the host.

A sandboxed build applied layers and resolved whiteouts, or ``runner builder export`` wrote a
layer without any. What is left to do here makes directories, files and links, one name at a time,
below descriptors that follow no link: wherever a name points, nothing outside of the root is
touched.
"""

import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from runner.errors import BuilderInstallFailed
from runner.pieces import stream_of
from runner.stores.blobs import CHUNK_BYTES

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def plant(
    tar: Iterator[bytes],
    root: Path,
    *,
    check: Callable[[tarfile.TarInfo], object] = lambda _: None,
) -> None:
    """Writes the entries of ``tar``, which is not compressed, into the empty directory ``root``.

    Owners, devices and extended attributes are left out: a builder's root is read-only and
    belongs to whoever runs it.

    Args:
        tar: Taken to its end, so that whoever hashes it on the way sees all of it.
        root: Made by us.
        check: Sees each entry before it is written, and may raise.

    Raises:
        BuilderInstallFailed: A name leads through a link, or a file's comes twice.
    """
    top = os.open(root, _DIRECTORY)
    try:
        with (
            stream_of(tar) as stream,
            tarfile.open(fileobj=stream, mode="r|", encoding="utf-8") as archive,
        ):
            for member in archive:
                check(member)
                _plant(archive, member, top)
            while stream.read(CHUNK_BYTES):
                pass
    except (OSError, tarfile.TarError) as error:
        raise BuilderInstallFailed(f"the image cannot be laid out: {error}") from None
    finally:
        os.close(top)


def _plant(archive: tarfile.TarFile, member: tarfile.TarInfo, top: int) -> None:
    parts = _parts(member.name)
    if not parts:
        return

    def at(parent: int, name: str) -> None:
        if member.isdir():
            _make_directory(parent, name)
        elif member.isfile():
            content = archive.extractfile(member)
            assert content is not None
            mode = 0o755 if member.mode & 0o111 else 0o644
            with os.fdopen(os.open(name, _NEW_FILE, mode, dir_fd=parent), "wb") as file:
                shutil.copyfileobj(content, file)
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=parent)
        elif member.islnk():
            _below(
                top,
                _parts(member.linkname),
                lambda source, existing: _link(source, existing, parent, name),
            )

    _below(top, parts, at)


def _link(source: int, existing: str, parent: int, name: str) -> None:
    os.link(existing, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise BuilderInstallFailed(f"the image has the name {name!a}")
    return parts


def _below(top: int, parts: list[str], do: Callable[[int, str], None]) -> None:
    """Calls ``do`` with the directory that the last part is in, made where it is missing."""
    *directories, name = parts
    current = os.dup(top)
    try:
        for directory in directories:
            _make_directory(current, directory)
            below = os.open(directory, _DIRECTORY, dir_fd=current)
            os.close(current)
            current = below
        do(current, name)
    finally:
        os.close(current)


def _make_directory(parent: int, name: str) -> None:
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        os.close(os.open(name, _DIRECTORY, dir_fd=parent))  # a link here is an error

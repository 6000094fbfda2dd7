"""Root filesystems of builders: made once, named by their digest, read-only for every build.

::

    DATA/builders/NAME/
        current.json      which one is used, its version and where it came from
        SHA256/root/      the tree
        SHA256/seal.json  what each file was when its content was last hashed

Verifying hashes every file. Before each build the seal is compared first: a file whose inode,
size, times and mode are as sealed was not written since, because no user can set its change time.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from builder.rootfs import Recipe
from policies.reference import Digest
from runner.errors import (
    BuilderCorrupt,
    BuilderInstallFailed,
    BuilderNotInstalled,
    InvalidReference,
)
from runner.files import write_whole
from sandbox.locks import Lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """One installed root filesystem.

    Attributes:
        digest: Over every path, mode, link target and content of the tree; not over times.
        source: ``debian:SUITE`` or the image it was unpacked from, by digest.
    """

    name: str
    digest: Digest
    version: str
    source: str
    entries: int
    size_bytes: int
    root: Path


class RootfsStore:
    """Every builder that is installed on this host for this user."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def installed(self, name: str) -> Installed | None:
        """The current root filesystem of the builder, unverified, or None."""
        try:
            document = json.loads((self._directory / name / "current.json").read_bytes())
            digest = Digest(document.pop("digest"))
            root = self._directory / name / digest.hex / "root"
            return Installed(name=name, digest=digest, root=root, **document)
        except FileNotFoundError:
            return None
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OSError,
            InvalidReference,
        ) as error:
            raise BuilderCorrupt(f"{self._directory / name / 'current.json'}: {error}") from None

    def digests(self) -> frozenset[str]:
        """Of every root filesystem that is there, current or not."""
        return frozenset(f"sha256:{root.parent.name}" for root in self._directory.glob("*/*/root"))

    def verified(self, name: str, *, every_byte: bool = False) -> Installed:
        """The current root filesystem, checked.

        Raises:
            BuilderNotInstalled: There is none.
            BuilderCorrupt: It is not what was installed.
        """
        installed = self.installed(name)
        if installed is None:
            raise BuilderNotInstalled(f"the root filesystem of {name} is not installed")
        seal = installed.root.parent / "seal.json"
        try:
            if not every_byte and _read(seal) == _seal(installed.root):
                return installed
            found = tree_digest(installed.root)
        except OSError as error:
            raise BuilderCorrupt(f"{installed.root}: {error.strerror}") from None
        if found != installed.digest:
            raise BuilderCorrupt(
                f"the root filesystem of {name} is {found}, installed was {installed.digest}"
            )
        write_whole(seal, _seal(installed.root).encode())
        return installed

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Installed]:
        """``verified``, and nobody removes the tree while the block runs."""
        installed = self.verified(name)
        with _held(installed.root.parent, fcntl.LOCK_SH) as held:
            if not held or self.verified(name) != installed:
                raise BuilderCorrupt(f"the root filesystem of {name} was replaced just now")
            yield installed

    def install(
        self,
        name: str,
        recipe: Recipe,
        source: str,
        make: Callable[[Path], str],
        expected: Digest | None = None,
    ) -> Installed:
        """Adds a root filesystem and makes it the current one, or leaves all as it was.

        Args:
            name: Of the builder.
            recipe: What it must have besides.
            source: Where it comes from; for people.
            make: Fills an empty directory and returns the builder's version.
            expected: What the tree's digest has to be, or None for any.

        Raises:
            BuilderInstallFailed: Something that the builder needs is missing, or it is another
                tree than expected.
        """
        home = self._directory / name
        home.mkdir(parents=True, exist_ok=True)
        _open_to_all(self._directory, home)
        arriving = home / f"arriving-{secrets.token_hex(8)}"
        root = arriving / "root"
        lock = self._lock(home)
        try:
            root.mkdir(parents=True)
            version = make(root)
            _complete(recipe, root)
            _normalise(root)
            _open_to_all(arriving, root)
            digest = tree_digest(root)
            if expected not in {None, digest}:
                raise BuilderInstallFailed(f"the tree is {digest}, it should be {expected}")
            entries, size = _measure(root)
            target = home / digest.hex
            if not target.exists() or tree_digest(target / "root") != digest:
                _discard(target)
                arriving.rename(target)
        finally:
            remove_tree(arriving)
            lock.release()
        write_whole(target / "seal.json", _seal(target / "root").encode())
        installed = Installed(
            name=name,
            digest=digest,
            version=version,
            source=source,
            entries=entries,
            size_bytes=size,
            root=target / "root",
        )
        document = asdict(installed)
        del document["name"], document["root"]
        write_whole(home / "current.json", json.dumps(document, indent=1).encode())
        return installed

    def remove(self, name: str) -> None:
        """Removes the builder.

        Raises:
            BuilderNotInstalled: There is nothing.
            BuilderInstallFailed: A running build uses it.
        """
        home = self._directory / name
        if not home.is_dir():
            raise BuilderNotInstalled(f"the root filesystem of {name} is not installed")
        lock = self._lock(home)
        try:
            for tree in [path for path in home.iterdir() if path.is_dir()]:
                _discard(tree)
            remove_tree(home)
        finally:
            lock.release()

    def _lock(self, home: Path) -> Lock:
        try:
            return Lock(home / "install.lock")
        except BlockingIOError:
            raise BuilderInstallFailed(
                f"{home.name} is being installed by another process", advice="Wait for it to end."
            ) from None

    def collect(self) -> list[Path]:
        """Removes trees that are not current and those that killed installations left."""
        removed = []
        for home in self._directory.glob("*/"):
            current = self.installed(home.name)
            keep = {current.digest.hex} if current is not None else set()
            try:
                lock = self._lock(home)
            except BuilderInstallFailed:
                continue
            for entry in [path for path in home.iterdir() if path.is_dir()]:
                with contextlib.suppress(BuilderInstallFailed):
                    if entry.name not in keep:
                        _discard(entry)
                        removed.append(entry)
            lock.release()
        return removed


@contextlib.contextmanager
def _held(tree: Path, how: int) -> Iterator[bool]:
    """Whether the lock on ``tree`` could be had; it is held while the block runs."""
    try:
        fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield how == fcntl.LOCK_EX
        return
    try:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def _discard(tree: Path) -> None:
    """Removes a tree that no build uses. Raises BuilderInstallFailed where one does."""
    with _held(tree, fcntl.LOCK_EX) as free:
        if not free:
            raise BuilderInstallFailed(
                f"{tree} is used by a running build", advice="Wait for it to end."
            )
        if tree.exists():
            going = tree.rename(tree.with_name(f"arriving-{secrets.token_hex(8)}"))
            remove_tree(going)


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every entry below ``root`` by relative path, in the order of bytes, links not followed."""
    pending = [""]
    found = []
    while pending:
        prefix = pending.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                path = f"{prefix}{entry.name}"
                found.append((path, entry.stat(follow_symlinks=False)))
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{path}/")
    return iter(sorted(found, key=lambda item: os.fsencode(item[0])))


def tree_digest(root: Path) -> Digest:
    """Digest over paths, kinds, modes, link targets and contents."""
    total = hashlib.sha256()
    for path, status in walk(root):
        if stat.S_ISREG(status.st_mode):
            with (root / path).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = (root / path).readlink().__fspath__()
        else:
            content = ""
        for part in (path, f"{status.st_mode:o}", content):
            total.update(os.fsencode(part) + b"\0")
    return Digest(f"sha256:{total.hexdigest()}")


def _seal(root: Path) -> str:
    lines = hashlib.sha256()
    for path, s in walk(root):
        values = (path, s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_uid)
        lines.update(repr(values).encode("utf-8", "surrogateescape"))
    return json.dumps({"seal": lines.hexdigest()})


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _measure(root: Path) -> tuple[int, int]:
    sizes = [status.st_size for _, status in walk(root) if stat.S_ISREG(status.st_mode)]
    return sum(1 for _ in walk(root)), sum(sizes)


_PROGRAMS = ("usr/bin", "usr/sbin", "usr/local/bin", "usr/local/sbin")


def _complete(recipe: Recipe, root: Path) -> None:
    for directory in recipe.directories:
        _inside(root, directory).mkdir(parents=True, exist_ok=True)
    for path, data in recipe.files.items():
        file = _inside(root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_bytes(data)
    for program in missing(recipe, root):
        raise BuilderInstallFailed(f"the root filesystem has no {program}")


def missing(recipe: Recipe, root: Path) -> list[str]:
    """Programs that the recipe needs and ``root``, perhaps made by an older one, does not have."""
    return [
        program
        for program in recipe.needs
        if not any((root / directory / program).is_file() for directory in _PROGRAMS)
    ]


def _inside(root: Path, path: str) -> Path:
    """``path`` below ``root``, with no link on the way: the tree may be somebody else's."""
    current = root
    for part in Path(path.lstrip("/")).parts:
        current /= part
        if current.is_symlink():
            raise BuilderInstallFailed(f"/{current.relative_to(root)} in the root is a link")
    return current


def _normalise(root: Path) -> None:
    """Readable by every uid that a sandbox may have; nothing that gains privilege, nothing special.

    Raises:
        BuilderCorrupt: A device, socket or FIFO.
    """
    for path, status in walk(root):
        mode = status.st_mode
        if stat.S_ISLNK(mode):
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise BuilderCorrupt(f"{path!r} in the root filesystem is no file, directory or link")
        executable = stat.S_ISDIR(mode) or mode & 0o111
        (root / path).chmod(0o755 if executable else 0o644)


def _open_to_all(*directories: Path) -> None:
    for directory in directories:
        directory.chmod(0o755)


def remove_tree(path: Path) -> None:
    """Removes a file or a tree whose directories may be read-only; nothing where there is none."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for directory, _, _ in os.walk(path):
        Path(directory).chmod(0o700)
    shutil.rmtree(path)

"""A small root filesystem out of this host's own programs: a shell, coreutils and perl.

It needs no network, and unpacks in a moment where a distribution's image takes ten seconds.
"""

import functools
import io
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from builder.buildah import Buildah
from runner.stores.rootfs import RootfsStore

PROGRAMS = (
    "sh", "cat", "chmod", "chown", "cp", "dd", "echo", "env", "find", "grep", "head", "id", "ln",
    "ls", "mkdir", "perl", "rm", "sleep", "stat", "tail", "tee", "timeout", "true", "false", "yes",
)  # fmt: skip
_MERGED = ("bin", "lib", "lib64", "sbin")
_FILES = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": b"root:x:0:\n",
}


def _libraries(program: str) -> set[str]:
    shown = subprocess.run(
        ["ldd", program], capture_output=True, text=True, check=False, timeout=30
    ).stdout
    return set(re.findall(r"(/\S+) \(0x", shown))


def _perl_modules() -> list[Path]:
    """Of perl-base, which is essential; they lie where its Socket.pm does."""
    shown = subprocess.run(
        ["perl", "-MSocket", "-e", "print $INC{q(Socket.pm)}"],
        capture_output=True, text=True, check=True, timeout=30,
    ).stdout  # fmt: skip
    return sorted(path for path in Path(shown).parent.rglob("*") if path.is_file())


def _merged(name: str) -> str:
    """``/lib/x`` is ``usr/lib/x``: the tree has one of each."""
    return name.lstrip("/") if name.startswith("/usr/") else f"usr{name}"


@dataclass(frozen=True)
class Entry:
    """One entry of the tree. A directory has neither target nor content."""

    name: str
    mode: int
    content: bytes | None = None
    target: str = ""


@functools.cache
def toolbox() -> tuple[Entry, ...]:
    """The tree, parents first."""
    files = {str(path): path for path in _perl_modules()}
    for name in PROGRAMS:
        program = shutil.which(name)
        assert program is not None, f"{name} is on no PATH"
        real = Path(program).resolve()
        files[f"/usr/bin/{name}"] = real
        files |= {library: Path(library).resolve() for library in _libraries(str(real))}
    directories = ("usr", *(f"usr/{name}" for name in _MERGED), "etc", "proc", "dev", "sys")
    return (
        *(Entry(name, 0o755) for name in directories),
        Entry("tmp", 0o1777),
        *(Entry(name, 0o777, target=f"usr/{name}") for name in _MERGED),
        *(Entry(_merged(name), 0o755, path.read_bytes()) for name, path in files.items()),
        *(Entry(name, 0o644, data) for name, data in _FILES.items()),
    )


def toolbox_tar() -> bytes:
    """The tree as a tar. Everything belongs to root."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry in toolbox():
            info = tarfile.TarInfo(entry.name)
            info.mode, info.linkname = entry.mode, entry.target
            info.size = len(entry.content or b"")
            info.type = tarfile.REGTYPE if entry.content is not None else tarfile.DIRTYPE
            if entry.target:
                info.type = tarfile.SYMTYPE
            archive.addfile(info, io.BytesIO(entry.content or b""))
    return buffer.getvalue()


def unpack_toolbox(root: Path) -> None:
    """The same tree as files below ``root``, an empty directory."""
    for entry in toolbox():
        path = root / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.target:
            path.symlink_to(entry.target)
        elif entry.content is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(entry.content)
            path.chmod(entry.mode)


def install_as_buildah(builders: Path, script: str, **files: str) -> None:
    """A builder whose every program is a shell script: what a hostile image may be.

    Args:
        builders: A new store.
        script: Told ``$0 $*``, like the programs it stands for.
        files: In its root directory, by name.
    """

    def make(root: Path) -> str:
        unpack_toolbox(root)
        for name in Buildah.recipe.needs:
            (root / "usr/bin" / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
            (root / "usr/bin" / name).chmod(0o755)
        for name, content in files.items():
            (root / name).write_text(content, encoding="utf-8")
        return "hostile"

    builders.mkdir(parents=True)
    RootfsStore(builders).install("buildah", Buildah.recipe, "test", make)

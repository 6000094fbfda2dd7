"""A small root filesystem out of this host's own programs: a shell, coreutils and perl.

It needs no network, and unpacks in a moment where a distribution's image takes ten seconds.
"""

import functools
import io
import re
import shutil
import subprocess
import tarfile
from dataclasses import replace
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


@functools.cache
def toolbox_tar() -> bytes:
    """The tree as a tar. Everything belongs to root."""
    files = {str(path): path for path in _perl_modules()}
    for name in PROGRAMS:
        program = shutil.which(name)
        assert program is not None, f"{name} is on no PATH"
        real = Path(program).resolve()
        files[f"/usr/bin/{name}"] = real
        files |= {library: Path(library).resolve() for library in _libraries(str(real))}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for directory in (*(f"usr/{name}" for name in _MERGED), "etc", "proc", "dev", "sys"):
            _add(archive, directory, tarfile.DIRTYPE, mode=0o755)
        _add(archive, "tmp", tarfile.DIRTYPE, mode=0o1777)
        for name in _MERGED:
            _add(archive, name, tarfile.SYMTYPE, link=f"usr/{name}")
        for name, path in files.items():
            merged = re.sub(r"^/(bin|lib|lib64|sbin)/", r"/usr/\1/", name)
            _add(archive, merged.lstrip("/"), mode=0o755, data=path.read_bytes())
        for name, data in _FILES.items():
            _add(archive, name, data=data)
    return buffer.getvalue()


def _add(
    archive: tarfile.TarFile,
    name: str,
    kind: bytes = tarfile.REGTYPE,
    *,
    mode: int = 0o644,
    link: str = "",
    data: bytes = b"",
) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.linkname, entry.size = kind, mode, link, len(data)
    archive.addfile(entry, io.BytesIO(data))


def unpack_toolbox(root: Path) -> None:
    """The same tree as files below ``root``, an empty directory."""
    with tarfile.open(fileobj=io.BytesIO(toolbox_tar())) as archive:
        archive.extractall(root, filter="tar")


def install_as_buildah(builders: Path, script: str, **files: str) -> None:
    """A builder whose ``buildah`` and ``tar`` are a shell script: what a hostile image may be.

    Args:
        builders: A new store.
        script: Told ``$0 $*``, like the programs it stands for.
        files: In its root directory, by name.
    """

    def make(root: Path) -> str:
        unpack_toolbox(root)
        for name in ("buildah", "tar"):
            (root / "usr/bin" / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
            (root / "usr/bin" / name).chmod(0o755)
        for name, content in files.items():
            (root / name).write_text(content, encoding="utf-8")
        return "hostile"

    builders.mkdir(parents=True)
    recipe = replace(Buildah.recipe, needs=())
    RootfsStore(builders).install("buildah", recipe, "test", make)

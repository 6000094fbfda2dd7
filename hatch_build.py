"""Compiles the sandbox's first process into the wheel: static, so it needs nothing of the guest."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

GUEST = Path("sandbox/guest")
WITHOUT_TLS = {"no-tls.c"}
WITH_TLS = {"tls.c", "files.c", "never.c"}
FLAGS = (
    "-static", "-s", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror", "-D_FORTIFY_SOURCE=2",
    "-Wl,--fatal-warnings",
)  # fmt: skip
TLS_FLAGS = (
    # What glibc warns of in a static program, and never.c has instead. To define these in there
    # under their own names is not enough: glibc's own dlopen is part of any static program, with
    # a warning for whoever names it.
    "-Wl,--wrap=dlopen,--wrap=getaddrinfo,--wrap=gethostbyname",
    "-lssl", "-lcrypto",
)  # fmt: skip
PACKAGES = "gcc libc6-dev libssl-dev"


class GuestInit(BuildHookInterface[Any]):
    """One binary per platform, so the wheel is no pure one. Two of them: only pods need TLS."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        del version
        guest = Path(self.root) / GUEST
        sources = {path.name for path in guest.glob("*.c")}
        made = {
            "init": (sources - WITH_TLS, ()),
            "init-pod": (sources - WITHOUT_TLS, TLS_FLAGS),
        }
        for name, (files, flags) in made.items():
            paths = [str(guest / file) for file in sorted(files)]
            _compile([*FLAGS, *paths, *flags], guest / name)
            build_data["force_include"][str(guest / name)] = str(GUEST / name)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"


def _compile(arguments: list[str], binary: Path) -> None:
    """Raises SystemExit, with what to install: what exactly is missing, the compiler has said."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    command = [compiler or "cc", *arguments, "-o", str(binary)]
    if compiler is None or subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(
            "runner: a C compiler, a static libc and a static OpenSSL are needed to build the "
            f"sandbox's first process: apt-get install {PACKAGES}"
        )

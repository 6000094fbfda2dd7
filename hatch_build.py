"""Compiles the sandbox's first process into the wheel: static, so it needs nothing of the guest."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("sandbox/guest/init.c")
BINARY = Path("sandbox/guest/init")
FLAGS = ("-static", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror", "-D_FORTIFY_SOURCE=2")


class GuestInit(BuildHookInterface[Any]):
    """One binary per platform, so the wheel is no pure one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        del version
        compiler = os.environ.get("CC") or shutil.which("cc")
        if compiler is None:
            raise SystemExit(
                "runner: a C compiler and a static libc are needed to build the sandbox's first "
                "process: apt-get install gcc libc6-dev"
            )
        root = Path(self.root)
        subprocess.run([compiler, *FLAGS, "-o", str(root / BINARY), str(root / SOURCE)], check=True)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["force_include"][str(root / BINARY)] = str(BINARY)

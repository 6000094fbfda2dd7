"""Makes a root filesystem from Debian's packages, as any user, by carrying out a Recipe.

mmdebstrap downloads and checks the packages with apt and unpacks them; none of their maintainer
scripts runs on the host.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from builder.rootfs import Recipe
from runner.errors import BuilderInstallFailed
from runner.stores.rootfs import remove_tree

PACKAGES = "var/lib/runner-packages"
"""In the tree: the file name of each package that it was made of, with its version."""
_LIST_PACKAGES = f"""\
mkdir -p "$1"/var/lib && (cd "$1"/var/cache/apt/archives && LC_ALL=C ls *.deb) >"$1"/{PACKAGES}"""
OF_NO_USE = (
    "dev/*",
    "etc/apt",
    "etc/dpkg",
    "etc/fstab",
    "etc/hostname",
    "etc/resolv.conf",
    "var/cache",
    "var/lib/apt",
    "var/lib/dpkg",
    "var/log",
)
"""Devices come from the sandbox; the rest differs on each machine, or tells about it."""
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_INSTALL_SECONDS = 1800
_LAST_LINES = 20


def bootstrap(
    recipe: Recipe, root: Path, *, mirror: str | None, report: Callable[[str], None]
) -> str:
    """Fills ``root`` and returns the builder's version.

    Args:
        recipe: What to install.
        root: An empty directory.
        mirror: Of Debian's archive; None for the one that this host's apt uses.
        report: Gets each line of progress.

    Raises:
        BuilderInstallFailed: A tool is missing, no mirror is known, or the download failed.
    """
    if shutil.which("mmdebstrap") is None:
        raise BuilderInstallFailed(
            "mmdebstrap is not on PATH", advice="Install it: apt-get install mmdebstrap"
        )
    archive = f"deb [signed-by={KEYRING}] {mirror or host_mirror()} {recipe.suite} main"
    command = [
        "mmdebstrap",
        # Nothing is run in the tree, so no chroot is needed; as root this mode only warns.
        f"--mode={'root' if os.geteuid() == 0 else 'chrootless'}",
        "--variant=extract",
        f"--include={','.join(recipe.packages)}",
        f"--extract-hook={_LIST_PACKAGES}",
        *(f"--aptopt={option}" for option in _apt_proxies()),
        recipe.suite,
        str(root),
        archive,
    ]
    _run(command, report)
    version = _version(root, recipe.version_package)
    for pattern in (*recipe.leave_out, *OF_NO_USE):
        for found in root.glob(pattern):
            remove_tree(found)
    return version


def host_mirror() -> str:
    """The mirror of Debian's main archive that apt on this host is configured with."""
    try:
        shown = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(ORIGIN) $(COMPONENT) $(RELEASE) $(SITE)"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        shown = ""
    for line in shown.splitlines():
        origin, component, release, site = line.split(" ", 3)
        if (origin, component) == ("Debian", "main") and re.fullmatch(r"[a-z]+", release):
            return site
    raise BuilderInstallFailed(
        "apt on this host knows no mirror of Debian's archive",
        advice="Name one with --mirror, or run apt-get update once.",
    )


def _apt_proxies() -> list[str]:
    """Proxies that this host's apt uses: mmdebstrap's own apt does not read them."""
    try:
        dumped = subprocess.run(
            ["apt-config", "dump"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    wanted = re.compile(r'Acquire::https?::Proxy(?:::[^ ]+)? "[^"]+";')
    return [line for line in dumped.splitlines() if wanted.fullmatch(line)]


def _run(command: list[str], report: Callable[[str], None]) -> None:
    lines: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        try:
            for raw in process.stdout:
                line = raw.decode("utf-8", "backslashreplace").rstrip()
                lines = [*lines[-_LAST_LINES:], line]
                report(line)
            status = process.wait(_INSTALL_SECONDS)
        except BaseException:
            process.kill()
            raise
    if status != 0:
        shown = "\n".join(lines)
        raise BuilderInstallFailed(f"mmdebstrap ended with {status}:\n{shown}")


def _version(root: Path, package: str) -> str:
    """The package's version, from the list of what was unpacked."""
    for line in (root / PACKAGES).read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition("_")
        if name == package:
            return rest.rpartition("_")[0].replace("%3a", ":")
    raise BuilderInstallFailed(f"the root filesystem has no package {package}")

"""A registry on loopback for the length of a bench, with the base images in it."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.stores import debian
from tests.support.toolbox import toolbox_tar

START_SECONDS = 15


@contextmanager
def running(directory: Path) -> Iterator[str]:
    """A docker-registry with its files in ``directory``; its ``HOST:PORT``."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    config = directory / "registry.yml"
    config.write_text(
        "version: 0.1\n"
        "log: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'registry'}}}}}\n"
        f'http: {{addr: "127.0.0.1:{port}"}}\n',
        encoding="utf-8",
    )
    with (directory / "registry.log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", config], stdout=log, stderr=log)
        try:
            _wait_for(process, port)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError("docker-registry does not start")


def push_toolbox(registry: str, directory: Path) -> str:
    """The small base image; its reference."""
    tar = directory / "toolbox.tar"
    tar.write_bytes(toolbox_tar())
    return _push(tar, f"{registry}/library/toolbox:1")


def push_debian(
    registry: str, cache: Path, name: str = "debian", packages: str = "gcc,libc6-dev"
) -> str:
    """A base image of Debian, made once and kept in ``cache``; its reference.

    The one with a compiler, where nothing else is said.
    """
    tar = cache / f"{name}.tar"
    if not tar.exists():
        arriving = cache / "arriving.tar"
        archive = f"deb [signed-by={debian.KEYRING}] {debian.host_mirror()} bookworm main"
        subprocess.run(
            ["mmdebstrap", f"--mode={'root' if os.geteuid() == 0 else 'fakechroot'}",
             "--variant=minbase", "--quiet", f"--include={packages}", "bookworm", arriving,
             archive],
            check=True,
        )  # fmt: skip
        arriving.rename(tar)
    return _push(tar, f"{registry}/library/{name}:12")


def _push(tar: Path, reference: str) -> str:
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false",
         f"tarball:{tar}", f"docker://{reference}"],
        check=True,
    )  # fmt: skip
    return reference

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
    http = f'addr: "127.0.0.1:{port}"'
    with _serving(directory, directory, http, socket.AF_INET, ("127.0.0.1", port)):
        yield f"127.0.0.1:{port}"


@contextmanager
def running_on(path: Path, work: Path, directory: Path) -> Iterator[None]:
    """One more with the files of that in ``directory``, on a Unix socket."""
    with _serving(work, directory, f'net: unix, addr: "{path}"', socket.AF_UNIX, str(path)):
        yield


@contextmanager
def _serving(
    work: Path,
    directory: Path,
    http: str,
    family: socket.AddressFamily,
    address: tuple[str, int] | str,
) -> Iterator[None]:
    config = work / "registry.yml"
    config.write_text(
        "version: 0.1\n"
        "log: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'registry'}}}}}\n"
        f"http: {{{http}}}\n",
        encoding="utf-8",
    )
    with (work / "registry.log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", config], stdout=log, stderr=log)
        try:
            _wait_for(process, family, address)
            yield
        finally:
            process.terminate()
            process.wait()


def _wait_for(
    process: subprocess.Popen[bytes], family: socket.AddressFamily, address: tuple[str, int] | str
) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as tried:
                tried.connect(address)
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
    _copy(f"tarball:{tar}", reference)
    return reference


def push_again(image: str, repository: str) -> None:
    """So that its layers are known in another repository of the same registry."""
    _copy(f"docker://{image}", f"{image.partition('/')[0]}/{repository}:base")


def _copy(source: str, reference: str) -> None:
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false",
         "--dest-tls-verify=false", source, f"docker://{reference}"],
        check=True,
    )  # fmt: skip

"""A real registry on loopback, shared by the integration tests."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from runner.settings import RegistrySettings, Settings

USER: Final = "pusher"
PASSWORD: Final = "push-me"
HTPASSWD: Final = f"{USER}:$2b$04$14pAwiqAdTLfMyjI1U/Bw.MDlbXHSzdABHs1qW7VYl7QvrV2LK4oq\n"
"""bcrypt of PASSWORD with the lowest cost, so that each request stays cheap."""


@dataclass(frozen=True)
class RealRegistry:
    """Attributes:
    host: ``127.0.0.1:PORT``.
    settings: Settings with which it may be reached.
    storage: Its files.
    """

    host: str
    settings: Settings
    storage: Path


@contextmanager
def running_registry(directory: Path, extra: str = "") -> Iterator[RealRegistry]:
    """A docker-registry with storage in ``directory``, until the end of the block."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed: apt-get install docker-registry")
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    config = directory / "config.yml"
    storage = directory / "storage"
    config.write_text(
        "version: 0.1\n"
        "log: {level: warn, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}\n"
        f'http: {{addr: "127.0.0.1:{port}"}}\n{extra}',
        encoding="utf-8",
    )
    log_path = directory / "registry.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen([program, "serve", config], stdout=log, stderr=log)
        try:
            _wait_for(process, port, log_path)
            host = f"127.0.0.1:{port}"
            here = RegistrySettings(plain_http=True, private_address=True)
            yield RealRegistry(host, Settings(registries={host: here}), storage)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 15
    while time.monotonic() < end and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.02)
    pytest.fail(f"docker-registry does not start:\n{log.read_text(errors='replace')[-2000:]}")


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    """An open registry. Shared: tests use repositories of their own."""
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="session")
def locked_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    """One that wants USER and PASSWORD for everything."""
    directory = tmp_path_factory.mktemp("locked-registry")
    htpasswd = directory / "htpasswd"
    htpasswd.write_text(HTPASSWD, encoding="ascii")
    extra = f"auth: {{htpasswd: {{realm: tests, path: {htpasswd}}}}}\n"
    with running_registry(directory, extra) as running:
        yield running


@pytest.fixture
def docker_login(locked_registry: RealRegistry, tmp_path: Path) -> dict[str, str]:
    """An environment in which somebody did ``docker login`` at the locked registry."""
    import base64
    import json

    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    document = {"auths": {locked_registry.host: {"auth": auth}}}
    (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf-8")
    return {"DOCKER_CONFIG": str(tmp_path)}

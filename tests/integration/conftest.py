"""A real registry on loopback, and people who run real sandboxes, shared by the tests."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from builder.buildah import Buildah
from policies.reference import Digest
from runner.settings import LocalSettings, RegistrySettings, Settings
from runner.stores import debian, installs
from runner.stores.rootfs import RootfsStore, remove_tree
from tests.support.engine import RealEngine, running_engine
from tests.support.hosts import REPOSITORY, STRANGER, Person, reachable
from tests.support.toolbox import toolbox_tar

USER: Final = "pusher"
PASSWORD: Final = "push-me"
HTPASSWD: Final = f"{USER}:$2b$04$14pAwiqAdTLfMyjI1U/Bw.MDlbXHSzdABHs1qW7VYl7QvrV2LK4oq\n"
"""bcrypt of PASSWORD with the lowest cost, so that each request stays cheap."""

CURRENT_RUNSC: Final = "RUNNER_CURRENT_RUNSC"


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
        pytest.skip("docker-registry is not installed: deploy/debian/install-host-tools.sh")
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
def mortal_registry(tmp_path: Path) -> Iterator[tuple[RealRegistry, Callable[[], None]]]:
    """An open registry of one test, and what ends it."""
    with ExitStack() as stack:
        yield stack.enter_context(running_registry(tmp_path)), stack.close


@pytest.fixture
def docker_login(locked_registry: RealRegistry, tmp_path: Path) -> dict[str, str]:
    """An environment in which somebody did ``docker login`` at the locked registry."""
    import base64
    import json

    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    document = {"auths": {locked_registry.host: {"auth": auth}}}
    (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf-8")
    return {"DOCKER_CONFIG": str(tmp_path)}


# -- a host with sandboxes -------------------------------------------------------------------


def needed(*programs: str) -> None:
    """Skips, loudly, where a program is missing."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: deploy/debian/install-host-tools.sh")


@pytest.fixture(scope="session")
def playground() -> Iterator[Path]:
    """A directory that other users may pass through; pytest's own are closed to them."""
    directory = Path(tempfile.mkdtemp(prefix="runner-test-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    remove_tree(directory)


@pytest.fixture(scope="session")
def cache() -> Path:
    """What is too dear to be made for each run of the tests."""
    directory = REPOSITORY / ".cache" / "tests"
    if not reachable(REPOSITORY):
        directory = Path("/var/tmp/runner-tests")
    directory.mkdir(parents=True, exist_ok=True)
    assert directory.stat().st_uid == os.geteuid(), f"{directory} is somebody else's"
    directory.parent.chmod(directory.parent.stat().st_mode | 0o055)
    directory.chmod(0o755)
    return directory


@pytest.fixture(scope="session")
def builders(cache: Path) -> Path:
    """The store that has buildah, installed once for each recipe."""
    needed("runsc")
    recipe = Digest.of(repr(Buildah.recipe).encode())
    directory = cache / f"data-{recipe.hex[:12]}" / "builders"
    store = RootfsStore(directory)
    if store.installed("buildah") is None:
        needed("mmdebstrap")
        directory.mkdir(parents=True, exist_ok=True)
        installs.from_packages(store, Buildah(), mirror=None, report=lambda _: None)
    directory.parent.chmod(0o755)
    store.verified("buildah")
    return directory


def _push(source: str, target: str) -> None:
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", source,
         target],
        check=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="session")
def debian_base(cache: Path, registry: RealRegistry) -> str:
    """Reference of a Debian image with a compiler, in the registry."""
    needed("skopeo")
    layout = cache / "debian-12"
    if not layout.exists():
        needed("mmdebstrap")
        arriving = Path(tempfile.mkdtemp(prefix="arriving-", dir=cache))
        try:
            tar, made = arriving / "base.tar", arriving / "layout"
            mode = "root" if os.geteuid() == 0 else "fakechroot"
            subprocess.run(
                ["mmdebstrap", f"--mode={mode}", "--variant=minbase", "--quiet",
                 "--include=gcc,libc6-dev,make", "bookworm", tar,
                 f"deb [signed-by={debian.KEYRING}] {debian.host_mirror()} bookworm main"],
                check=True, timeout=600,
            )  # fmt: skip
            _push(f"tarball:{tar}", f"oci:{made}:12")
            made.rename(layout)
        finally:
            remove_tree(arriving)
    reference = f"{registry.host}/library/debian:12"
    _push(f"oci:{layout}:12", f"docker://{reference}")
    return reference


@pytest.fixture(scope="session")
def tools_base(playground: Path, registry: RealRegistry) -> str:
    """Reference of a small image with a shell, coreutils and perl, in the registry."""
    needed("skopeo")
    tar = playground / "toolbox.tar"
    tar.write_bytes(toolbox_tar())
    reference = f"{registry.host}/library/toolbox:1"
    _push(f"tarball:{tar}", f"docker://{reference}")
    return reference


@pytest.fixture(scope="session")
def settings(registry: RealRegistry) -> Settings:
    """Sandboxes have host uids that no other run of anything uses."""
    first = 2_000_000_000 + os.getpid() % 100_000 * 100
    local = LocalSettings(first_uid=first, uids=8)
    return registry.settings.model_copy(update={"local": local})


@pytest.fixture(scope="session")
def person(playground: Path, builders: Path, settings: Settings) -> Iterator[Person]:
    """Whoever runs the tests, with directories of their own."""
    person = Person.move_in(playground / "me", settings, builders)
    yield person
    person.move_out()


@pytest.fixture(scope="session")
def stranger(playground: Path, builders: Path, settings: Settings) -> Iterator[Person]:
    """An ordinary user, where the tests may become one."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user: run as root too")
    for path in (REPOSITORY, Path(sys.prefix), Path(sys.executable).resolve()):
        if not reachable(path):
            pytest.skip(f"{path} is closed to other users: check out where they may read")
    stranger = Person.move_in(playground / "stranger", settings, builders, STRANGER)
    yield stranger
    stranger.move_out()


@pytest.fixture(scope="session")
def engine(playground: Path) -> Iterator[RealEngine]:
    """A Docker Engine as most hosts have it: its containers' root is the host's."""
    (playground / "engine").mkdir()
    with running_engine(playground / "engine") as running:
        yield running


@pytest.fixture(scope="session")
def docker_person(
    playground: Path, builders: Path, settings: Settings, engine: RealEngine
) -> Iterator[Person]:
    """Whoever runs the tests, with sandboxes of that engine."""
    person = Person.move_in(playground / "docker-me", engine.settings(settings), builders)
    yield replace(person, backend="docker")
    person.move_out()


@pytest.fixture(scope="session")
def current_runsc() -> str:
    """A runsc that mounts EROFS images, which the packaged one does not."""
    named = os.environ.get(CURRENT_RUNSC)
    if named is None:
        pytest.skip(
            f"{CURRENT_RUNSC} names no runsc of 2026-01-26 or later; one is at "
            "https://storage.googleapis.com/gvisor/releases/release/latest/x86_64/runsc"
        )
    return named


@pytest.fixture
def newcomer(place: Path, builders: Path, settings: Settings) -> Iterator[Person]:
    """Somebody without any image yet."""
    newcomer = Person.move_in(place / "newcomer", settings, builders)
    yield newcomer
    newcomer.move_out()


@pytest.fixture
def place(playground: Path) -> Path:
    """A new directory that everybody can read, for one test."""
    directory = Path(tempfile.mkdtemp(dir=playground))
    directory.chmod(0o755)
    return directory

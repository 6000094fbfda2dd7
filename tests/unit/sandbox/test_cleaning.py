"""Whoever made a place, its own kind cleans it."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sandbox.cleaning import clean
from sandbox.docker.backend import DockerBackend, Runtimes
from sandbox.errors import EngineUnavailable, SandboxFailed
from sandbox.model import Backend
from tests.support.spoken import SpokenEngine, speaking

BACKENDS: Mapping[str, Backend] = {
    "docker": DockerBackend(Path("/none"), socket=Path("/none/sock"), runtimes=Runtimes()),
}


@pytest.fixture
def spoken(tmp_path: Path) -> Iterator[SpokenEngine]:
    with speaking(tmp_path / "docker.sock") as engine:
        engine.says("GET /containers/json", [{"Id": "c", "Labels": {}}])
        engine.says("DELETE /containers/c", status=204)
        yield engine


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "sandboxes/b"
    (directory / "guest").mkdir(parents=True)
    return directory


def test_a_place_of_an_engine_is_cleaned_by_that_engine(spoken: SpokenEngine, place: Path) -> None:
    (place / "backend").write_text("docker")
    (place / "engine").write_text(str(spoken.socket))
    clean(place, BACKENDS)
    assert spoken.saw("DELETE /containers/c")
    assert not place.exists()


def test_an_engine_that_is_down_is_no_reason_to_take_it_for_a_local_place(
    tmp_path: Path, place: Path
) -> None:
    (place / "backend").write_text("docker")
    (place / "engine").write_text(str(tmp_path / "none.sock"))
    with pytest.raises(EngineUnavailable):
        clean(place, BACKENDS)
    assert place.exists()


def test_a_place_whose_backend_is_not_here_counts_as_in_use(place: Path) -> None:
    (place / "backend").write_text("cloud\x1b[2J")
    with pytest.raises(SandboxFailed, match=r"not here: 'cloud\\x1b") as caught:
        clean(place, BACKENDS)
    assert "\x1b" not in caught.value.message
    assert place.exists()


def test_a_place_that_nobody_got_as_far_as_naming_is_a_local_one_without_the_sdk(
    place: Path,
) -> None:
    script = (
        "import sys; from pathlib import Path; from sandbox.cleaning import clean\n"
        "from sandbox.local.backend import LocalBackend\n"
        "local = LocalBackend(Path('/'), runsc_name='runsc', uids=range(1))\n"
        "clean(Path(sys.argv[1]), {'local': local}); assert 'docker' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, place], check=True, timeout=60)
    assert not place.exists()

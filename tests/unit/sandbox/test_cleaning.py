"""Whoever made a place, its own kind cleans it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.cleaning import clean
from sandbox.errors import EngineUnavailable
from tests.support.spoken import SpokenEngine, speaking


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
    (place / "engine").write_text(str(spoken.socket))
    clean(place)
    assert spoken.saw("DELETE /containers/c")
    assert not place.exists()


def test_an_engine_that_is_down_is_no_reason_to_take_it_for_a_local_place(
    tmp_path: Path, place: Path
) -> None:
    (place / "engine").write_text(str(tmp_path / "none.sock"))
    with pytest.raises(EngineUnavailable):
        clean(place)
    assert place.exists()


def test_a_local_place_needs_no_engine_and_not_its_sdk(place: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from sandbox.cleaning import clean\n"
        "clean(Path(sys.argv[1])); assert 'docker' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, place], check=True, timeout=60)
    assert not place.exists()

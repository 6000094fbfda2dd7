"""What gc takes of engines: what nothing here knows of, and what killed runners left."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner import gc
from runner.cli.tools import backends
from runner.errors import EngineUnavailable, SandboxFailed
from runner.files import Home
from runner.settings import DockerSettings, Settings
from sandbox.docker.containers import DIGEST_LABEL, NAME_LABEL
from tests.support.spoken import SpokenEngine, speaking

DIGEST = hashlib.sha256(b"root").hexdigest()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(data=tmp_path / "data", state=tmp_path / "state")


@pytest.fixture
def spoken(tmp_path: Path) -> Iterator[SpokenEngine]:
    with speaking(tmp_path / "docker.sock") as engine:
        yield engine


def settings(socket: Path) -> Settings:
    return Settings(docker=DockerSettings(socket=str(socket)))


def collecting(home: Home, socket: Path) -> Iterator[str]:
    return gc.collect(home, settings(socket), backends(home, settings(socket)))


def collected(home: Home, socket: Path) -> list[str]:
    return list(collecting(home, socket))


def left(home: Home, name: str, engine: Path | None) -> Path:
    """A place as a runner that was killed leaves it."""
    directory = home.sandboxes / name
    (directory / "guest").mkdir(parents=True)
    if engine is not None:
        (directory / "backend").write_text("docker")
        (directory / "engine").write_text(str(engine))
    return directory


def test_an_engine_that_has_nothing_of_ours_is_left_alone(home: Home, spoken: SpokenEngine) -> None:
    assert collected(home, spoken.socket) == []
    assert not [each for each in spoken.asked if each.what.startswith("DELETE")]


def test_without_an_engine_there_is_nothing_to_ask(home: Home, tmp_path: Path) -> None:
    assert collected(home, tmp_path / "none.sock") == []


def test_a_sandbox_of_an_engine_that_is_down_is_an_error_after_all_others_are_gone(
    home: Home, tmp_path: Path
) -> None:
    stays = left(home, "a", tmp_path / "none.sock")
    goes = left(home, "b", None)
    found = collecting(home, tmp_path / "none.sock")
    assert next(found) == "sandbox b"
    with pytest.raises(EngineUnavailable):
        list(found)
    assert (stays.exists(), goes.exists()) == (True, False)


def test_the_first_of_several_errors_is_told(
    home: Home, spoken: SpokenEngine, tmp_path: Path
) -> None:
    left(home, "a", tmp_path / "none.sock")
    left(home, "b", spoken.socket)
    spoken.says("GET /containers/json", {"message": "no"}, status=500)
    with pytest.raises(EngineUnavailable):
        collected(home, spoken.socket)


def test_a_sandbox_is_asked_for_at_the_engine_that_it_was_of(
    home: Home, spoken: SpokenEngine, tmp_path: Path
) -> None:
    left(home, "a", spoken.socket)
    spoken.says("GET /containers/json", [{"Id": "c", "Labels": {NAME_LABEL: "a"}}])
    spoken.says("DELETE /containers/c", status=204)
    assert collected(home, tmp_path / "configured-since.sock") == ["sandbox a"]
    assert spoken.saw("DELETE /containers/c")


def test_containers_without_a_place_are_taken_and_images_of_installed_builders_stay(
    home: Home, spoken: SpokenEngine
) -> None:
    (home.builders / "buildah" / DIGEST / "root").mkdir(parents=True)
    spoken.says("GET /containers/json", [{"Id": "c", "Labels": {NAME_LABEL: "gone"}}])
    spoken.says(
        "GET /images/json",
        [
            {"Id": "i", "Labels": {DIGEST_LABEL: f"sha256:{DIGEST}"}},
            {"Id": "j", "Labels": {DIGEST_LABEL: "sha256:old"}},
        ],
    )
    spoken.says("DELETE /containers/c", status=204)
    spoken.says("DELETE /images/j", [])
    said = collected(home, spoken.socket)
    assert said[:2] == ["container of sandbox gone", "image of builder sha256:old"]


def test_an_engine_that_refuses_does_not_stop_the_rest(home: Home, spoken: SpokenEngine) -> None:
    spoken.says("GET /containers/json", {"message": "no"}, status=500)
    half = home.builds / "half"
    half.mkdir(parents=True)
    found = collecting(home, spoken.socket)
    assert next(found) == "build half"
    with pytest.raises(SandboxFailed, match="the engine says: no"):
        list(found)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every socket: run as a user too")
def test_an_engine_that_this_user_may_not_use_is_not_asked(
    home: Home, spoken: SpokenEngine
) -> None:
    spoken.socket.chmod(0)
    assert collected(home, spoken.socket) == []
    assert spoken.asked == []

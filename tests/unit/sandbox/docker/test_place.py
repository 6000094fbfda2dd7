"""Places of the docker backend, and what an engine has of them by their labels."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.docker.containers import DIGEST_LABEL, LABEL, NAME_LABEL
from sandbox.docker.place import DockerPlace, clean, labels, of_state, reserve, sweep
from sandbox.errors import EngineLost, EngineUnavailable, IsolationError, SandboxFailed
from sandbox.locks import abandoned
from tests.support.spoken import HANG_UP, SpokenEngine, speaking


@pytest.fixture
def spoken(tmp_path: Path) -> Iterator[SpokenEngine]:
    with speaking(tmp_path / "docker.sock") as engine:
        yield engine


@pytest.fixture
def sandboxes(tmp_path: Path) -> Path:
    return tmp_path / "sandboxes"


def has(
    engine: SpokenEngine,
    *,
    containers: dict[str, dict[str, str]] | None = None,
    networks: dict[str, dict[str, str]] | None = None,
    images: dict[str, dict[str, str]] | None = None,
) -> None:
    """What the engine lists by any label, and lets be removed: labels by id."""
    for path, listed, things in (
        ("containers", "/containers/json", containers),
        ("networks", "/networks", networks),
        ("images", "/images/json", images),
    ):
        found = [{"Id": each, "Labels": labels} for each, labels in (things or {}).items()]
        engine.says(f"GET {listed}", found)
        for each in things or {}:
            engine.says(f"DELETE /{path}/{each}", status=204 if path != "images" else 200)


def removed(engine: SpokenEngine) -> list[str]:
    """Kind and id of everything, in order."""
    return [each.what.removeprefix("DELETE /") for each in engine.asked if "DELETE" in each.what]


def reserved(engine: SpokenEngine, sandboxes: Path, name: str = "b") -> DockerPlace:
    client = engine.client().__enter__()
    return reserve(sandboxes, name, engine=client, socket=engine.socket, peer_uid=0)


# -- one place -------------------------------------------------------------------------------------


def test_a_place_says_which_engine_it_is_of(spoken: SpokenEngine, sandboxes: Path) -> None:
    place = reserved(spoken, sandboxes)
    assert (place.directory / "engine").read_text() == str(spoken.socket)
    assert place.door.is_dir()
    assert list(abandoned(sandboxes)) == []
    place.release()


def test_a_name_is_reserved_once(spoken: SpokenEngine, sandboxes: Path) -> None:
    place = reserved(spoken, sandboxes)
    with pytest.raises(SandboxFailed, match="no place"):
        reserved(spoken, sandboxes)
    assert place.door.is_dir()
    place.release()


def test_what_the_engine_has_of_it_goes_with_it(spoken: SpokenEngine, sandboxes: Path) -> None:
    place = reserved(spoken, sandboxes)
    has(spoken, containers={"c": {}, "relay": {}}, networks={"n": {}})
    place.release()
    place.release()
    # An engine does not remove a network that something is in.
    assert removed(spoken) == ["containers/c", "containers/relay", "networks/n"]
    asked = json.loads(spoken.saw("GET /containers/json")[0].query["filters"][0])
    assert asked == {"label": [f"{name}={value}" for name, value in place.labels.items()]}
    assert list(sandboxes.iterdir()) == []


def test_an_engine_that_is_gone_leaves_a_place_for_gc(
    spoken: SpokenEngine, sandboxes: Path
) -> None:
    place = reserved(spoken, sandboxes)
    spoken.answers["GET /containers/json"] = HANG_UP
    with pytest.raises(EngineLost):
        place.release()
    assert [path.name for path in abandoned(sandboxes)] == ["b"]
    has(spoken, containers={"c": {}})
    clean(sandboxes / "b")
    assert removed(spoken) == ["containers/c"]
    assert list(sandboxes.iterdir()) == []


# -- what nobody holds any more --------------------------------------------------------------------


def left(sandboxes: Path, engine: Path, name: str = "b") -> Path:
    """As a runner that was killed leaves it."""
    directory = sandboxes / name
    (directory / "guest").mkdir(parents=True)
    (directory / "engine").write_text(str(engine))
    return directory


def test_a_place_whose_engine_is_down_stays(sandboxes: Path, tmp_path: Path) -> None:
    directory = left(sandboxes, tmp_path / "none.sock")
    with pytest.raises(EngineUnavailable):
        clean(directory)
    assert directory.is_dir()


def test_a_place_whose_container_cannot_be_removed_stays(
    spoken: SpokenEngine, sandboxes: Path
) -> None:
    directory = left(sandboxes, spoken.socket)
    has(spoken, containers={"c": {}})
    spoken.says("DELETE /containers/c", {"message": "device busy"}, status=500)
    with pytest.raises(SandboxFailed, match="busy"):
        clean(directory)
    assert directory.is_dir()


def test_labels_tell_sandboxes_and_states_apart_and_no_path(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    found = labels(here / "b")
    assert found == {**of_state(here), NAME_LABEL: "b"}
    assert of_state(here) != of_state(there)
    assert not any(str(tmp_path) in value for value in found.values())


def test_a_state_is_the_same_by_every_way_to_it(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    assert of_state(tmp_path / "link") == of_state(tmp_path / "here" / ".." / "here")


# -- sweeping --------------------------------------------------------------------------------------

KEPT, DROPPED = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"


def test_what_has_no_place_any_more_is_swept_and_named(
    spoken: SpokenEngine, sandboxes: Path
) -> None:
    left(sandboxes, spoken.socket, "there")
    has(
        spoken,
        containers={"c1": {NAME_LABEL: "there"}, "c2": {NAME_LABEL: "gone"}, "c3": {}},
        networks={"n1": {NAME_LABEL: "there"}, "n2": {NAME_LABEL: "gone"}},
        images={"i1": {DIGEST_LABEL: KEPT}, "i2": {DIGEST_LABEL: DROPPED}, "i3": {}},
    )
    assert list(sweep(spoken.socket, sandboxes, [KEPT])) == [
        "container of sandbox gone",
        "container of sandbox ",
        "network of sandbox gone",
        f"image of builder {DROPPED}",
        "image of builder None",
    ]
    assert removed(spoken) == [
        "containers/c2", "containers/c3", "networks/n2", "images/i2", "images/i3",
    ]  # fmt: skip
    for path in ("/containers/json", "/networks", "/images/json"):
        asked = json.loads(spoken.saw(f"GET {path}")[0].query["filters"][0])
        assert asked == {"label": [f"{LABEL}={of_state(sandboxes)[LABEL]}"]}


def test_sweeping_ends_where_the_engine_does_not_answer(sandboxes: Path, tmp_path: Path) -> None:
    with pytest.raises(IsolationError):
        list(sweep(tmp_path / "none.sock", sandboxes, []))

"""What doctor says of engines, row by row, up to where a sandbox would be started."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from policies.model import Isolation
from sandbox.docker.backend import DockerBackend, Runtimes
from sandbox.docker.probe import ENTRY, probe
from sandbox.rows import Row, Verdict
from tests.support.hosts import REPOSITORY
from tests.support.spoken import INFO, SpokenEngine, speaking


@pytest.fixture
def spoken(tmp_path: Path) -> Iterator[SpokenEngine]:
    with speaking(tmp_path / "docker.sock") as engine:
        yield engine


def rows(engine: SpokenEngine, isolation: Isolation = Isolation.GVISOR, **said: Any) -> list[Row]:
    engine.says("GET /info", {**INFO, **said})
    sandboxes = engine.socket.parent / "sandboxes"
    backend = DockerBackend(sandboxes, socket=engine.socket, runtimes=Runtimes())
    found = list(probe(backend, isolation))
    assert not sandboxes.exists() or list(sandboxes.iterdir()) == []
    return found


def row(engine: SpokenEngine, name: str, **said: Any) -> Row:
    (found,) = (each for each in rows(engine, **said) if each.name == name)
    return found


def test_without_an_engine_there_is_one_row(tmp_path: Path) -> None:
    backend = DockerBackend(tmp_path, socket=tmp_path / "none.sock", runtimes=Runtimes())
    (only,) = probe(backend, Isolation.GVISOR)
    assert (only.name, only.verdict) == ("engine", Verdict.FAIL)
    assert "runner doctor" in only.mend


def test_whoever_may_use_it_is_told_to_be_root(spoken: SpokenEngine) -> None:
    found = row(spoken, "engine")
    assert found.verdict is Verdict.OK
    assert "20.10.24+dfsg1" in found.detail
    assert "is root on this host" in found.detail


def test_limits_that_cannot_be_kept_are_named(spoken: SpokenEngine) -> None:
    assert row(spoken, "limits").verdict is Verdict.OK
    found = row(spoken, "limits", MemoryLimit=False, PidsLimit=False)
    assert (found.verdict, found.mend != "") == (Verdict.FAIL, True)
    assert "memory, pids" in found.detail


def test_swap_that_is_not_limited_is_warned_about(spoken: SpokenEngine) -> None:
    found = row(spoken, "limits", SwapLimit=False)
    assert (found.verdict, "swap" in found.detail) == (Verdict.WARN, True)


def test_host_root_is_warned_about_and_a_range_of_its_own_is_not(spoken: SpokenEngine) -> None:
    assert row(spoken, "identity").verdict is Verdict.WARN
    remapped = {
        "SecurityOptions": ["name=userns"], "DockerRootDir": "/var/lib/docker/100000.100000",
    }  # fmt: skip
    found = row(spoken, "identity", **remapped)
    assert found.verdict is Verdict.OK
    assert "100000" in found.detail


def test_a_runtime_that_is_not_registered_comes_with_its_entry(spoken: SpokenEngine) -> None:
    *_, last = rows(spoken, Runtimes={"runc": {"path": "runc"}})
    assert (last.name, last.verdict) == ("runtime", Verdict.FAIL)
    assert json.dumps(ENTRY) in last.mend


def test_the_entry_is_the_one_that_deploy_holds() -> None:
    shipped = json.loads((REPOSITORY / "deploy/docker/daemon.json").read_text())
    assert shipped["runtimes"]["runsc"] == ENTRY


def test_a_door_by_network_is_worse_than_a_socket(spoken: SpokenEngine) -> None:
    assert row(spoken, "door").verdict is Verdict.OK
    found = row(spoken, "door", Runtimes={"runsc": {"path": "/usr/bin/runsc"}})
    assert found.verdict is Verdict.WARN
    assert "--host-uds=open" in found.mend


def test_a_sandbox_that_does_not_start_says_why(spoken: SpokenEngine) -> None:
    spoken.says("POST /images/create")
    spoken.says("POST /containers/create", {"message": "the disk is full"}, status=500)
    found = row(spoken, "sandbox")
    assert (found.verdict, found.detail) == (Verdict.FAIL, "the engine says: the disk is full")
    assert [each.what for each in spoken.asked if each.what.startswith("DELETE /images/")]


def test_of_kata_the_host_is_looked_at_first(spoken: SpokenEngine) -> None:
    names = [each.name for each in rows(spoken, Isolation.KATA)]
    assert names[:3] == ["engine", "limits", "identity"]
    assert len(names) > 4

import json
from pathlib import Path

import pytest

from policies.model import Isolation
from runner.events import Event, Output, Progress, Warned
from runner.state import BuildDirectory, drop_large, ended, expired, killed, new_id


def test_ids_sort_by_time_and_differ() -> None:
    ids = [new_id() for _ in range(50)]
    assert len(set(ids)) == 50
    assert [i[:15] for i in ids] == sorted(i[:15] for i in ids)


def test_the_raw_log_and_the_events_are_kept_apart(
    tmp_path: Path, every_event: list[Event]
) -> None:
    directory = BuildDirectory.create(tmp_path)
    for event in every_event:
        directory.listen(event)
    directory.listen(Output(b"\x1b[31m"))
    directory.close()
    assert directory.log.read_bytes().endswith(b"\xff\x1b[31m")
    kept = [json.loads(line) for line in (directory.path / "events.jsonl").read_text().splitlines()]
    assert len(kept) == sum(not isinstance(event, (Output, Progress)) for event in every_event)


def test_documents_are_written_whole_and_private(tmp_path: Path) -> None:
    directory = BuildDirectory.create(tmp_path)
    directory.write("decision", {"isolation": Isolation.GVISOR, "text": "\x1bé"})
    path = directory.path / "decision.json"
    assert path.read_bytes() == b'{\n "isolation": "gvisor",\n "text": "\\u001b\\u00e9"\n}\n'
    assert path.stat().st_mode & 0o777 == 0o600
    assert directory.path.stat().st_mode & 0o777 == 0o700
    directory.close()


def test_closing_drops_what_is_large_and_keeps_the_rest(tmp_path: Path) -> None:
    directory = BuildDirectory.create(tmp_path)
    directory.context.touch()
    directory.staged.mkdir()
    (directory.staged / "blob").touch()
    directory.close()
    left = {path.name for path in directory.path.iterdir()}
    assert left == {"lock", "events.jsonl", "build.log"}


def test_a_build_is_made_once(tmp_path: Path) -> None:
    directory = BuildDirectory(tmp_path, "b")
    with pytest.raises(OSError, match="b"):
        BuildDirectory(tmp_path, "b")
    directory.close()


def test_killed_builds_are_those_that_neither_ended_nor_run(tmp_path: Path) -> None:
    assert list(killed(tmp_path / "none")) == []
    names = ("running", "ended", "killed")
    running, ended, dead = (BuildDirectory(tmp_path, name) for name in names)
    ended.write("result", {})
    ended.close()
    dead.close()
    running.listen(Warned("still here"))
    assert [path.name for path in killed(tmp_path)] == ["killed"]
    running.close()


def test_what_a_kill_left_in_an_ended_build_is_dropped(tmp_path: Path) -> None:
    directory = BuildDirectory.create(tmp_path)
    directory.write("result", {})
    directory.staged.mkdir()
    assert list(ended(tmp_path)) == []  # it runs
    directory.close()
    directory.staged.mkdir()
    assert [drop_large(path) for path in ended(tmp_path)] == [True]
    assert [drop_large(path) for path in ended(tmp_path)] == [False]
    assert (directory.path / "result.json").exists()


@pytest.mark.parametrize(
    ("decision", "days"),
    [
        ({"decision": {"grant": {"retention_days": 2}}}, 2),
        ({"decision": {"reason": "denied", "rule": "deny/x"}}, 30),
        ({"decision": []}, 30),
        (None, 30),
    ],
)
def test_a_record_is_kept_for_as_long_as_its_policy_asks(
    tmp_path: Path, decision: object, days: int
) -> None:
    directory = BuildDirectory.create(tmp_path)
    if decision is not None:
        directory.write("decision", decision)
    directory.write("result", {"status": 0})
    directory.close()
    written = (directory.path / "result.json").stat().st_mtime
    assert not expired(directory.path, written + days * 86_400 - 1)
    assert expired(directory.path, written + days * 86_400 + 1)
    directory.image.mkdir()  # which is nowhere else
    assert not expired(directory.path, written + 1e12)

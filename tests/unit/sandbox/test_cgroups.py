"""Control groups against directories that look like theirs."""

import json
import os
from pathlib import Path

import pytest

from policies.model import Limits
from sandbox import cgroups
from sandbox.cgroups import Group
from sandbox.model import Ending

GROUP = "runner-b"
LIMITS = Limits(memory_bytes=1 << 20, cpu_millis=1500, pids=77)
V1 = {
    "memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    "cpu": ("cpu.cfs_period_us", "cpu.cfs_quota_us"),
    "pids": ("pids.max",),
}
V2 = ("memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "pids.max")
ENABLED = "memory cpu pids io"


def fill(directory: Path, *names: str) -> None:
    """What the kernel does when a group is made: its files are there at once."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (*names, "cgroup.procs"):
        (directory / name).touch()


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"memory": "mine", "cpu": "mine", "cpuacct": "mine", "pids": "", "": "mine"}
    monkeypatch.setattr(cgroups, "_groups_of", lambda: groups)


@pytest.fixture
def v1(tmp_path: Path, own: None) -> Path:
    for controller, names in V1.items():
        fill(tmp_path / controller / ("" if controller == "pids" else "mine") / "runner-b", *names)
    return tmp_path


@pytest.fixture
def v2(tmp_path: Path, own: None) -> Path:
    fill(tmp_path, "cgroup.controllers", "cgroup.subtree_control")
    fill(tmp_path / "runner")
    # As the kernel shows it; a plain file would keep what was written.
    (tmp_path / "runner" / "cgroup.subtree_control").symlink_to(tmp_path / "enabled")
    (tmp_path / "enabled").write_text(ENABLED)
    fill(tmp_path / "runner" / "runner-b", *V2)
    return tmp_path


@pytest.fixture
def kernel_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enabling controllers changes what the file shows, not to what was written."""
    write = cgroups._write

    def as_kernel(path: Path, value: int | str) -> None:
        if path.name != "cgroup.subtree_control":
            write(path, value)

    monkeypatch.setattr(cgroups, "_write", as_kernel)


def test_version_1_has_a_directory_for_each_controller(v1: Path) -> None:
    announced: list[str] = []
    group = Group.make("b", LIMITS, v1, announced.append)
    assert group is not None
    assert group.name == "cgroup v1"
    memory, cpu, pids = group.directories
    assert (memory, cpu, pids) == (
        v1 / "memory/mine/runner-b",
        v1 / "cpu/mine/runner-b",
        v1 / "pids/runner-b",
    )
    assert (memory / "memory.limit_in_bytes").read_text() == str(1 << 20)
    assert (memory / "memory.memsw.limit_in_bytes").read_text() == str(1 << 20)
    assert (cpu / "cpu.cfs_period_us").read_text() == "100000"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "150000"
    assert (pids / "pids.max").read_text() == "77"
    assert group.procs == [str(directory / "cgroup.procs") for directory in group.directories]
    assert [Group.recorded(text, v1) for text in announced] == [group]


def test_a_record_names_groups_of_ours_alone() -> None:
    for path in (
        "/sys/fs/cgroup/memory/system.slice",
        "/home/somebody/runner-x",
        "/sys/fs/cgroup/../../home/somebody/runner-x",
    ):
        assert Group.recorded(json.dumps([1, path])).directories == ()


def test_a_group_is_announced_before_it_is_made_and_found_again_by_that(v1: Path) -> None:
    (v1 / "pids/runner-b/pids.max").unlink()
    (v1 / "pids/runner-b/cgroup.procs").unlink()
    (v1 / "pids/runner-b").rmdir()
    announced: list[str] = []

    def announce(text: str) -> None:
        assert not (v1 / "pids/runner-b").exists()
        (v1 / "pids/runner-b").mkdir()
        (v1 / "pids/runner-b/pids.max").touch()
        announced.append(text)

    group = Group.make("b", LIMITS, v1, announce)
    assert [Group.recorded(text, v1) for text in announced] == [group]


def test_a_record_never_names_a_group_that_is_not_ours() -> None:
    text = '[1, "/sys/fs/cgroup/memory/runner-b", "/sys/fs/cgroup/memory/system.slice"]'
    assert Group.recorded(text) == Group(1, (Path("/sys/fs/cgroup/memory/runner-b"),))


@pytest.mark.usefixtures("kernel_writes")
def test_version_2_has_one_directory(v2: Path) -> None:
    group = Group.make("b", LIMITS, v2)
    assert group is not None
    assert (group.name, group.directories) == ("cgroup v2", (v2 / "runner/runner-b",))
    written = {name: (v2 / "runner/runner-b" / name).read_text() for name in V2}
    assert written == {
        "memory.max": str(1 << 20),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "cpu.max": "150000 100000",
        "pids.max": "77",
    }


@pytest.mark.usefixtures("kernel_writes")
def test_a_kernel_without_swap_accounting_still_keeps_the_other_limits(v2: Path) -> None:
    for name in ("memory.swap.max", "memory.oom.group"):
        (v2 / "runner/runner-b" / name).unlink()
    assert Group.make("b", LIMITS, v2) is not None
    assert not (v2 / "runner/runner-b/memory.swap.max").exists()


def test_version_1_does_without_swap_accounting_too(v1: Path) -> None:
    missing = v1 / "memory/mine/runner-b/memory.memsw.limit_in_bytes"
    missing.unlink()
    assert Group.make("b", LIMITS, v1) is not None
    assert not missing.exists()


def test_a_limit_that_cannot_be_written_leaves_no_group(
    v1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Group] = []
    monkeypatch.setattr(Group, "remove", lambda group: removed.append(group))  # noqa: PLW0108 - a method
    (v1 / "pids/runner-b/pids.max").unlink()
    assert Group.make("b", LIMITS, v1) is None
    assert len(removed) == 1


def test_where_nothing_is_writable_there_is_no_group(
    v1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    assert Group.make("b", LIMITS, v1) is None


@pytest.mark.usefixtures("kernel_writes")
@pytest.mark.parametrize(("enabled", "made"), [(ENABLED, True), ("memory pids", False)])
def test_an_ordinary_user_needs_its_own_group_delegated(
    v2: Path, enabled: str, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, _: path != v2)
    fill(v2 / "mine/runner-b", *V2)
    (v2 / "mine/cgroup.subtree_control").write_text(enabled)
    group = Group.make("b", LIMITS, v2)
    assert (group is not None) is made
    assert group is None or group.directories == (v2 / "mine/runner-b",)


def test_a_version_2_without_delegation_has_no_group(v2: Path) -> None:
    (v2 / "enabled").unlink()
    assert Group.make("b", LIMITS, v2) is None


@pytest.mark.parametrize(
    ("version", "files", "expected"),
    [
        (1, {}, (None, 0)),
        (1, {"memory.oom_control": "under_oom 0\noom_kill 1\n"}, (Ending.MEMORY, 0)),
        (1, {"memory.oom_control": "oom_kill_disable 1\noom_kill 0\n"}, (None, 0)),
        (1, {"memory.max_usage_in_bytes": "42\n", "pids.events": "max 2\n"}, (Ending.PIDS, 42)),
        (2, {"memory.events": "oom 1\noom_kill 3\n"}, (Ending.MEMORY, 0)),
        (2, {"memory.peak": "43\n", "pids.events": "max 0\n"}, (None, 43)),
        (2, {"memory.peak": "max\n", "memory.events": "oom_kill x\n"}, (None, 0)),
    ],
)
def test_counters_say_what_happened(
    tmp_path: Path, version: int, files: dict[str, str], expected: tuple[Ending | None, int]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    group = Group(version, (tmp_path,))
    assert (group.ending(), group.memory_peak_bytes()) == expected


def test_processes_are_those_of_every_directory(tmp_path: Path) -> None:
    me, parent = os.getpid(), os.getppid()
    for name, text in (("a", f"{me}\n{parent}\n"), ("b", f"{parent}\n{2**22 + 1}\n"), ("c", "x")):
        fill(tmp_path / name)
        (tmp_path / name / "cgroup.procs").write_text(text)
    group = Group(1, tuple(tmp_path / name for name in "abcd"))
    assert {member.pid for member in group.members()} == {me, parent}


def test_removing_waits_for_the_last_process_but_not_for_ever(tmp_path: Path) -> None:
    busy, empty = tmp_path / "busy", tmp_path / "empty"
    fill(busy)
    empty.mkdir()
    Group(1, (busy, empty)).remove(within_seconds=0.05)
    assert busy.exists()
    assert not empty.exists()
    (busy / "cgroup.procs").unlink()
    Group(2, (busy,)).remove()
    assert not busy.exists()


def test_our_own_groups_are_read_by_controller() -> None:
    assert all(not path.startswith("/") for path in cgroups._groups_of().values())


def test_processor_time_is_what_the_kernel_counted(v1: Path, v2: Path) -> None:
    newer = Group(2, (v2 / "g",))
    (v2 / "g").mkdir()
    assert newer.cpu_seconds() is None
    (v2 / "g/cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    assert newer.cpu_seconds() == 1.5
    older = Group(1, (v1 / "m", v1 / "c", v1 / "p"))
    (v1 / "c").mkdir()
    (v1 / "c/cpuacct.usage").write_text("2500000000\n")
    assert older.cpu_seconds() == 2.5


# -- groups that somebody else made ----------------------------------------------------------------


def own_groups(monkeypatch: pytest.MonkeyPatch, **groups: str) -> None:
    monkeypatch.setattr(cgroups, "_groups_of", lambda process: groups if process == "7" else {})


def test_a_process_is_in_one_group_for_each_controller_of_version_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_groups(monkeypatch, memory="docker/c", cpu="docker/c", cpuacct="docker/c", pids="docker/p")
    expected = (tmp_path / "memory/docker/c", tmp_path / "cpuacct/docker/c",
                tmp_path / "pids/docker/p")  # fmt: skip
    for directory in expected:
        directory.mkdir(parents=True)
    assert Group.of(7, tmp_path) == Group(1, expected)
    assert Group.of(8, tmp_path) is None


def test_a_process_is_in_one_group_of_version_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "cgroup.controllers")
    (tmp_path / "system.slice/c").mkdir(parents=True)
    own_groups(monkeypatch, **{"": "system.slice/c"})
    assert Group.of(7, tmp_path) == Group(2, (tmp_path / "system.slice/c",))
    assert Group.of(8, tmp_path) is None


@pytest.mark.parametrize("missing", ["memory", "cpuacct", "pids"])
@pytest.mark.parametrize("known", [True, False])
def test_a_group_that_is_not_all_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, known: bool
) -> None:
    groups = dict.fromkeys(("memory", "cpuacct", "pids"), "c")
    for name in groups.keys() - {missing}:
        (tmp_path / name / "c").mkdir(parents=True)
    if not known:
        del groups[missing]
    own_groups(monkeypatch, **groups)
    assert Group.of(7, tmp_path) is None


def test_a_process_that_is_gone_has_no_group() -> None:
    assert Group.of(2**22 + 1) is None

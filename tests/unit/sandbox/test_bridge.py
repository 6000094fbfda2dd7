"""The host's side of a network of two: closed, or no sandbox."""

import os
from pathlib import Path

import pytest

from sandbox import bridge
from sandbox.errors import IsolationUnavailable

HEAD = "Inter-|   Receive\n face |bytes\n    lo: 1 2\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """With one bridge, which has IPv6."""
    (tmp_path / "self/net").mkdir(parents=True)
    (tmp_path / "self/net/dev").write_text(f"{HEAD}rnr1: 0 0\n")
    conf = tmp_path / "sys/net/ipv6/conf/rnr1"
    conf.mkdir(parents=True)
    (conf / "disable_ipv6").write_text("0\n")
    return tmp_path


def switch(proc: Path) -> Path:
    return proc / "sys/net/ipv6/conf/rnr1/disable_ipv6"


def test_each_sandbox_has_a_name_that_an_interface_can_have() -> None:
    names = {bridge.name_of(f"/state/sandboxes/{number}") for number in range(100)}
    assert len(names) == 100
    assert all(len(name) <= 15 and name.isalnum() for name in names)


def test_root_turns_it_off(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    bridge.close("rnr1", proc)
    assert switch(proc).read_text() == "1"


def test_others_look_whether_it_is_off(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(IsolationUnavailable, match="over IPv6 on the bridge rnr1"):
        bridge.close("rnr1", proc)
    switch(proc).write_text("1\n")
    bridge.close("rnr1", proc)


def test_a_switch_that_is_not_there_is_not_taken_for_off(proc: Path) -> None:
    switch(proc).unlink()
    switch(proc).parent.rmdir()
    with pytest.raises(IsolationUnavailable, match="over IPv6"):
        bridge.close("rnr1", proc)


def test_a_kernel_without_ipv6_has_none(proc: Path) -> None:
    switch(proc).unlink()
    for name in ("conf/rnr1", "conf", ""):
        (proc / "sys/net/ipv6" / name).rmdir()
    bridge.close("rnr1", proc)


@pytest.mark.parametrize("name", ["rnr2", "rnr", "lo ", "bytes"])
def test_a_bridge_that_is_not_to_be_seen_is_nothing_to_rely_on(proc: Path, name: str) -> None:
    with pytest.raises(IsolationUnavailable, match="not to be seen"):
        bridge.close(name, proc)

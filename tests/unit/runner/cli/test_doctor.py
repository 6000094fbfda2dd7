"""What doctor shows may be what a runtime or an engine wrote."""

import argparse
from collections.abc import Iterator
from typing import Any

import pytest

from policies.model import Isolation
from runner.cli import doctor
from runner.errors import CheckFailed
from sandbox.rows import Row, Verdict


def test_no_row_reaches_the_terminal_as_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(backend: str, isolation: Isolation) -> Iterator[Row]:
        del backend, isolation
        hostile = "\x1b]0;title\x07\x1b[2J gone"
        yield Row(name="sandbox", verdict=Verdict.FAIL, detail=hostile, mend=hostile)

    monkeypatch.setattr(doctor, "_rows", rows)
    parsed: Any = argparse.Namespace(backend="local", isolation="gvisor", json=False)
    with pytest.raises(CheckFailed, match="sandbox"):
        doctor.run(parsed)
    shown = capsys.readouterr().out
    assert shown.count("gone") == 2
    assert "\x1b" not in shown
    assert "\x07" not in shown

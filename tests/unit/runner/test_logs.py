"""The diagnostic log shows no secret and moves no cursor."""

import json

import pytest

from runner import logs
from runner.registry.auth import Secret
from sandbox import diagnostics


@pytest.fixture(autouse=True)
def _nobody_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "_listeners", [])


def test_nothing_is_said_while_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    diagnostics.debug("event", value=1)
    assert capsys.readouterr() == ("", "")


def test_an_event_is_one_line_of_json_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    diagnostics.debug("event", number=1, text="two\nlines \x1b]52;c;AAAA\x07")
    out, err = capsys.readouterr()
    assert out == ""
    line = json.loads(err)
    assert (line["event"], line["number"], line["text"]) == ("event", 1, "two\\nlines ")


def test_a_secret_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    diagnostics.debug("event", password=Secret("hunter2"))
    assert "hunter2" not in capsys.readouterr().err

"""Nothing that came from outside reaches a terminal unescaped."""

import io
import json
import unicodedata

import pytest

from runner import events
from runner.cli import view
from runner.cli.view import JsonView, TerminalView, TextView
from runner.errors import UsageError
from runner.events import Event


def lines_of(*seen: Event) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    text = TextView(lambda label, line: found.append((label, line)))
    for event in seen:
        text(event)
    text.close()
    return found


def test_nothing_hostile_reaches_the_output(every_event: list[Event]) -> None:
    for _, line in lines_of(*every_event):
        assert all(unicodedata.category(character) not in {"Cc", "Cf"} for character in line), line


def test_each_event_has_its_label(every_event: list[Event]) -> None:
    labels = [label for label, _ in lines_of(*every_event)]
    assert labels == [
        "build", "stage", "context", "decision", "base", "unpack", "base", "waiting", "observed",
        "|", "|", "warning", "verified", "published", "log", "done",
    ]  # fmt: skip


def test_output_is_cut_into_lines_and_flushed_before_our_own() -> None:
    seen = lines_of(events.Output(b"a\nb"), events.Warned("w"), events.Output(b"c"))
    assert seen == [("|", "a"), ("|", "b"), ("warning", "w"), ("|", "c")]


@pytest.mark.parametrize(
    ("size", "text"),
    [(999, "999 B"), (1000, "1 kB"), (12_345_678, "12.35 MB"), (5 * 10**12, "5000 GB")],
)
def test_sizes_are_rounded(size: int, text: str) -> None:
    assert view._bytes(size) == text


def test_json_is_a_line_for_each_event(
    every_event: list[Event], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    seen = view.choose(json=True)
    assert isinstance(seen, JsonView)
    for event in every_event:
        seen(event)
    seen.close()
    out, err = capfdbinary.readouterr()
    assert [json.loads(line)["event"] for line in out.splitlines()] == [
        type(event).__name__.lower() for event in every_event
    ]
    assert err == b""


def test_an_error_is_said_with_code_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    view.say_error(UsageError("one\ntwo\x1b[31m", advice="do\x07"))
    view.say_error(UsageError("", advice=""))
    assert capsys.readouterr().err.splitlines() == [
        "error      one",
        "error      two",
        "code       usage (exit status 2)",
        "advice     do\\x07",
        "error      ",
        "code       usage (exit status 2)",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colours_and_bars_but_nothing_of_the_builds_making(
    every_event: list[Event], hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    seen = view.choose(json=False)
    assert isinstance(seen, TerminalView)
    for event in every_event:
        seen(event)
    seen(events.Output(b"[bold]no markup[/bold] :smile:\n"))
    seen.close()
    written = terminal.getvalue()
    assert "[bold]no markup[/bold] :smile:" in written
    assert hostile not in written
    assert not {"\x07", "\x9b", "\u202e"} & set(written)
    assert "\x1b]" not in written


@pytest.mark.parametrize("term", ["dumb", ""])
def test_where_nothing_can_move_there_are_plain_lines(
    term: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", term)
    seen = view.choose(json=False)
    assert type(seen) is TextView
    seen(events.Warned("w"))
    assert capsys.readouterr().err == "warning    w\n"


def test_a_bar_without_an_end_goes_with_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    seen = view.choose(json=False)
    assert isinstance(seen, TerminalView)
    seen(events.Progress("pull", 1, 100))  # too small for a bar
    seen(events.Progress("pull", 1 << 20, 2 << 20))
    seen(events.Progress("unpack", 0, 0))
    seen(events.Progress("unpack", 5 << 20, 0))
    assert [task.description for task in seen._bars.tasks] == ["pull", "unpack"]
    seen(events.Progress("pull", 2 << 20, 2 << 20))
    assert [task.description for task in seen._bars.tasks] == ["unpack"]
    seen(events.StageEnded(events.Stage.BASES, 1.0))
    assert seen._bars.tasks == []
    seen.close()

"""What the command line takes, and how a command ends."""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from policies.facts import SourceFacts
from runner import cli
from runner.cli import submit
from runner.cli.options import build_request
from runner.errors import InvalidReference, OutputInvalid, RunnerError, UsageError
from runner.request import BuildRequest

ROOT = Path(__file__).parents[4]


def request(*words: str) -> BuildRequest:
    parser = argparse.ArgumentParser()
    submit.configure(parser)
    return build_request(parser.parse_args(["context", *words]))


def test_what_is_left_out_has_its_default() -> None:
    assert request() == BuildRequest(context=Path("context"), build_args={})
    assert request("--untrusted") == replace(request(), untrusted=True)


def test_the_option_alone_makes_a_build_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert not request().reproducible
    assert request("--reproducible").reproducible


def test_the_backend_is_nobodys_until_it_is_named() -> None:
    assert request().backend is None
    assert request("--backend=local").backend == "local"


def test_trust_cannot_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        request("--trusted")
    assert caught.value.code == 2
    assert "--trusted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("90", 90), ("20m", 1200), ("1h30m", 5400), ("1h", 3600), ("1h2m3s", 3723)],
)
def test_durations(text: str, seconds: int) -> None:
    assert request("--timeout", text).wall_seconds == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "-1", "1.5h", "1d", "s", "1s1m", " 1s", "1s\n", "9" * 99, "1h1h"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a duration"):
        request(f"--timeout={text}")


def test_who_asks_may_say_where_the_source_comes_from() -> None:
    stated = ("url=https://me:secret@a.b/c.git", "fork=true", "pull_request=false")
    found = request(*(f"--source={fact}" for fact in stated), "--source", "ref=refs/heads/main",
                    "--tenant=acme")  # fmt: skip
    assert found.source == SourceFacts(
        url="https://a.b/c.git", ref="refs/heads/main", fork=True, pull_request=False
    )
    assert found.tenant == "acme"
    assert request().source.fork is None


@pytest.mark.parametrize(
    "text", ["", "fork", "fork=yes", "signed=true", "kind=git", "url=", "url=a b", "ref=\n", "x=y"]
)
def test_what_is_no_fact_about_the_source_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a fact"):
        request(f"--source={text}")


@pytest.mark.parametrize("text", ["", "A", "a/b", "-a", "a-", "*", "a" * 64, "{tenant}"])
def test_what_is_no_tenant_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a tenant"):
        request(f"--tenant={text}")


def test_less_memory_and_fewer_processors_can_be_asked_for() -> None:
    found = request("--memory=512m", "--cpus=0.5")
    assert (found.memory_bytes, found.cpu_millis) == (512 << 20, 500)
    assert request("--memory=7").memory_bytes == 7
    assert request("--memory=2G", "--cpus=2").memory_bytes == 2 << 30


@pytest.mark.parametrize(
    "word", ["--memory=", "--memory=0", "--memory=-1m", "--memory=1.5g", "--memory=1gb",
             "--memory=99999999999999t",
             "--cpus=", "--cpus=0", "--cpus=-1", "--cpus=0.0001", "--cpus=1e3", "--cpus=nan"]
)  # fmt: skip
def test_amounts_that_mean_nothing_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match="not a"):
        request(word)


def test_build_args_are_split_at_the_first_equals_sign() -> None:
    found = request("--build-arg", "A=b=c", "--build-arg=_B1=", "--build-arg", "A=last")
    assert found.build_args == {"A": "last", "_B1": ""}


@pytest.mark.parametrize("text", ["A", "=x", "1A=x", "A-B=x", "A B=x", "--x=y", "\u00c9=x", "A=\0"])
def test_what_is_no_build_arg_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a build argument"):
        request(f"--build-arg={text}")


@pytest.mark.parametrize("text", ["", "-x", "--privileged", "a b", "a\n", "a" * 129, "é"])
def test_what_is_no_stage_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a stage"):
        request(f"--target={text}")


def test_destinations_are_references_each_once() -> None:
    found = request(
        "--destination", "a.b/c:1", "--destination", "a.b/c:1", "--destination", "d.e/f"
    )
    assert [str(name) for name in found.destinations] == ["a.b/c:1", "d.e/f"]
    with pytest.raises(InvalidReference):
        request("--destination", "a.b/C")


def test_outputs_are_checked_early(tmp_path: Path) -> None:
    output = request("--output", f"oci:{tmp_path}/new").output
    assert str(output) == f"oci:{tmp_path}/new"
    with pytest.raises(OutputInvalid):
        request("--output", "zip:x")


def fake_run(error: BaseException) -> object:
    def run(parsed: object) -> NoReturn:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UsageError("bad \x1b[31mthing"), 2, "error      bad thing"),
        (RuntimeError("secret details"), 70, "a bug in runner"),
        (KeyboardInterrupt(), 8, "interrupted"),
    ],
)
def test_every_end_has_its_status_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: BaseException,
    status: int,
    says: str,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(submit, "run", fake_run(error))
    assert cli.main(["submit", "context"]) == status
    shown = capsys.readouterr()
    assert says in shown.err
    assert "Traceback" not in shown.err
    assert "secret" not in shown.err
    assert shown.out == ""
    diagnostics = [path.read_text() for path in tmp_path.iterdir()]
    assert ["secret details" in text for text in diagnostics] == [True] * (status == 70)


@pytest.mark.parametrize("error", RunnerError.__subclasses__())
def test_each_group_of_errors_ends_with_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[RunnerError]
) -> None:
    monkeypatch.setattr(submit, "run", fake_run(error("what\nhappened")))
    assert cli.main(["submit", "context"]) == error.status
    assert f"code       {error.code} (exit status {int(error.status)})" in capsys.readouterr().err


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert "runner 0" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["nonsense"])
    assert caught.value.code == 2


def test_help_imports_nothing_heavy() -> None:
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "runner", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "submit" in shown.stdout
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "runner.cli" in imported
    heavy = ("requests", "pydantic", "rich", "yaml", "urllib3", "structlog", "zstandard")
    assert [name for name in imported if name.startswith(heavy)] == []

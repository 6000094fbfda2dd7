"""``runner policy``: what people ask of policies, and how each answer ends."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from policies import factsfile, loader
from policies.engine import decide
from policies.factsfile import ASSUMED, over, parse
from policies.model import Isolation, plain
from runner import cli
from runner.cli import tools
from runner.cli.policy import explain
from runner.cli.policy.answer import shown, table
from runner.tools import Tools
from tests.support.backends import StatedBackend

ROOT = Path(__file__).parents[4]
LIBRARY = ROOT / "policies" / "library"
BUILD = "20240229-030000-abcdef"
FORK = b"""
apiVersion: runner/v1alpha1
name: forks
deny:
  - {name: fork, when: source.fork, reason: no strangers here}
floors:
  - {name: kata, when: source.signed == false, isolation: kata}
"""

Answer = Callable[..., tuple[int, str, str]]


@pytest.fixture
def answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Answer:
    """Runs one command where no operator wrote a policy, and no build was made."""
    monkeypatch.setattr(tools, "OPERATOR_POLICY", tmp_path / "etc" / "policy.yaml")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))

    def run(*words: object) -> tuple[int, str, str]:
        status = cli.main(["policy", *map(str, words)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def forks(tmp_path: Path) -> Path:
    path = tmp_path / "forks.yaml"
    path.write_bytes(FORK)
    return path


def facts_file(path: Path, **facts: Any) -> Path:
    path.write_text(json.dumps(facts))
    return path


def recorded(state: Path, build: str = BUILD, **facts: Any) -> None:
    """A build of which the shipped default decided."""
    known = parse(over(ASSUMED, facts))
    decision = decide([loader.shipped("default")], known)
    directory = state / "runner" / "builds" / build
    directory.mkdir(parents=True)
    document = plain({"facts": factsfile.dump(known), "decision": decision})
    (directory / "decision.json").write_text(json.dumps(document))


def row(text: str, *starts: str) -> list[str]:
    """The cells of the line that starts with ``starts``."""
    rows = [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.split("\n")
    ]
    (found,) = [cells for cells in rows if tuple(cells[: len(starts)]) == starts]
    return found


# -- explain ----------------------------------------------------------------------------------


def test_explain_answers_which_rule_set_what(answer: Answer, tmp_path: Path, forks: Path) -> None:
    facts = facts_file(tmp_path / "f", source={"fork": False, "signed": False})
    status, said, _ = answer("explain", "--facts", facts, "--policy", forks)
    assert status == 0
    assert row(said, "source.fork") == ["source.fork", "no"]
    assert row(said, "forks:5") == ["forks:5", "deny/fork", "not matched"]
    raised = ["forks:7", "floors/kata", "matched", "isolation -> kata"]
    assert row(said, "forks:7", "floors/kata", "matched") == raised
    assert "denied by isolation: isolation kata cannot be had" in said


def test_explain_names_the_rule_behind_each_field(answer: Answer, tmp_path: Path) -> None:
    facts = facts_file(tmp_path / "f", request={"wall_seconds": 60})
    _, said, _ = answer("explain", "--facts", facts)
    assert row(said, "isolation") == ["isolation", "gvisor", "default", "default"]
    assert row(said, "wanted") == ["wanted", "gvisor", "default", "default"]
    assert row(said, "network") == ["network", "registries", "default", "default"]
    asked = ["limits.wall_seconds", "60", "request", "limits"]
    assert row(said, "limits.wall_seconds") == asked
    assert row(said, "trust") == ["trust", "untrusted"]


def test_explain_tells_a_fallback_from_what_was_wanted(answer: Answer, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "policy.yaml").write_text(
        "apiVersion: runner/v1alpha1\nname: own\nextends: default\n"
        "trusted: [{name: me, when: identity.name == 'me'}]\n"
        "rules: [{name: mine, when: trust == 'trusted', then: {fallback: kata}}]\n"
    )
    facts = facts_file(
        tmp_path / "f", identity={"kind": "unix", "name": "me"}, host={"isolations": ["kata"]}
    )
    _, said, _ = answer("explain", "--facts", facts)
    assert row(said, "trust", "trusted", "own:4") == ["trust", "trusted", "own:4", "trusted/me"]
    assert row(said, "wanted") == ["wanted", "gvisor", "own:5", "rules/mine"]
    assert row(said, "isolation") == ["isolation", "kata", "built-in", "fallback"]


def test_explain_tells_why_it_is_not_another_backend(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(*isolations: Isolation) -> Callable[..., Tools]:
        backends = {b.name: b for b in (StatedBackend("moon"), StatedBackend("local", *isolations))}
        return lambda given: replace(tools.assemble(given), backends=backends)

    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "Dockerfile").write_text("FROM scratch\n")
    monkeypatch.setattr(explain, "assemble", two(Isolation.GVISOR))
    _, said, _ = answer("explain", tmp_path / "context")
    refusal = "backend 'moon' is not among those allowed (backends)"
    assert row(said, "backend") == ["backend", "local"]
    assert row(said, "moon") == ["moon", refusal]
    _, said, _ = answer("explain", tmp_path / "context", "--json")
    assert json.loads(said)["refused"] == {"moon": refusal}
    _, said, _ = answer("explain", tmp_path / "context", "--backend=local", "--json")
    assert "refused" not in json.loads(said)

    monkeypatch.setattr(explain, "assemble", two(Isolation.KATA))
    status, said, _ = answer("explain", tmp_path / "context", "--exit-code")
    assert status == 3
    assert "denied by backends: backend 'moon' is not among those allowed" in said
    assert row(said, "local") == ["local", "no gvisor by local"]


def test_explain_marks_what_is_unknown(answer: Answer, tmp_path: Path) -> None:
    facts = facts_file(tmp_path / "f", dockerfile={"images": ["debian", None], "mounts": None})
    _, said, _ = answer("explain", "--facts", facts, "--policy", LIBRARY / "strict.yaml")
    images = "unknown, but for [docker.io/library/debian]"
    assert row(said, "dockerfile.images") == ["dockerfile.images", images]
    assert row(said, "dockerfile.mounts") == ["dockerfile.mounts", "unknown"]
    assert row(said, "tenant") == ["tenant", "unknown"]
    open_yet = "open until the base images are resolved"
    assert row(said, "base.onbuild") == ["base.onbuild", open_yet]


def test_explain_ends_well_unless_the_denial_is_asked_for(
    answer: Answer, tmp_path: Path, forks: Path
) -> None:
    facts = facts_file(tmp_path / "f", source={"fork": True})
    for words, expected in (([], 0), (["--exit-code"], 3)):
        status, said, _ = answer("explain", "--facts", facts, "--policy", forks, *words)
        assert "denied by deny/fork: no strangers here" in said
        assert status == expected
    status, _, _ = answer("explain", "--facts", facts, "--exit-code")
    assert status == 0


def test_explain_as_json_is_what_a_build_records(answer: Answer, tmp_path: Path) -> None:
    facts = facts_file(tmp_path / "f", source={"fork": True})
    _, said, _ = answer("explain", "--facts", facts, "--json")
    again = tmp_path / "again"
    again.write_text(said)
    assert factsfile.read(again) == factsfile.Record(
        factsfile.read(facts).facts, json.loads(said)["decision"]
    )


def test_explain_takes_a_context_and_the_options_of_submit(answer: Answer, tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text("# syntax=a/b\nFROM debian\nADD https://a.b/c /\n")
    status, said, _ = answer(
        "explain", context, "--source", "fork=true", "--tenant", "acme", "--timeout", "90s",
        "--untrusted", "--json",
    )  # fmt: skip
    facts = json.loads(said)["facts"]
    assert status == 0
    assert facts["source"]["fork"] is facts["request"]["untrusted"] is True
    assert (facts["tenant"], facts["request"]["wall_seconds"]) == ("acme", 90)
    assert facts["dockerfile"]["remote_adds"] == ["https://a.b/c"]
    assert facts["identity"]["kind"] == "unix"
    assert "onbuild" not in facts["base"]


def test_explain_takes_one_thing_to_explain(answer: Answer, tmp_path: Path) -> None:
    facts = facts_file(tmp_path / "f")
    for words in ([], [".", "--facts", facts], ["--build", BUILD, "--facts", facts]):
        status, _, said = answer("explain", *words)
        assert (status, "what to explain?" in said) == (2, True)


def test_explain_refuses_options_that_would_have_no_effect(answer: Answer, tmp_path: Path) -> None:
    facts = facts_file(tmp_path / "f")
    status, _, said = answer("explain", "--facts", facts, "--build-arg", "A=b")
    assert (status, "--build-arg is about a CONTEXT" in said) == (2, True)


def test_explain_says_that_a_build_would_be_decided_as_it_was(
    answer: Answer, tmp_path: Path
) -> None:
    recorded(tmp_path / "state", source={"fork": True})
    status, said, _ = answer("explain", "--build", BUILD)
    assert status == 0
    assert said.endswith("\ndecided then: the same\n")


def test_explain_says_what_is_decided_otherwise_since(
    answer: Answer, tmp_path: Path, forks: Path
) -> None:
    recorded(tmp_path / "state", source={"fork": True})
    _, said, _ = answer("explain", "--build", BUILD, "--policy", forks)
    assert "policies then: [default, sha256:" in said
    assert row(said, "denied", "-") == ["denied", "-", "deny/fork"]
    _, text, _ = answer("explain", "--build", BUILD, "--policy", forks, "--json")
    assert json.loads(text)["differences"][0] == {
        "field": "denied",
        "then": None,
        "now": "deny/fork",
    }


@pytest.mark.parametrize("build", [BUILD, "../x", "", "/etc"])
def test_explain_knows_only_builds_that_recorded_something(
    answer: Answer, tmp_path: Path, build: str
) -> None:
    recorded(tmp_path / "state", "other")
    (tmp_path / "state" / "runner" / "builds" / "other").rename(tmp_path / "state" / "runner" / "x")
    status, _, said = answer("explain", f"--build={build}")
    assert (status, "no decision of a build" in said) == (2, True)


def test_hostile_names_do_not_reach_the_terminal(
    answer: Answer, tmp_path: Path, hostile: str
) -> None:
    (tmp_path / "d").mkdir()
    facts = facts_file(
        tmp_path / "d" / "f.json",
        dockerfile={"frontend": hostile}, context={"links_leaving": [hostile]},
        source={"ref": hostile},
    )  # fmt: skip
    commands = (
        ["explain", "--facts", facts, "--policy", LIBRARY / "strict.yaml"],
        ["diff", "library/default", "library/strict", "--facts", facts.parent],
    )
    for words in commands:
        status, said, _ = answer(*words)
        assert status == 0
        assert all(line.isprintable() for line in said.splitlines())


# -- check ------------------------------------------------------------------------------------


def test_check_finds_nothing_in_the_library(answer: Answer) -> None:
    files = sorted(LIBRARY.glob("*.yaml"))
    status, said, counts = answer("check", "--strict", *files)
    assert (status, said) == (0, "")
    assert "0 errors, 0 warnings, 0 notes" in counts


def test_check_names_file_and_line_of_each_finding(answer: Answer, tmp_path: Path) -> None:
    loose, broken = tmp_path / "loose.yaml", tmp_path / "broken.yaml"
    loose.write_bytes(FORK + b"default: {pull_credentials: ['**']}\n")
    broken.write_bytes(FORK.replace(b"source.fork", b"source.frok"))
    status, said, _ = answer("check", loose)
    warning = f"{loose}:8: warning: **: builds may pull whatever"
    assert (status, warning in said) == (0, True)
    assert ":8: note: " in said
    assert "(credentials-everywhere)\n" in said
    assert answer("check", "--strict", loose)[0] == 1
    status, said, _ = answer("check", broken, loose, tmp_path / "none", tmp_path)
    assert status == 1
    lines = said.splitlines()
    assert lines[0].startswith(f"{broken}:5: error: deny.0.when: ")
    assert lines[-2:] == [
        f"{tmp_path / 'none'}:1: error: No such file or directory (policy-invalid)",
        f"{tmp_path}:1: error: Is a directory (policy-invalid)",
    ]


def test_check_fails_on_warnings_and_not_on_notes_where_it_is_strict(
    answer: Answer, forks: Path
) -> None:
    status, said, _ = answer("check", "--strict", forks)
    assert (status, said.count(": note: ")) == (0, 1)


def test_check_as_json(answer: Answer, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xff")
    status, said, _ = answer("check", "--json", path)
    (finding,) = json.loads(said)
    assert status == 1
    assert finding["sentence"].startswith("'utf-8' codec")
    del finding["sentence"]
    expected = {"file": str(path), "line": 1, "severity": "error", "code": "policy-invalid"}
    assert finding == expected


# -- test -------------------------------------------------------------------------------------


@pytest.fixture
def case_files(tmp_path: Path, forks: Path) -> Path:
    directory = tmp_path / "cases"
    directory.mkdir()
    (directory / "a.yaml").write_text(
        "policies: [library/default, ../forks.yaml]\n"
        "facts: {source: {signed: true}}\n"
        "cases:\n"
        "  - {name: forks are denied, facts: {source: {fork: true}}, expect: {denied: deny/fork}}\n"
        "  - {name: others are not, facts: {source: {fork: false}}, expect: {priority: 51}}\n"
    )
    return directory


def test_test_says_what_failed_and_ends_with_1(answer: Answer, case_files: Path) -> None:
    status, said, errors = answer("test", case_files)
    failed = f"{case_files}/a.yaml:5: others are not: priority is 50; expected 51"
    assert said == f"{failed}\n2 cases, 1 failed\n"
    assert (status, "check-failed" in errors) == (1, True)


def test_test_says_nothing_else_where_all_is_well(answer: Answer, case_files: Path) -> None:
    path = case_files / "a.yaml"
    path.write_text(path.read_text().replace("51", "50"))
    assert answer("test", case_files) == (0, "2 cases, 0 failed\n", "")


def test_test_as_json_and_as_junit(answer: Answer, case_files: Path, tmp_path: Path) -> None:
    status, said, _ = answer("test", case_files, "--json", "--junit", tmp_path / "x.xml")
    assert status == 1
    assert [result["passed"] for result in json.loads(said)] == [True, False]
    assert ET.parse(tmp_path / "x.xml").getroot().attrib == {"tests": "2", "failures": "1"}
    status, _, said = answer("test", case_files, "--junit", tmp_path / "none" / "x.xml")
    assert (status, "output-invalid" in said) == (2, True)


def test_test_needs_something_to_test(answer: Answer, tmp_path: Path) -> None:
    status, _, said = answer("test", tmp_path / "etc")
    assert (status, "no *.yaml in it" in said) == (2, True)


# -- diff -------------------------------------------------------------------------------------


def test_diff_names_each_field_that_changes(answer: Answer, tmp_path: Path) -> None:
    new = tmp_path / "new.yaml"
    new.write_text(
        "apiVersion: runner/v1alpha1\nname: new\nextends: default\n"
        "deny: [{name: fork, when: source.fork}]\ndefault: {cache: read, limits: {pids: 9}}\n"
    )
    known = tmp_path / "known"
    known.mkdir()
    facts_file(known / "fork.json", source={"fork": True})
    facts_file(known / "own.yaml", source={"fork": False})
    facts_file(known / "moon.json", request={"backend": "moon"}, source={"fork": False})
    status, said, _ = answer("diff", "library/default", new, "--facts", known)
    assert status == 0
    assert said.splitlines() == [
        "fork.json: denied - -> deny/fork",
        "fork.json: reason - -> policy new denies it",
        "own.yaml: cache none -> read",
        "own.yaml: limits.pids 4096 -> 9",
        "3 builds, 2 would be decided differently",
    ]
    words = ("diff", "library/default", new, "--facts", known, "--exit-code", "--json")
    status, said, _ = answer(*words)
    assert status == 1
    (_, own) = json.loads(said)
    assert own["differences"][0] == {"field": "cache", "old": "none", "new": "read"}


def test_diff_ends_well_where_nothing_differs(answer: Answer, tmp_path: Path) -> None:
    facts_file(tmp_path / "f.json")
    words = ("diff", "library/default", LIBRARY / "default.yaml", "--facts", tmp_path)
    status, said, _ = answer(*words, "--exit-code")
    assert (status, said) == (0, "1 builds, 0 would be decided differently\n")


def test_diff_takes_the_builds_of_this_user_and_says_which_it_cannot_read(
    answer: Answer, tmp_path: Path
) -> None:
    recorded(tmp_path / "state", source={"fork": True})
    recorded(tmp_path / "state", "20240229-030001-abcdef")
    old = tmp_path / "state" / "runner" / "builds" / BUILD / "decision.json"
    old.write_text('{"facts": {"available": ["gvisor"]}, "decision": {}}')
    status, said, errors = answer("diff", "library/default", "library/strict")
    assert status == 0
    assert said.splitlines()[-1] == "1 builds, 1 would be decided differently"
    assert f"skipped    {old}: facts.available: " in errors


def test_diff_refuses_what_it_was_given_and_cannot_read(answer: Answer, tmp_path: Path) -> None:
    words = ("diff", "library/default", "library/default", "--facts", tmp_path)
    status, _, said = answer(*words)
    assert (status, "no *.yaml and no *.json in it" in said) == (2, True)
    facts_file(tmp_path / "f.json", sauce=1)
    status, _, said = answer(*words)
    assert (status, "facts.sauce: " in said) == (2, True)


# -- show -------------------------------------------------------------------------------------


def test_show_prints_policies_that_have_the_digest_they_state(
    answer: Answer, tmp_path: Path
) -> None:
    extending = LIBRARY / "examples" / "strict.yaml"
    status, said, _ = answer("show", "--policy", extending)
    assert status == 0
    _, *documents = said.split("---\n")
    assert len(documents) == 2
    for document, source in zip(documents, ["library/default", str(extending)], strict=True):
        digest = loader.parse(document.encode(), "shown").digest
        assert document.startswith(f"# {digest} of {source}\n")


def test_show_as_json_is_canonical(answer: Answer) -> None:
    _, said, _ = answer("show", "--json")
    (policy,) = json.loads(said)
    assert policy["source"] == "library/default"
    assert policy["digest"] == loader.shipped("default").digest
    assert said == json.dumps([policy], sort_keys=True, separators=(",", ":")) + "\n"


# -- all of them ------------------------------------------------------------------------------


def test_help_of_policy_imports_nothing_heavy() -> None:
    program = "import sys; from runner import cli; cli.main(sys.argv[1:])"
    listing = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); "
    ended = subprocess.run(
        [sys.executable, "-c", listing + program, "policy", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    *said, modules = ended.stdout.splitlines()
    assert any("explain" in line for line in said)
    assert "runner.cli.policy" in modules.split()
    heavy = ("requests", "pydantic", "rich", "yaml", "urllib3", "cel_expr_python", "h11")
    assert [name for name in modules.split() if name.startswith(heavy)] == []


def test_an_action_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["policy"], ["policy", "nonsense"], ["policy", "check"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 2
    assert "FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"), ("", "-"), (True, "yes"), (False, "no"), (0, "0"), (1, "1"), ("a", "a"),
        ([], "[]"), (("a",), "[a]"), ([["a"], []], "[a] and []"),
        (list("abcdefghij"), "[a, b, c, d, e, f, g, h, and 2 more]"),
        ([[{"hosts": ["a"], "preset": None, "ports": [443]}]], "[hosts [a], ports [443]]"),
    ],
)  # fmt: skip
def test_values_are_shown_in_few_words(value: object, expected: str) -> None:
    assert shown(value) == expected


def test_columns_stand_one_below_the_other() -> None:
    assert list(table([("a", "bb"), ("ccc", "")])) == ["  a    bb", "  ccc"]

"""``runner egress``: shows what was asked, and suggests what a policy could say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from policies.document import Terms
from policies.reference import Digest
from runner import cli
from runner.cli.egress import MOST_HOSTS, suggestion
from runner.gateway.ledger import Entry, Ledger

ID = "20260131-235959-0a1b2c"
CONNECT = Entry(
    kind="connect", host="pip.example.com", port=443, method="CONNECT", decision="allowed",
    rule="preset pip", status=200, sent_bytes=11, received_bytes=22,
)  # fmt: skip
DENIED = replace(CONNECT, host="evil.example.org", decision="denied", rule="", status=403)
GET = Entry(
    kind="http", host="deb.example.com", port=80, method="GET", path="/debian/x", status=200,
    decision="allowed", rule="preset apt",
)  # fmt: skip
PULL = Entry(
    kind="registry", host="docker.io", method="GET", path="/v2/library/debian/manifests/12",
    decision="allowed", rule="base_images", status=200, digest=Digest.of(b"x"),
)  # fmt: skip
PUSH = replace(PULL, host="", method="POST", path="/v2/staged/image/blobs/uploads/")


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    directory = tmp_path / "runner" / "builds" / ID
    directory.mkdir(parents=True)
    return directory


def write(build: Path, *entries: Entry) -> Ledger:
    book = Ledger(build / "ledger.jsonl", clock=lambda: 5.0)
    for entry in entries:
        book.record(entry)
    book.close()
    return book


def result(build: Path, **document: Any) -> None:
    (build / "result.json").write_text(json.dumps({"status": 0, **document}))


def terms(*entries: Entry) -> Terms:
    """Of the suggestion, as a policy's file would be read."""
    text = "\n".join(suggestion(ID, entries))
    return Terms.model_validate(yaml.safe_load(text))


# -- showing -----------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_request(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(build, CONNECT, DENIED, PULL)
    assert cli.main(["egress", ID]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "host", "pip.example.com", "evil.example.org", "docker.io",
    ]  # fmt: skip
    assert lines[2].split() == [
        "evil.example.org", "443", "connect", "CONNECT", "-", "denied", "-", "403", "11", "22",
    ]  # fmt: skip
    assert len({line.index(word) for line, word in zip(lines, "hped", strict=True)}) == 1


def test_only_what_was_denied(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(build, CONNECT, DENIED, PULL)
    assert cli.main(["egress", ID, "--denied", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["host"] == "evil.example.org"


def test_json_has_every_field(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(build, PULL)
    assert cli.main(["egress", ID, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "time": 5.0, "kind": "registry", "host": "docker.io", "port": 0, "method": "GET",
        "path": "/v2/library/debian/manifests/12", "decision": "allowed", "rule": "base_images",
        "status": 200, "sent_bytes": 0, "received_bytes": 0, "digest": str(Digest.of(b"x")),
    }  # fmt: skip


def test_hostile_text_cannot_move_the_terminals_cursor(
    build: Path, hostile: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.gateway.ledger.bounded", lambda entry: entry)  # a forged ledger
    write(build, replace(GET, host=hostile, method=hostile, path=hostile, rule=hostile))
    for form in ([], ["--json"], ["--suggest"]):
        assert cli.main(["egress", ID, *form]) == 0
        shown = capsys.readouterr()
        text = (shown.out + shown.err).replace("\n", "")
        assert text.isprintable()


@pytest.mark.parametrize("name", ["..", "../x", "", "x" * 999, "20260131-235959-0a1b2d"])
def test_what_is_no_build_is_said(
    build: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["egress", name]) == 2
    assert "build" in capsys.readouterr().err


def test_a_build_without_a_ledger_is_said(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["egress", ID]) == 2
    assert "has no ledger" in capsys.readouterr().err


def test_a_ledger_that_was_full_says_so(
    build: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.gateway.ledger.MOST_BYTES", 600)
    write(build, *[CONNECT] * 9)
    assert cli.main(["egress", ID]) == 0
    assert "7 requests more came" in capsys.readouterr().err


# -- verifying ---------------------------------------------------------------------------------


def test_a_ledger_with_the_results_head_is_sound(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = write(build, CONNECT, DENIED).head
    result(build, ledger=head)
    assert cli.main(["egress", ID, "--verify"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{head}\n"
    assert "2 requests" in shown.err
    assert "warning" not in shown.err


def test_a_result_without_a_head_proves_less_and_says_so(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(build, CONNECT)
    result(build)
    assert cli.main(["egress", ID, "--verify"]) == 0
    assert "names no head" in capsys.readouterr().err


def test_a_ledger_written_anew_is_not_the_results(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = write(build, CONNECT, DENIED).head
    result(build, ledger=head)
    (build / "ledger.jsonl").unlink()
    write(build, CONNECT)
    assert cli.main(["egress", ID, "--verify"]) == 1
    assert "tampered" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_lines_that_were_cut_off_show_where_the_build_ended(
    build: Path, cut: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write(build, CONNECT, DENIED)
    result(build)
    path = build / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert cli.main(["egress", ID, "--verify"]) == 1
    assert "lacks its end" in capsys.readouterr().err


def test_a_line_torn_by_a_kill_is_no_failure(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(build, CONNECT, DENIED)
    path = build / "ledger.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1][:50])
    assert cli.main(["egress", ID, "--verify"]) == 0
    assert "torn" in capsys.readouterr().err


@pytest.mark.parametrize("form", [[], ["--verify"], ["--suggest"], ["--json"]])
def test_a_changed_line_is_told_in_every_form(
    build: Path, form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(build, CONNECT, DENIED)
    path = build / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b"evil", b"good"))
    assert cli.main(["egress", ID, *form]) == 1
    assert "line 3 does not follow" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "3", '{"ledger": 3}', '{"ledger": "x"}'])
def test_a_result_that_makes_no_sense_is_a_failure(build: Path, text: str) -> None:
    write(build, CONNECT)
    (build / "result.json").write_text(text)
    assert cli.main(["egress", ID, "--verify"]) == 1


# -- suggesting --------------------------------------------------------------------------------


def test_a_suggestion_is_terms_that_allow_all_that_was_asked() -> None:
    found = terms(CONNECT, GET, DENIED, PULL, PUSH, replace(GET, method="HEAD"), GET)
    assert found.egress is not None
    assert [(rule.hosts, rule.ports, rule.methods) for rule in found.egress] == [
        (("deb.example.com",), (80,), ("GET", "HEAD")),
        (("evil.example.org", "pip.example.com"), (443,), ()),
    ]
    assert str(found.network) == "egress"
    assert found.base_images == ("docker.io/library/debian",)


def test_methods_are_named_only_where_every_request_had_its_method_shown() -> None:
    found = terms(GET, replace(CONNECT, host=GET.host, port=80))
    assert found.egress is not None
    assert [(rule.ports, rule.methods) for rule in found.egress] == [((80,), ())]


def test_what_was_denied_and_what_is_an_address_has_a_remark() -> None:
    lines = list(suggestion(ID, [DENIED, replace(DENIED, host="169.254.169.254"), CONNECT]))
    assert '      - "evil.example.org"  # was denied' in lines
    assert '      - "169.254.169.254"  # an address, not a name, was denied' in lines
    assert '      - "pip.example.com"' in lines


@pytest.mark.parametrize(
    "host", ["*.example.com", "*", "[::1]", "UPPER.example.com", "a b", "", "x" * 300, 'a"\nx: 1']
)
def test_a_host_that_no_policy_can_name_is_left_out_with_a_remark(host: str) -> None:
    text = "\n".join(suggestion(ID, [replace(CONNECT, host=host), GET]))
    found = Terms.model_validate(yaml.safe_load(text))
    assert found.egress is not None
    assert [rule.hosts for rule in found.egress] == [("deb.example.com",)]
    assert "# left out, since no policy can name it" in text


@pytest.mark.parametrize("host", ["123", "1.5", "null", "true", "0x1f", "1e3", "no"])
def test_a_name_that_yaml_would_take_for_something_else_stays_a_name(host: str) -> None:
    found = terms(replace(CONNECT, host=host))
    assert found.egress is not None
    assert found.egress[0].hosts == (host,)


def test_an_image_that_was_denied_and_its_registrys_port_are_named() -> None:
    denied = replace(PULL, host="r.example", port=5000, decision="denied", status=404)
    assert terms(denied).base_images == ("r.example:5000/library/debian",)
    assert '  - "r.example:5000/library/debian"  # was denied' in suggestion(ID, [denied])


@pytest.mark.parametrize("path", ["/v2/", "/v2/a/blobs/x", "/v2/A**/manifests/1", "/manifests/1"])
def test_what_names_no_image_suggests_none(path: str) -> None:
    assert terms(replace(PULL, path=path)).base_images == ()


def test_a_build_that_asked_for_nothing_needs_nothing() -> None:
    found = terms(PUSH)
    assert (found.network, found.egress, found.base_images) == (None, (), ())


def test_a_suggestion_has_so_many_hosts_at_most() -> None:
    asked = [replace(CONNECT, host=f"h{number}.example.com") for number in range(MOST_HOSTS + 7)]
    found = terms(*asked)
    assert found.egress is not None
    assert len(found.egress[0].hosts) == MOST_HOSTS
    assert "# left out: 7 hosts more" in list(suggestion(ID, asked))


_TEXT = st.text(max_size=80) | st.text(alphabet="a.*-#:\n\"'{}[]/ \u2028", max_size=40)


@given(_TEXT, _TEXT, _TEXT, st.integers(0, 65535), st.sampled_from(["http", "connect", "registry"]))
def test_whatever_was_asked_the_suggestion_is_sound_terms_without_wildcards(
    host: str, method: str, path: str, port: int, kind: Any
) -> None:
    asked = Entry(
        kind=kind, host=host, port=port, method=method, path=f"/v2/{path}/manifests/1",
        decision="denied", status=403,
    )  # fmt: skip
    found = terms(asked)
    assert found.egress is not None
    assert found.base_images is not None
    named = [name for rule in found.egress for name in rule.hosts] + list(found.base_images)
    assert not any("*" in name for name in named)

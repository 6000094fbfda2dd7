"""Test files of policies: a case passes when all that it names comes true, and no less."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import cases, loader
from policies.cases import CaseResult, differences, find, junit, outcome, read, run
from policies.engine import decide
from policies.errors import PolicyInvalid
from policies.factsfile import ASSUMED, over, parse
from policies.loader import shipped
from policies.model import Decision, Denial, canonical_json, plain

POLICY = """
apiVersion: runner/v1alpha1
name: x
deny: [{name: frontend, when: dockerfile.frontend != ''}]
floors: [{name: fork, when: source.fork, network: none}]
default:
  backends: [local]
  builders: [buildah]
  capabilities: ["*"]
  base_images: ["**"]
"""
ALL = {
    "isolation": "gvisor", "wanted": "gvisor", "trust": "untrusted", "network": "registries",
    "cache": "none", "priority": 50, "provenance": False, "signature": False, "nonroot": False,
    "rootless": False, "retention_days": 30, "fallback": "deny",
    "limits": {"pids": 4096, "wall_seconds": 1200},
}  # fmt: skip


def written(tmp_path: Path, *found: dict[str, Any], **common: Any) -> Path:
    (tmp_path / "policy").write_text(POLICY)
    path = tmp_path / "cases.yaml"
    path.write_text(json.dumps({"policies": ["policy"], "cases": list(found), **common}))
    return path


def results(tmp_path: Path, *found: dict[str, Any], **common: Any) -> tuple[CaseResult, ...]:
    return run(read(written(tmp_path, *found, **common)))


def case(expect: dict[str, Any], **facts: Any) -> dict[str, Any]:
    known = {"source": {"fork": False}}
    return {"name": "a case", "facts": over(known, facts), "expect": expect}


def test_a_case_passes_when_all_that_it_names_comes_true(tmp_path: Path) -> None:
    (result,) = results(tmp_path, case(ALL))
    assert (result.passed, result.differences) == (True, ())
    assert isinstance(result.decision, Decision)


@pytest.mark.parametrize(
    ("field", "wrong", "says"),
    [
        ("isolation", "kata", "isolation is gvisor; expected kata"),
        ("wanted", "container", "wanted is gvisor; expected container"),
        ("trust", "trusted", "trust is untrusted; expected trusted"),
        ("network", "none", "network is registries; expected none"),
        ("cache", "write", "cache is none; expected write"),
        ("priority", 51, "priority is 50; expected 51"),
        ("provenance", True, "provenance is False; expected True"),
        ("signature", True, "signature is False; expected True"),
        ("nonroot", True, "nonroot is False; expected True"),
        ("rootless", True, "rootless is False; expected True"),
        ("retention_days", 1, "retention_days is 30; expected 1"),
        ("fallback", "kata", "fallback is deny; expected kata"),
        ("limits", {"pids": 7}, "limits.pids is 4096; expected 7"),
    ],
)
def test_a_case_fails_in_the_one_field_that_is_wrong(
    tmp_path: Path, field: str, wrong: object, says: str
) -> None:
    (result,) = results(tmp_path, case({**ALL, field: wrong}))
    assert (result.passed, result.differences) == (False, (says,))


def test_a_denial_passes_by_its_rule_alone(tmp_path: Path) -> None:
    asks = {"dockerfile": {"frontend": "a"}}
    by_it, by_another, none = (
        results(tmp_path, case(expect, **asks))[0]
        for expect in ({"denied": "deny/frontend"}, {"denied": "deny/x"}, {"isolation": "gvisor"})
    )
    assert by_it.passed
    assert isinstance(by_it.decision, Denial)
    said = "denied by deny/frontend: policy x denies it"
    assert by_another.differences == (f"{said}; expected deny/x",)
    assert none.differences == (said,)


def test_a_build_that_should_be_denied_and_is_not_fails(tmp_path: Path) -> None:
    (result,) = results(tmp_path, case({"denied": "deny/frontend"}))
    assert result.differences == ("not denied; expected deny/frontend",)


def test_facts_of_a_case_stand_over_the_common_ones(tmp_path: Path) -> None:
    known = {"source": {"fork": True, "ref": "x"}}
    first, second, third = results(
        tmp_path,
        {"name": "1", "expect": {"network": "none"}},
        {"name": "2", "facts": {"source": {"fork": False}}, "expect": {"network": "registries"}},
        {"name": "3", "facts": {"source": {"fork": None}}, "expect": {"network": "none"}},
        facts=known,
    )
    assert first.passed
    assert second.passed
    assert third.passed


def test_the_host_has_gvisor_where_a_file_says_nothing(tmp_path: Path) -> None:
    (result,) = results(tmp_path, case({"denied": "isolation"}, host={"isolations": []}))
    assert result.passed


def test_a_result_says_where_its_case_stands(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(
        "policies: [policy]\ncases:\n"
        "  - {name: one, expect: {isolation: gvisor}}\n"
        "\n"
        "  - {name: two, expect: {isolation: kata}}\n"
    )
    assert [(r.name, r.line, r.source) for r in run(read(path))] == [
        ("one", 3, str(path)),
        ("two", 5, str(path)),
    ]


def test_policies_are_named_from_the_library_or_relative_to_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, case(ALL), policies=["policy", "library/default"])
    assert [policy.name for policy in read(path).policies] == ["x", "default"]
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "own").write_text(POLICY)
    assert cases.policy("library/own", beside=tmp_path).name == "x"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"policies": []}, "policies: "),
        ({"policies": ["none"]}, "none: No such file"),
        ({"policies": ["library/none"]}, "none: No such file"),
        ({"cases": []}, "cases: "),
        ({"extra": 1}, "extra: "),
        ({"facts": {"source": {"frok": 1}}}, "facts.source.frok: "),
        ({"cases": [{"name": "", "expect": ALL}]}, "cases.0.name: "),
        ({"cases": [{"name": "a\x07", "expect": ALL}]}, "cases.0.name: "),
        ({"cases": [{"name": "a"}]}, "cases.0.expect: "),
        ({"cases": [case({})]}, "cases.0.expect: either denied, or"),
        ({"cases": [case({"limits": {}})]}, "cases.0.expect: either denied, or"),
        ({"cases": [case({"denied": "x", "cache": "none"})]}, "cases.0.expect: either denied, or"),
        ({"cases": [case({"isolation": "runc"})]}, "cases.0.expect.isolation: one of"),
        ({"cases": [case({"limits": {"pid": 7}})]}, "cases.0.expect.limits.pid: "),
        ({"cases": [case({"destinations": []})]}, "cases.0.expect.destinations: "),
        ({"cases": [case(ALL), case(ALL)]}, "a second case 'a case'"),
        ({"cases": [case(ALL, time={"hour": 3})]}, "date and hour"),
    ],
)
def test_a_file_that_means_nothing_is_refused_by_line(
    tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    path = written(tmp_path, **{"cases": [case(ALL)], **changed})
    with pytest.raises(PolicyInvalid) as caught:
        read(path)
    assert caught.value.message.startswith(str(tmp_path))
    assert says in caught.value.message


@pytest.mark.parametrize("text", ["", "[]", "3", "cases: ["])
def test_what_is_no_test_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(PolicyInvalid, match=r"x\.yaml"):
        read(path)


def test_a_file_is_bounded_and_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(PolicyInvalid, match="No such file"):
        read(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"#" * (loader.MOST_BYTES + 1))
    with pytest.raises(PolicyInvalid, match="longer"):
        read(tmp_path / "x.yaml")


def test_files_are_found_below_and_in_order(tmp_path: Path) -> None:
    with pytest.raises(PolicyInvalid, match=r"no \*\.yaml"):
        find(tmp_path)
    for name in ("b.yaml", "a/c.yaml", "a/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in find(tmp_path)] == ["a/c.yaml", "b.yaml"]


# -- outcomes ------------------------------------------------------------------------------------


def decided(**facts: Any) -> dict[str, Any]:
    policy = shipped("default")
    return outcome(plain(decide([policy], parse(over(ASSUMED, facts)))))


def test_an_outcome_is_flat_and_says_nothing_of_whose_policies_they_were() -> None:
    found = decided()
    assert found["limits.wall_seconds"] == 3600
    assert (found["isolation"], found["wanted"], found["fallback"]) == ("gvisor",) * 2 + ("deny",)
    assert outcome({"grant": {"fallback": "kata"}})["fallback"] == "kata"
    assert not {"grant", "limits", "trace", "policies"} & found.keys()
    assert canonical_json(found)


def test_outcomes_differ_field_by_field() -> None:
    assert differences(decided(), decided()) == []
    assert differences(decided(), decided(request={"wall_seconds": 5})) == [
        ("limits.wall_seconds", 3600, 5)
    ]
    assert differences({"a": 1}, {"b": 2}) == [("a", 1, None), ("b", None, 2)]


def test_of_an_outcome_and_a_denial_the_denial_says_it_all() -> None:
    denied = decided(request={"backend": "moon"})
    reason = "backend 'moon' is not among those allowed"
    assert denied == {"denied": "backends", "reason": reason}
    assert differences(decided(), denied) == [
        ("denied", None, "backends"),
        ("reason", None, reason),
    ]
    assert differences(denied, decided())[0] == ("denied", "backends", None)


# -- JUnit ---------------------------------------------------------------------------------------


def test_junit_has_a_suite_per_file_and_each_difference(tmp_path: Path) -> None:
    good = results(tmp_path, case({"isolation": "gvisor"}))
    (tmp_path / "b").mkdir()
    bad = results(tmp_path / "b", case({"isolation": "kata", "cache": "write"}))
    root = ET.fromstring(junit(good + bad))
    assert root.attrib == {"tests": "2", "failures": "1"}
    assert [suite.get("failures") for suite in root] == ["0", "1"]
    assert [one.get("name") for one in root.iter("testcase")] == ["a case"] * 2
    (failure,) = root.iter("failure")
    assert failure.get("message") == "isolation is gvisor; expected kata"
    assert (failure.text or "").splitlines()[1] == "cache is none; expected write"


@given(st.text(), st.text(st.characters(exclude_categories=())))
def test_no_name_breaks_the_xml(name: str, said: str) -> None:
    decision = Denial(reason=said, rule=name, policies=(), trace=())
    one = CaseResult(name, said, 1, decision, (said or "-", "]]>", "<&\x00\ufffe"))
    root = ET.fromstring(junit([one]))
    assert len(list(root.iter())) == 4
    (failure,) = root.iter("failure")
    assert (failure.text or "").endswith("]]>\n<&\\x00\\ufffe")

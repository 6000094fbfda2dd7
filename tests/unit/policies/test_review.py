"""A review points at what an author can hardly have meant, and is silent about all else."""

from pathlib import Path

import pytest

from policies.conditions import Condition, ConditionFailed
from policies.errors import PolicyInvalid
from policies.loader import LIBRARY, parse, shipped
from policies.review import SHARED_HOSTS, Severity, named_facts, review

LIBRARY_FILES = Path(__file__).parents[3] / "policies" / "library"
HEAD = "apiVersion: runner/v1alpha1\nname: x\n"
OPEN = """
default:
  backends: [local]
  builders: [buildah]
  capabilities: ["*"]
"""


def found(text: str) -> list[tuple[int, str]]:
    """Line below the head, and code, of each finding."""
    return [(f.line - 2, f.code) for f in review((HEAD + text).encode(), "x.yaml")]


def codes(terms: str, section: str = "default") -> list[str]:
    """What a review finds in one line of terms."""
    where = {
        "default": f"default: {{backends: [a], builders: [a], capabilities: [a], {terms}}}",
        "floors": f"{OPEN}floors: [{{name: a, {terms}}}]",
        "rules": f"{OPEN}rules: [{{name: a, when: source.fork, then: {{{terms}}}}}]",
    }
    return [code for _, code in found(where[section])]


@pytest.mark.parametrize("name", LIBRARY)
def test_nothing_is_found_in_the_library(name: str) -> None:
    path = LIBRARY_FILES / f"{name}.yaml"
    assert review(path.read_bytes(), str(path)) == ()


@pytest.mark.parametrize("name", LIBRARY)
def test_what_a_file_extends_is_not_held_against_it(name: str) -> None:
    assert found(f"extends: {name}\nrules: [{{name: all, then: {{priority: 1}}}}]\n") == []
    assert found(f"extends: {name}\n") == []


def test_what_is_no_policy_is_an_error_of_the_loader() -> None:
    with pytest.raises(PolicyInvalid, match=r"x\.yaml:3:"):
        review(f"{HEAD}rules: 3\n".encode(), "x.yaml")


# -- rules that do nothing -----------------------------------------------------------------------


def test_a_rule_behind_an_unconditional_one_is_never_looked_at() -> None:
    rules = """rules:
  - {name: a, when: source.fork, then: {}}
  - {name: b, then: {}}
  - {name: c, when: source.signed, then: {}}
  - {name: d, then: {}}
"""
    assert found(f"extends: default\n{rules}") == [(5, "unreachable"), (6, "unreachable")]


def test_the_second_of_two_equal_conditions_has_no_effect() -> None:
    for section, end in (("deny", ""), ("rules", ", then: {}")):
        rules = f"""{section}:
  - {{name: a, when: 'source.fork &&  source.signed'{end}}}
  - {{name: b, when: 'source.fork && source.signed'{end}}}
  - {{name: c, when: 'source.signed && source.fork'{end}}}
"""
        assert found(f"extends: default\n{rules}") == [(4, "same-condition")]


def test_a_rule_for_what_the_extended_policy_denies_already_has_no_effect() -> None:
    rules = "deny:\n  - {name: mine, when: size(dockerfile.unknown) > 0}\n"
    assert found(f"extends: strict\n{rules}") == [(3, "same-condition")]


def test_floors_of_one_condition_add_up() -> None:
    floors = (
        "{name: a, when: source.fork, cache: none}, {name: b, when: source.fork, nonroot: true}"
    )
    assert found(f"{OPEN}floors: [{floors}]") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deny: [{name: a, when: 'false && source.fork'}]", ["never-holds"]),
        ("deny: [{name: a}]", ["denies-everything"]),
        ("deny: [{name: a, when: 'true'}]", ["denies-everything"]),
        ("deny: [{name: a}, {name: b, when: source.fork}]", ["denies-everything", "unreachable"]),
        ("deny: [{name: a, when: source.fork}]", []),
        ("trusted: [{name: a, when: \"identity.name == 'ci'\"}]", []),
        ("trusted: [{name: a, when: \"identity . name == 'ci'\"}]", []),
        ("trusted: [{name: a, when: source.signed}]", ["trust-by-claim"]),
        ("trusted: [{name: a, when: \"source.ref == 'identity.name'\"}]", ["trust-by-claim"]),
        ("trusted: [{name: a, when: 'true'}]", ["trust-by-claim", "trusts-everybody"]),
        ("trusted: []", []),
    ],
)
def test_conditions_that_decide_nothing_or_everything(text: str, expected: list[str]) -> None:
    assert [code for _, code in found(f"extends: default\n{text}\n")] == expected


def test_a_condition_that_cannot_be_evaluated_is_none_that_always_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: object, view: object) -> bool:
        raise ConditionFailed("too long")

    monkeypatch.setattr(Condition, "holds", fail)
    assert found("extends: default\ndeny: [{name: a, when: source.fork}]\n") == []


# -- terms that do nothing ----------------------------------------------------------------------


def test_a_policy_without_backends_or_builders_is_noted() -> None:
    (finding,) = review(f"{HEAD}default: {{isolation: kata}}\n".encode(), "x.yaml")
    assert (finding.line, finding.severity) == (3, Severity.NOTE)
    assert found("") == [(-1, "nothing-allowed")]
    assert found("deny: [{name: a, when: source.fork}]\n") == [(-1, "nothing-allowed")]
    assert found("default: {backends: [local], builders: [], capabilities: []}")
    assert found(OPEN) == []
    terms = "{backends: [a], builders: [a], capabilities: [a]}"
    assert found(f"rules: [{{name: a, then: {terms}}}]\n") == []


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ("isolation: container", ["floor-without-effect"]),
        ("cache: write", ["floor-without-effect"]),
        ("cache: read", ["floor-without-effect"]),
        ("when: source.fork, network: egress", ["floor-without-effect"]),
        ("priority: 60", ["floor-without-effect"]),
        ("limits: {pids: 99999}", ["floor-without-effect"]),
        ("cache: read, nonroot: true", []),
        ("cache: none", []),
        ("priority: 50", []),
        ("limits: {pids: 99999, layers: 3}", []),
        ("destinations: ['**']", []),
    ],
)
def test_a_floor_below_all_rules_has_no_effect(terms: str, expected: list[str]) -> None:
    assert codes(terms, "floors") == expected


def test_a_floor_matters_that_is_above_one_of_the_rules() -> None:
    rules = "rules: [{name: fast, when: source.signed, then: {cache: write}}]\n"
    floors = "floors: [{name: a, cache: read}]\n"
    assert found(f"extends: default\n{rules}{floors}") == []
    assert found(f"extends: default\n{floors}") == [(2, "floor-without-effect")]


@pytest.mark.parametrize(
    ("when", "is_found"),
    [
        ("trust == 'trusted'", False),
        ("trust == 'trusted' && source.fork == false", False),
        ("source.signed && 'trusted' == trust", False),
        ("trust != 'untrusted'", False),
        ("trust == 'trusted' || source.signed", True),
        ("trust != 'trusted'", True),
        ("identity.name == 'me'", True),
    ],
)
def test_container_is_for_trusted_builds_alone(when: str, is_found: bool) -> None:
    rule = f'rules: [{{name: a, when: "{when}", then: {{isolation: container}}}}]\n'
    assert found(f"extends: default\n{rule}") == [(2, "container-for-untrusted")] * is_found


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ("isolation: container", ["container-for-untrusted"]),
        ("isolation: gvisor", []),
        ("fallback: gvisor", ["fallback-without-effect"]),
        ("fallback: kata", []),
        ("fallback: deny", []),
        ("egress: [{hosts: [a.example]}]", []),
        ("network: egress", ["egress-without-rules"]),
        ("network: egress, egress: []", ["egress-without-rules"]),
        ("network: egress, egress: [{preset: pip}]", []),
        ("network: none, egress: [{preset: pip}]", ["egress-without-network"]),
    ],
)
def test_terms_that_cancel_each_other(terms: str, expected: list[str]) -> None:
    assert codes(terms) == expected
    assert codes(terms, "rules") == expected


# -- what reaches further than it looks ----------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("a.example", None),
        ("*.example.com", None),
        ("*.corp", None),
        ("*.build.internal", None),
        ("*.s3.example.com", None),
        ("*.mine.github.io", None),
        ("github.io", None),
        ("10.0.0.1", "literal-address"),
        ("127.1", "literal-address"),
        ("2130706433", "literal-address"),
        ("0x7f.0.0.0x1", "literal-address"),
        ("*.com", "wide-wildcard"),
        ("*.example", "wide-wildcard"),
        ("*.co.uk", "wide-wildcard"),
        ("*.io", "wide-wildcard"),
        ("*.amazonaws.com", "wide-wildcard"),
        ("*.s3.eu-west-1.amazonaws.com", "wide-wildcard"),
        ("*.core.windows.net", "wide-wildcard"),
        ("*.windows.net", "wide-wildcard"),
        *((f"*.{zone.replace('*', 'x')}", "wide-wildcard") for zone in SHARED_HOSTS),
    ],
)
def test_hosts_that_anybody_may_have(host: str, code: str | None) -> None:
    terms = f"network: egress, egress: [{{hosts: [a.example]}}, {{hosts: ['{host}']}}]"
    for section in ("default", "rules"):
        assert codes(terms, section) == ([code] if code else [])


def test_private_ranges_are_pointed_out() -> None:
    egress = "{hosts: [a.example], private_ranges: [10.0.0.0/8, 'fd00::/8']}"
    assert codes(f"network: egress, egress: [{egress}]") == ["private-range"] * 2


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("registry.example.com/acme/*", []),
        ("registry.example.com:5000/acme/**", []),
        ("localhost:*/acme", []),
        ("localhost/acme", []),
        ("[fd00::1]/acme", []),
        ("**", []),
        ("*/{tenant}/**", []),
        ("**/acme/x", []),
        ("*.example.com/**", []),
        ("registry-*.example.com/acme", []),
        ("{tenant}.example.com/x", []),
        ("a.b/team-{tenant}/**", []),
        ("registry.example.com*/acme", ["loose-host"]),
        ("registry.example.com**", ["loose-host"]),
        ("*registry.example.com/acme", ["loose-host"]),
        ("**.example.com/acme", ["loose-host"]),
        ("a**.example.com/acme", ["loose-host"]),
        ("**/{tenant}/**", ["loose-tenant"]),
        ("a.b/{tenant}*", ["loose-tenant"]),
        ("a.b/*-{tenant}/x", ["loose-tenant"]),
        ("debian", ["matches-nothing"]),
        ("library/debian", ["matches-nothing"]),
        ("docker.io/library/debian:12", ["matches-nothing"]),
    ],
)
@pytest.mark.parametrize("name", ["base_images", "destinations"])
def test_patterns_of_names(name: str, pattern: str, expected: list[str]) -> None:
    assert codes(f"{name}: ['{pattern}']") == expected
    assert codes(f"{name}: ['{pattern}']", "rules") == expected


def test_only_base_images_are_asked_for_by_digest() -> None:
    pattern = "docker.io/library/debian@sha256:*"
    assert codes(f"base_images: ['{pattern}', '**@sha256:*']") == []
    assert codes(f"destinations: ['{pattern}']") == ["matches-nothing"]


def test_a_floor_only_tightens_and_may_be_loose() -> None:
    assert codes("destinations: ['**/{tenant}/**', 'a.b*/c']", "floors") == []
    assert codes("destinations: [debian]", "floors") == ["matches-nothing"]
    assert codes("egress: [{hosts: [10.0.0.1]}]", "floors") == ["literal-address"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", ["credentials-everywhere"]),
        ("*/base/x", ["credentials-everywhere"]),
        ("**/x", ["credentials-everywhere"]),
        ("registry.example.com/**", []),
    ],
)
def test_credentials_are_for_named_hosts(pattern: str, expected: list[str]) -> None:
    assert codes(f"pull_credentials: ['{pattern}']") == expected


def test_a_finding_stands_where_it_is_in_the_file() -> None:
    text = """default:
  backends: [local]
  builders: [buildah]
  capabilities: ["*"]
  destinations:
    - "registry.example.com/**"
    - "library/app"
"""
    assert found(text) == [(7, "matches-nothing")]


def test_findings_are_sorted_by_line() -> None:
    text = "default: {isolation: container}\ndeny: [{name: a}]\n"
    lines = [line for line, _ in found(text)]
    assert lines == sorted(lines)
    assert len(lines) == 3


# -- facts that are named ------------------------------------------------------------------------


def test_named_facts_are_those_of_conditions_and_of_patterns() -> None:
    text = f"""{HEAD}
deny:
  - {{name: a, when: "source . fork && source.ref == 'identity.kind' || time.hour in [1]"}}
  - {{name: b, when: 'dockerfile.images.exists(i, i.glob("destinations"))'}}
rules:
  - {{name: c, when: "trust == 'trusted'", then: {{destinations: ["a.b/{{tenant}}"]}}}}
"""
    expected = {"source.fork", "source.ref", "time.hour", "dockerfile.images", "trust", "tenant"}
    assert named_facts([parse(text.encode(), "x")]) == expected
    assert named_facts([shipped("default")]) == frozenset()


def test_rules_without_a_default_are_noted() -> None:
    offering = "{backends: [local], builders: [buildah], capabilities: ['*']}"
    rule = "  - {name: a, when: source.fork, then: " + offering + "}\n"
    assert [code for _, code in found("rules:\n" + rule)] == ["missing-default"]
    last = "  - {name: b, then: " + offering + "}\n"
    assert "missing-default" not in [code for _, code in found("rules:\n" + rule + last)]
    assert "missing-default" not in [
        code for _, code in found(f"default: {offering}\nrules:\n{rule}")
    ]

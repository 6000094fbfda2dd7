"""The shipped policies, their test files, and the pages that describe them."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from builder.buildah import BUILDER_CAPABILITIES
from policies import cases, loader
from policies.cases import CaseFile, CaseResult
from policies.conditions import View, compile_condition
from policies.document import Floor, PolicyDocument, Rule, Terms
from policies.engine import decide
from policies.facts import BuilderFacts, BuildFacts, HostFacts, Identity, SourceFacts
from policies.grants import CLOSED, within
from policies.loader import LIBRARY, Policy, shipped
from policies.model import Decision, Isolation, Limits
from policies.vocabulary import FACTS

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "policies" / "library"
PAGES = [ROOT / "docs" / "policy.md", *sorted((ROOT / "docs" / "policy").glob("*.md"))]

Change = Callable[[PolicyDocument], PolicyDocument]


@cache
def case_files(name: str) -> tuple[CaseFile, ...]:
    return tuple(map(cases.read, cases.find(SHIPPED / "tests" / name)))


def results(name: str) -> Iterator[CaseResult]:
    for file in case_files(name):
        yield from cases.run(file)


@pytest.mark.parametrize("name", LIBRARY)
def test_a_shipped_policy_does_what_its_tests_say(name: str) -> None:
    assert {r.name: r.differences for r in results(name) if not r.passed} == {}


# -- nothing in a shipped policy can be taken out unnoticed --------------------------------------


def rules_of(name: str) -> Iterator[str]:
    """All that has a condition or refuses, as the trace names it."""
    for key, (owner, _) in shipped(name).origins.items():
        assert owner == name
        yield key


RULES = [(name, key) for name in LIBRARY for key in rules_of(name)]


def missed(name: str, change: Change, *, alone: bool) -> bool:
    """Whether a case fails where ``name``, or all that extends it, is changed.

    Args:
        name: Of a shipped policy.
        change: Gives the changed document.
        alone: Whether files that extend it stay as they are.
    """
    for file in case_files(name):
        policies = tuple(
            replace(policy, document=change(policy.document))
            if policy.name == name or not alone
            else policy
            for policy in file.policies
        )
        if not all(result.passed for result in cases.run(replace(file, policies=policies))):
            return True
    return False


@pytest.mark.parametrize(("name", "key"), RULES)
def test_a_rule_that_is_taken_out_is_missed(name: str, key: str) -> None:
    section, _, rule_name = key.partition("/")
    rule = next(r for r in getattr(shipped(name).document, section) if r.name == rule_name)

    def without(document: PolicyDocument) -> PolicyDocument:
        left = tuple(r for r in getattr(document, section) if r != rule)
        return document.model_copy(update={section: left})

    assert missed(name, without, alone=False)


@pytest.mark.parametrize(("name", "key"), RULES)
def test_a_condition_is_seen_to_hold_and_not_to_hold(name: str, key: str) -> None:
    found = defaultdict(set)
    for result in results(name):
        for step in result.decision.trace:
            found[step.policy, step.rule].add(step.found)
    section, _, rule_name = key.partition("/")
    rule = next(r for r in getattr(shipped(name).document, section) if r.name == rule_name)
    expected = {"matched"} if rule.when is None else {"matched", "not matched"}
    assert expected <= found[name, key]


def without_term(terms: Any, term: str) -> Any:
    if term.startswith("limits."):
        limits = terms.limits.model_copy(update={term.removeprefix("limits."): None})
        return terms.model_copy(update={"limits": limits})
    return terms.model_copy(update={term: None})


def terms_of(terms: Terms) -> Iterator[str]:
    """The terms that are stated and that a case can see."""
    for name, value in terms:
        if name == "limits":
            yield from (f"limits.{limit}" for limit, number in value if number is not None)
        elif value is not None and name in Terms.model_fields and name != "pull_credentials":
            yield name


def changes_of(name: str) -> Iterator[tuple[str, str, str]]:
    document = shipped(name).document
    default = document.default or Terms()
    for term in terms_of(default):
        # What is left out is closed in any case, and only said for the reader.
        if getattr(default, term, None) != getattr(CLOSED, term, ()):
            yield name, "default", term
    for floor in document.floors:
        yield from ((name, f"floors/{floor.name}", term) for term in terms_of(floor))
    for rule in document.rules:
        yield from ((name, f"rules/{rule.name}", term) for term in terms_of(rule.then))


@pytest.mark.parametrize(
    ("name", "place", "term"), [change for name in LIBRARY for change in changes_of(name)]
)
def test_a_term_that_is_taken_out_is_missed(name: str, place: str, term: str) -> None:
    section, _, rule_name = place.partition("/")

    def weakened_floor(floor: Floor) -> Floor:
        changed: Floor = without_term(floor, term)
        return changed if floor.name == rule_name else floor

    def weakened_rule(rule: Rule) -> Rule:
        changed = rule.model_copy(update={"then": without_term(rule.then, term)})
        return changed if rule.name == rule_name else rule

    def change(document: PolicyDocument) -> PolicyDocument:
        if section == "floors":
            return document.model_copy(
                update={"floors": tuple(map(weakened_floor, document.floors))}
            )
        if section == "rules":
            return document.model_copy(update={"rules": tuple(map(weakened_rule, document.rules))})
        return document.model_copy(update={"default": without_term(document.default, term)})

    assert missed(name, change, alone=section == "default")


# -- what no case can see --------------------------------------------------------------------------


def granted(policies: list[Policy], facts: BuildFacts) -> Decision:
    """The decision on a build by buildah, as the local backend would have it."""
    decision = decide(
        policies,
        replace(
            facts,
            builder=BuilderFacts(capabilities=BUILDER_CAPABILITIES),
            host=HostFacts(isolations=frozenset({Isolation.GVISOR}), egress=True, rootless=True),
        ),
    )
    assert isinstance(decision, Decision), decision
    return decision


def careless(name: str) -> Policy:
    return loader.read(SHIPPED / "examples" / f"careless-{name}.yaml")


@pytest.mark.parametrize("name", LIBRARY)
def test_a_shipped_policy_pulls_with_nobodys_credentials(name: str) -> None:
    """Also on top of one that does."""
    facts = BuildFacts(
        identity=Identity(kind="unix", name="builds"),
        tenant="acme",
        source=SourceFacts(fork=False, pull_request=False),
    )
    for policies in ([shipped(name)], [careless("default"), shipped(name)]):
        assert not within(granted(policies, facts).grant.pull_credentials, "a.example/b")


@pytest.mark.parametrize("fork", [True, None])
def test_a_fork_pulls_with_nobodys_credentials_whatever_an_extension_says(
    fork: bool | None,
) -> None:
    ours, theirs = (
        BuildFacts(source=SourceFacts(fork=False)),
        BuildFacts(source=SourceFacts(fork=fork)),
    )
    policies = [careless("ci-pull-requests")]
    assert within(granted(policies, ours).grant.pull_credentials, "a.example/b")
    assert not within(granted(policies, theirs).grant.pull_credentials, "a.example/b")


def test_credentials_of_the_service_pull_what_is_the_tenants_alone() -> None:
    policy = loader.read(SHIPPED / "examples" / "saas-multi-tenant.yaml")
    facts = BuildFacts(identity=Identity(kind="unix", name="builds"), tenant="acme")
    allowed = granted([policy], facts).grant.pull_credentials
    assert within(allowed, "registry.example.com/tenants/acme/base")
    assert not within(allowed, "registry.example.com/tenants/globex/base")
    assert not within(allowed, "registry.example.com/tenants/acme-corp/base")


def test_the_strict_policy_allows_buildah_what_it_needs_and_no_more() -> None:
    default = shipped("strict").document.default
    assert default is not None
    assert default.capabilities == tuple(sorted(BUILDER_CAPABILITIES))


def test_every_policy_of_the_library_can_be_extended_and_has_a_page() -> None:
    assert sorted(path.stem for path in SHIPPED.glob("*.yaml")) == sorted(LIBRARY)
    assert sorted(page.stem for page in (ROOT / "docs" / "policy").glob("*.md")) == sorted(LIBRARY)


# -- the pages say what is so ----------------------------------------------------------------------


def yaml_blocks(page: Path) -> list[str]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if block.startswith("apiVersion")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_policy_on_a_page_is_one(page: Path) -> None:
    blocks = yaml_blocks(page)
    assert blocks
    for number, block in enumerate(blocks):
        loader.parse(block.encode(), f"{page.name}, example {number + 1}")


@pytest.mark.parametrize("name", ["ci-pull-requests", "saas-multi-tenant", "strict"])
def test_the_example_on_a_page_is_the_one_that_is_tested(name: str) -> None:
    example = (SHIPPED / "examples" / f"{name}.yaml").read_text()
    assert yaml_blocks(ROOT / "docs" / "policy" / f"{name}.md") == [example]


def rows(heading: str) -> dict[str, list[str]]:
    """The first table below a heading of docs/policy.md: its other columns by its first."""
    text = (ROOT / "docs" / "policy.md").read_text()
    below = text.partition(f"\n## {heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert table is not None
    lines = [line.strip("| \n").split(" | ") for line in table[0].splitlines()[2:]]
    return {line[0].strip("`"): line[1:] for line in lines}


def test_the_page_has_every_fact_of_the_vocabulary() -> None:
    expected = {name: [str(fact.kind), fact.meaning] for name, fact in FACTS.items()}
    assert rows("Facts") == expected
    assert list(rows("Facts")) == list(expected)


def test_the_page_has_every_term_with_what_the_operator_gets_who_leaves_it_out() -> None:
    found = rows("Terms")
    assert list(found) == list(Terms.model_fields)
    for name, closed in CLOSED:
        if name != "limits":
            shown = "none" if closed == () else str(closed).lower()
            assert found[name][0].strip("`") == shown, name


def test_the_page_has_every_limit_with_its_default() -> None:
    units = {"MiB": 1 << 20, "GiB": 1 << 30}

    def number(text: str) -> int:
        digits, _, unit = text.partition(" ")
        return int(digits) * units.get(unit, 1)

    assert {name: number(row[0]) for name, row in rows("Limits").items()} == asdict(Limits())


def test_the_page_has_every_section_of_a_file() -> None:
    names = {field.alias or name for name, field in PolicyDocument.model_fields.items()}
    assert set(rows("Sections")) == names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("source.fork", None),
        ("!source.fork", None),
        ("source.fork == true || source.fork == false", None),
        ("false && source.fork", False),
        ("source.fork && false", False),
        ("true || source.fork", True),
        ("source.fork || true", True),
        ("true && source.fork", None),
        ("dockerfile.images.all(image, true)", None),
        ("dockerfile.images.exists(image, image.glob('**'))", None),
        ("size(dockerfile.images) >= 0", None),
        ("tenant in ['acme']", None),
        ("tenant.glob('**')", None),
        ("time.hour > 22 ? false : true", None),
    ],
)
def test_what_is_unknown_makes_a_condition_unknown_unless_the_rest_decides_it(
    text: str, expected: bool | None
) -> None:
    """The library says so in a sentence, which a new version may say otherwise: docs/adr/0007."""
    assert compile_condition(text).holds(View({})) is expected

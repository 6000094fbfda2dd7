"""No file, fact or order of rules goes below a floor, and what is unknown counts as the worst."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, fields, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.engine import context_limits, decide, may_start_from
from policies.facts import (
    BaseFacts,
    BuilderFacts,
    BuildFacts,
    ContextFacts,
    DockerfileFacts,
    HostFacts,
    Identity,
    RequestFacts,
    SourceFacts,
    TimeFacts,
    Unknown,
)
from policies.grants import within
from policies.loader import Policy, parse
from policies.model import (
    Cache,
    Decision,
    Denial,
    Grant,
    Isolation,
    Limits,
    Network,
    Trust,
    canonical_json,
)
from policies.reference import Digest, ImageReference

DIGEST = Digest.of(b"builder")
IMAGES = [ImageReference.parse(name) for name in ("debian", "a.b/c", "a.b/c/d")]
OPEN: dict[str, Any] = {
    "backends": ["*"], "builders": ["*"], "capabilities": ["*"], "base_images": ["**"],
    "destinations": ["**"], "frontends": ["**"],
}  # fmt: skip
LISTS = ("base_images", "destinations", "pull_credentials")
FACTS = BuildFacts(
    identity=Identity(kind="unix", name="ci"),
    tenant="acme",
    source=SourceFacts(url="https://a.b/c", ref="refs/heads/main", pull_request=False, fork=False,
                       signed=True),
    dockerfile=DockerfileFacts(images=(IMAGES[0],)),
    base=BaseFacts(resolved=True, onbuild=()),
    context=ContextFacts(bytes=1, entries=1),
    destinations=(IMAGES[1],),
    builder=BuilderFacts(digest=DIGEST, capabilities=("CHOWN",)),
    host=HostFacts(
        isolations=frozenset(Isolation), egress=True, provenance=True, rootless=True
    ),
    time=TimeFacts(date="2026-01-31", hour=3, weekday=6),
)  # fmt: skip


def policy(name: str = "x", /, **sections: Any) -> Policy:
    document = {"apiVersion": "runner/v1alpha1", "name": name, "default": OPEN, **sections}
    return parse(json.dumps(document).encode(), name)


def opened(**terms: Any) -> Policy:
    return policy(default={**OPEN, **terms})


def decided(*policies: Policy, **known: Any) -> Decision:
    found = decide(policies, replace(FACTS, **known))
    assert isinstance(found, Decision), found
    return found


def denied(*policies: Policy, **known: Any) -> Denial:
    found = decide(policies, replace(FACTS, **known))
    assert isinstance(found, Denial), found
    return found


# -- any policies, any facts -----------------------------------------------------------------

CONDITIONS = [
    "source.fork", "!source.fork", "tenant == 'acme'", "trust == 'trusted'",
    "trust == 'untrusted'", "'docker.io/library/debian' in dockerfile.images",
    "size(base.onbuild) > 0", "source.fork || size(base.onbuild) == 0", "request.untrusted",
    "source.ref.glob('refs/heads/*') && !source.fork", "time.hour > 12", "true",
    "dockerfile.images.all(i, i.glob('a.b/**'))",
]  # fmt: skip
whens = st.sampled_from(CONDITIONS)
# Mostly open, or hardly any build would get past the first rule.
patterns = st.sampled_from([["**"], ["**"], ["docker.io/**", "a.b/**"], ["a.b/*"], []])
numbers = st.integers(1, 1 << 40)
names = st.sampled_from([str(isolation) for isolation in Isolation])
terms = st.fixed_dictionaries(
    {},
    optional={
        "isolation": names, "network": st.sampled_from([str(network) for network in Network]),
        "base_images": patterns, "destinations": patterns, "pull_credentials": patterns,
        "cache": st.sampled_from([str(cache) for cache in Cache]), "nonroot": st.just(False),
        "rootless": st.booleans(),
        "priority": st.integers(0, 100), "retention_days": st.integers(1, 99),
        "provenance": st.booleans(), "signature": st.booleans(),
        "egress": st.lists(st.just({"hosts": ["a.b"]}) | st.just({"preset": "pip"}), max_size=2),
        "limits": st.fixed_dictionaries(
            {}, optional={"wall_seconds": numbers, "pids": numbers, "memory_bytes": numbers}),
    },
)  # fmt: skip


@st.composite
def sections(draw: st.DrawFn) -> dict[str, Any]:
    def rules(**more: st.SearchStrategy[Any]) -> list[dict[str, Any]]:
        bodies = draw(st.lists(st.fixed_dictionaries({"when": whens, **more}), max_size=3))
        return [{"name": f"r{number}", **body} for number, body in enumerate(bodies)]

    found: dict[str, Any] = {
        "deny": rules() if draw(st.integers(0, 3)) == 0 else [],
        "rules": rules(then=terms),
        "floors": [{**rule, **draw(terms)} for rule in rules()],
        "default": {**OPEN, **draw(terms)},
    }
    if draw(st.booleans()):
        found["trusted"] = rules()
    return found


policies = sections().map(lambda found: policy(**found))
maybe = st.none() | st.booleans()
known_facts = st.builds(
    replace,
    st.just(FACTS),
    identity=st.sampled_from([FACTS.identity, FACTS.identity, Identity()]),
    tenant=st.sampled_from([None, "acme", "other"]),
    source=st.builds(SourceFacts, fork=maybe, ref=st.sampled_from([None, "refs/heads/main", "x"])),
    base=st.builds(
        BaseFacts, resolved=st.just(True), onbuild=st.sampled_from([None, (), ("RUN x",)])),
    dockerfile=st.builds(
        DockerfileFacts,
        images=st.lists(st.sampled_from(IMAGES), max_size=2).map(tuple),
        unknown=st.sampled_from([(), (), (Unknown(frozenset({"images"}), "Line 1: what?"),)]),
    ),
    destinations=st.lists(st.sampled_from(IMAGES), max_size=2).map(tuple),
    request=st.builds(
        RequestFacts, untrusted=st.booleans(), wall_seconds=st.none() | numbers),
    host=st.builds(
        HostFacts,
        isolations=st.sampled_from([frozenset(Isolation)] * 3 + [frozenset({Isolation.KATA})]),
        egress=st.just(True), provenance=st.just(True)),
)  # fmt: skip


def looser(one: Grant, other: Grant) -> Iterator[str]:
    """The fields in which ``one`` allows what ``other`` does not."""
    strict = ("isolation", "provenance", "signature", "nonroot", "rootless", "retention_days")
    for field in strict:
        yield from [field] * (getattr(one, field) < getattr(other, field))
    for field in ("network", "cache", "priority"):
        yield from [field] * (getattr(one, field) > getattr(other, field))
    if any(a > b for a, b in zip(astuple(one.limits), astuple(other.limits), strict=True)):
        yield "limits"
    for field, image in product(LISTS, IMAGES):
        mine, theirs = (within(getattr(grant, field), image.name) for grant in (one, other))
        if mine and not theirs:
            yield field
    if not set(other.egress) <= set(one.egress):
        yield "egress"


def never_looser(one: Decision | Denial, other: Decision | Denial) -> None:
    if isinstance(one, Denial):
        return
    if isinstance(other, Denial):
        # An isolation that was raised may be there where the lower one was not.
        assert other.rule == "isolation"
        return
    assert list(looser(one.grant, other.grant)) == []
    assert one.trust <= other.trust
    assert one.isolation >= other.isolation or one.wanted != one.isolation


@given(st.lists(policies, min_size=1, max_size=3), known_facts)
def test_no_policy_and_no_fact_put_an_untrusted_build_below_gvisor(
    given_policies: list[Policy], known: BuildFacts
) -> None:
    found = decide(given_policies, known)
    if isinstance(found, Decision):
        assert found.isolation >= found.wanted
        assert found.trust is Trust.TRUSTED or found.isolation >= Isolation.GVISOR
        if known.request.untrusted or not known.identity.authenticated:
            assert found.trust is Trust.UNTRUSTED


@given(st.lists(policies, min_size=1, max_size=2), policies, known_facts)
def test_a_further_policy_never_loosens_anything(
    given_policies: list[Policy], further: Policy, known: BuildFacts
) -> None:
    never_looser(decide([*given_policies, further], known), decide(given_policies, known))


@given(sections(), whens, known_facts)
def test_adding_a_deny_never_allows_more(
    found: dict[str, Any], when: str, known: BuildFacts
) -> None:
    more = {**found, "deny": [*found["deny"], {"name": "more", "when": when}]}
    before, after = decide([policy(**found)], known), decide([policy(**more)], known)
    assert isinstance(after, Denial) or (
        isinstance(before, Decision) and before.grant == after.grant
    )


@given(sections(), terms, st.none() | whens, known_facts)
def test_adding_a_floor_never_loosens_anything(
    found: dict[str, Any], floor: dict[str, Any], when: str | None, known: BuildFacts
) -> None:
    condition = {} if when is None else {"when": when}
    more = {**found, "floors": [*found["floors"], {"name": "more", **condition, **floor}]}
    never_looser(decide([policy(**more)], known), decide([policy(**found)], known))


@given(sections(), st.randoms(use_true_random=False), known_facts)
def test_no_order_of_rules_goes_below_a_floor(
    found: dict[str, Any], random: Any, known: BuildFacts
) -> None:
    floors = [*found["floors"], {"name": "all", "isolation": "kata", "network": "none"}]
    rules = random.sample(found["rules"], len(found["rules"]))
    result = decide([policy(**{**found, "rules": rules, "floors": floors})], known)
    if isinstance(result, Decision):
        assert result.isolation is Isolation.KATA
        assert result.network is Network.NONE


@given(st.lists(policies, min_size=1, max_size=2), known_facts, st.data())
def test_what_is_unknown_never_loosens_anything(
    given_policies: list[Policy], known: BuildFacts, data: st.DataObject
) -> None:
    unread = (Unknown(frozenset({"images"}), "Line 2"),)
    less = data.draw(
        st.sampled_from([
            replace(known, source=replace(known.source, fork=None)),
            replace(known, source=replace(known.source, ref=None)),
            replace(known, base=BaseFacts(resolved=True)),
            replace(known, time=None),
            replace(known, dockerfile=replace(known.dockerfile, unknown=unread)),
        ])
    )  # fmt: skip
    never_looser(decide(given_policies, less), decide(given_policies, known))


@given(st.lists(policies, min_size=1, max_size=2), known_facts)
def test_before_base_images_are_resolved_no_more_is_allowed_than_afterwards(
    given_policies: list[Policy], known: BuildFacts
) -> None:
    before = decide(given_policies, replace(known, base=BaseFacts()))
    after = decide(given_policies, known)
    if isinstance(before, Decision) and isinstance(after, Decision):
        assert list(looser(before.grant, after.grant)) == []


@given(policies, st.lists(policies, max_size=3).flatmap(
    lambda some: st.tuples(st.just(some), st.permutations(some))), known_facts)  # fmt: skip
def test_the_order_of_further_policies_changes_only_the_trace(
    first: Policy, orders: tuple[list[Policy], list[Policy]], known: BuildFacts
) -> None:
    one, other = (decide([first, *order], known) for order in orders)
    assert type(one) is type(other)
    never_looser(one, other)
    never_looser(other, one)


PROGRAM = """
import sys, locale
from tests.unit.policies.test_engine import FACTS, policy, decide, canonical_json
locale.setlocale(locale.LC_ALL, "")
rules = [{"name": "a", "when": "source.fork || tenant == 'acme'", "then": {"cache": "read"}}]
sys.stdout.buffer.write(canonical_json(decide([policy(rules=rules)], FACTS)))
"""


def test_the_same_policy_and_facts_give_the_same_bytes_everywhere() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={"PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": place, "PYTHONPATH": "."},
            capture_output=True, check=True, timeout=60,
        ).stdout
        for seed, zone, place in (("0", "UTC", "C"), ("1", "Asia/Tokyo", "C.UTF-8"))
    }  # fmt: skip
    assert len(found) == 1
    assert found.pop().startswith(b'{"backend":"local"')


# -- one rule after the other ------------------------------------------------------------------


def test_the_first_rule_that_holds_gives_the_terms() -> None:
    rules = [
        {"name": "no", "when": "source.fork", "then": {"priority": 1}},
        {"name": "yes", "when": "tenant == 'acme'", "then": {"priority": 2}},
        {"name": "late", "then": {"priority": 3}},
    ]
    found = decided(policy(rules=rules))
    assert found.grant.priority == 2
    assert [(step.rule, step.found) for step in found.trace[:2]] == [
        ("rules/no", "not matched"), ("rules/yes", "matched"),
    ]  # fmt: skip
    assert "priority 2" in found.trace[1].effect


def test_a_rule_states_what_differs_from_the_default() -> None:
    found = decided(policy(rules=[{"name": "a", "then": {"limits": {"pids": 9}}}]))
    assert found.limits == replace(Limits(), pids=9)
    assert found.grant.base_images == (("**",),)


def test_of_a_rule_that_may_hold_and_what_follows_the_stricter_is_taken() -> None:
    unknown = SourceFacts()
    rules = [
        {"name": "own", "when": "!source.fork", "then": {"pull_credentials": ["a.b/**"],
                                                         "limits": {"pids": 9}}},
    ]  # fmt: skip
    either = decided(policy(rules=rules), source=unknown).grant
    assert either.limits.pids == 9
    assert not within(either.pull_credentials, "a.b/c")
    known = decided(policy(rules=rules)).grant
    assert within(known.pull_credentials, "a.b/c")


def test_a_deny_rule_with_an_unknown_fact_denies_and_says_so() -> None:
    rule = {"name": "forks", "when": "source.fork", "reason": "no forks here"}
    found = denied(policy(deny=[rule]), source=SourceFacts())
    assert found.rule == "deny/forks"
    assert found.reason == "no forks here (a fact that it asks for is unknown)"
    assert denied(policy(deny=[rule]), source=SourceFacts(fork=True)).reason == "no forks here"
    assert denied(policy(deny=[{"name": "all"}])).reason == "policy x denies it"
    decided(policy(deny=[rule]))


def test_what_base_images_bring_along_is_waited_for_and_then_counts() -> None:
    deny = policy(deny=[{"name": "onbuild", "when": "size(base.onbuild) > 0"}])
    waiting = decided(deny, base=BaseFacts())
    assert waiting.trace[0].found == "open"
    denied(deny, base=BaseFacts(resolved=True, onbuild=("RUN x",)))
    denied(deny, base=BaseFacts(resolved=True, onbuild=None))
    decided(deny, base=BaseFacts(resolved=True, onbuild=()))
    # Only for that: any other unknown fact denies at once.
    both = policy(deny=[{"name": "forks", "when": "source.fork"}])
    denied(both, base=BaseFacts(), source=SourceFacts())


def test_a_floor_raises_what_a_rule_lowered_and_the_trace_says_so() -> None:
    floors = [{"name": "forks", "when": "source.fork", "isolation": "kata", "limits": {"pids": 5}}]
    found = decided(policy(floors=floors), source=SourceFacts(fork=True))
    assert (found.isolation, found.limits.pids) == (Isolation.KATA, 5)
    (step,) = [step for step in found.trace if step.rule == "floors/forks"]
    assert step.effect == "isolation -> kata; pids 4096 -> 5"
    assert decided(policy(floors=floors)).isolation is Isolation.GVISOR
    assert decided(policy(floors=floors), source=SourceFacts()).isolation is Isolation.KATA


def test_only_an_identity_that_somebody_vouches_for_is_trusted() -> None:
    trusting = policy(
        trusted=[{"name": "ci", "when": "identity.name == 'ci'"}],
        rules=[{"name": "t", "when": "trust == 'trusted'", "then": {"isolation": "container"}}],
        default={**OPEN, "isolation": "gvisor"},
    )
    found = decided(trusting)
    assert (found.trust, found.isolation) == (Trust.TRUSTED, Isolation.CONTAINER)
    ways: tuple[dict[str, Any], ...] = (
        {"identity": Identity(name="ci")},
        {"identity": Identity(kind="unix", name="other")},
        {"request": RequestFacts(untrusted=True)},
    )
    for known in ways:
        found = decided(trusting, **known)
        assert (found.trust, found.isolation) == (Trust.UNTRUSTED, Isolation.GVISOR)


def test_a_policy_that_asks_for_container_gets_gvisor_for_what_is_not_trusted() -> None:
    found = decided(opened(isolation="container"))
    assert found.isolation is Isolation.GVISOR
    assert found.trace[-1].effect == "isolation -> gvisor"


def test_a_further_policy_can_only_withdraw_trust() -> None:
    all_trusted, none_trusted = ([{"name": "all", "when": text}] for text in ("true", "false"))
    trusting, silent = policy(trusted=all_trusted), policy("silent")
    assert decided(trusting, silent).trust is Trust.TRUSTED
    assert decided(trusting, policy(trusted=none_trusted)).trust is Trust.UNTRUSTED
    assert decided(silent, policy(trusted=all_trusted)).trust is Trust.UNTRUSTED
    doubtful = policy(trusted=[{"name": "a", "when": "source.fork"}])
    assert decided(doubtful, source=SourceFacts()).trust is Trust.UNTRUSTED


def test_withdrawn_trust_keeps_what_the_operator_asks_of_trusted_builds() -> None:
    operator = policy(
        trusted=[{"name": "ci", "when": "identity.name == 'ci'"}],
        deny=[{"name": "adds", "when": "trust == 'trusted' && size(dockerfile.remote_adds) > 0"}],
        floors=[{"name": "short", "when": "trust == 'trusted'", "limits": {"wall_seconds": 60}}],
    )
    nobody = policy("nobody", trusted=[])
    stated = RequestFacts(untrusted=True)
    for found in (
        decided(operator), decided(operator, nobody), decided(operator, request=stated),
    ):  # fmt: skip
        assert found.limits.wall_seconds == 60
    adds = DockerfileFacts(remote_adds=("https://a.b/c",))
    assert denied(operator, dockerfile=adds).rule == "deny/adds"
    assert denied(operator, nobody, dockerfile=adds).rule == "deny/adds"
    assert denied(operator, request=stated, dockerfile=adds).rule == "deny/adds"
    # Of whom the operator does not trust, nothing is asked.
    stranger = Identity(kind="unix", name="stranger")
    assert decided(operator, identity=stranger, dockerfile=adds).limits.wall_seconds > 60


@given(st.lists(policies, min_size=1, max_size=2), known_facts)
def test_stating_untrusted_never_loosens_anything(
    given_policies: list[Policy], known: BuildFacts
) -> None:
    said = replace(known, request=replace(known.request, untrusted=True))
    not_said = replace(known, request=replace(known.request, untrusted=False))
    if not any("request.untrusted" in text for p in given_policies for text in p.conditions):
        never_looser(decide(given_policies, said), decide(given_policies, not_said))


def test_an_evaluation_that_goes_wrong_denies() -> None:
    endless = "dockerfile.mounts.all(i, dockerfile.mounts.all(j, i == j || i != j))"
    many = DockerfileFacts(mounts=frozenset(map(str, range(200))))
    for section in ("deny", "rules", "floors", "trusted"):
        rule = {"name": "slow", "when": endless, **({"then": {}} if section == "rules" else {})}
        found = denied(policy(**{section: [rule]}), dockerfile=many)
        assert found.rule == f"{section}/slow"
        assert "could not be evaluated" in found.reason


# -- what is asked for, and what there is ------------------------------------------------------


@pytest.mark.parametrize("field", ["backends", "builders", "base_images", "destinations"])
def test_a_submitter_cannot_open_what_the_operator_left_out(field: str) -> None:
    operator = policy(default={name: value for name, value in OPEN.items() if name != field})
    assert denied(operator, policy()).rule == field


def test_a_submitter_gets_no_credentials_that_the_operator_left_out() -> None:
    found = decided(policy(), opened(pull_credentials=["**"]))
    assert not within(found.grant.pull_credentials, "a.b/c")


def test_any_policy_can_require_rootless_and_none_can_take_it_back() -> None:
    assert not decided(policy()).grant.rootless
    assert decided(policy(), policy(default={"rootless": True})).grant.rootless
    wants, does_not = ({**OPEN, "rootless": value} for value in (True, False))
    assert decided(policy(default=wants), policy(default=does_not)).grant.rootless
    floors = [{"name": "a", "rootless": True}]
    assert decided(policy(default=does_not, floors=floors)).grant.rootless


@pytest.mark.parametrize(
    ("rule", "changed", "known"),
    [
        ("backends", {"backends": ["docker"]}, {}),
        ("builders", {"builders": ["kaniko"]}, {}),
        ("builders", {"builders": [f"buildah@{Digest.of(b'other')}"]}, {}),
        ("nonroot", {"nonroot": True}, {}),
        ("capabilities", {"capabilities": ["SETUID"]}, {}),
        ("isolation", {}, {"host": HostFacts(isolations=frozenset({Isolation.KATA}))}),
        ("egress", {"network": "egress"}, {"host": HostFacts(isolations=frozenset(Isolation))}),
        ("provenance", {"signature": True}, {"host": HostFacts(isolations=frozenset(Isolation))}),
        ("rootless", {"rootless": True}, {"host": HostFacts(isolations=frozenset(Isolation))}),
        ("base_images", {"base_images": ["a.b/**"]}, {}),
        ("base_images", {"network": "none"}, {}),
        ("base_images", {"base_images": ["docker.io/library/debian@sha256:*"]}, {}),
        ("destinations", {"destinations": ["a.b/*/*"]}, {}),
        ("destinations", {"destinations": ["a.b/{tenant}"]}, {}),
        ("security", {}, {"dockerfile": DockerfileFacts(securities=frozenset({"insecure"}))}),
        ("frontends", {"frontends": ["a@sha256:*"]}, {
            "dockerfile": DockerfileFacts(frontend="a"), "builder": BuilderFacts(frontends=True)}),
        ("frontends", {}, {
            "dockerfile": DockerfileFacts(unknown=(Unknown(frozenset({"frontend"}), "Line 1"),)),
            "builder": BuilderFacts(frontends=True)}),
        ("context", {"limits": {"context_bytes": 1}}, {"context": ContextFacts(bytes=2)}),
        ("context", {"limits": {"context_entries": 1}}, {"context": ContextFacts(entries=2)}),
    ],
)  # fmt: skip
def test_each_rule_denies_and_says_so(
    rule: str, changed: dict[str, object], known: dict[str, object]
) -> None:
    decided(opened())
    found = denied(opened(**changed), **known)
    assert found.rule == rule
    assert found.trace[-1].effect == found.reason


def test_a_builder_may_be_pinned_by_digest() -> None:
    found = decided(opened(builders=[f"buildah@{DIGEST}"]))
    assert found.builder_digest == DIGEST
    unknown = replace(FACTS.builder, digest=None)
    assert denied(opened(builders=[f"buildah@{DIGEST}"]), builder=unknown).rule == "builders"


def test_a_frontend_that_the_builder_does_not_run_is_left_alone() -> None:
    decided(opened(frontends=[]), dockerfile=DockerfileFacts(frontend="a"))


def test_base_images_may_be_pinned_by_digest() -> None:
    granted = decided(
        opened(base_images=["docker.io/library/*@sha256:*"]), dockerfile=DockerfileFacts()
    ).grant
    debian = ImageReference.parse("debian:12")
    assert not may_start_from(granted, debian)
    assert may_start_from(granted, debian.at(DIGEST))
    assert may_start_from(granted, replace(debian, digest=DIGEST))
    assert not may_start_from(granted, ImageReference.parse("a.b/c").at(DIGEST))


def test_a_tenant_reaches_what_is_the_tenants() -> None:
    own = opened(destinations=["a.b/{tenant}/**"])
    destination = (ImageReference.parse("a.b/acme/app:1"),)
    decided(own, destinations=destination)
    for tenant in ("other", None, "*", "**", "acme/app", "ac*", "{tenant}", ""):
        assert denied(own, destinations=destination, tenant=tenant).rule == "destinations"


def test_where_the_wanted_isolation_cannot_be_had_a_stronger_one_may_be() -> None:
    kata = {"host": replace(FACTS.host, isolations=frozenset({Isolation.KATA}))}
    found = decided(opened(fallback="kata"), **kata)
    assert (found.wanted, found.isolation) == (Isolation.GVISOR, Isolation.KATA)
    assert found.trace[-1].effect == "isolation gvisor cannot be had; kata instead"
    assert decided(opened(fallback="kata"), policy(default={}), **kata).isolation is Isolation.KATA
    assert denied(opened(), **kata).rule == "isolation"
    assert denied(opened(fallback="deny"), **kata).rule == "isolation"
    assert denied(opened(fallback="kata"), opened(fallback="deny"), **kata).rule == "isolation"
    weaker = {"host": replace(FACTS.host, isolations=frozenset({Isolation.CONTAINER}))}
    assert denied(opened(fallback="kata"), **weaker).rule == "isolation"
    floors = [{"name": "kata", "isolation": "kata"}]
    gvisor = {"host": replace(FACTS.host, isolations=frozenset({Isolation.GVISOR}))}
    raised = policy(floors=floors, default={**OPEN, "fallback": "kata"})
    assert denied(raised, **gvisor).rule == "isolation"


def test_the_first_policy_may_raise_limits_and_the_others_only_lower_them() -> None:
    big, small = (opened(limits={"pids": pids}) for pids in (1 << 20, 9))
    silent, default = policy(), Limits().pids
    for given_policies, expected in (
        ([big], 1 << 20), ([big, silent], 1 << 20), ([big, small], 9), ([small, big], 9),
        ([silent], default), ([silent, big], default),
    ):  # fmt: skip
        assert decided(*given_policies).limits.pids == expected


@pytest.mark.parametrize(("asked", "expected"), [(None, 1200), (5, 5), (99999, 1200)])
def test_the_request_may_ask_for_less_only(asked: int | None, expected: int) -> None:
    found = decided(policy(), request=RequestFacts(wall_seconds=asked))
    assert found.limits.wall_seconds == expected
    assert decided(policy(), request=RequestFacts(memory_bytes=7)).limits.memory_bytes == 7
    assert decided(policy(), request=RequestFacts(cpu_millis=7)).limits.cpu_millis == 7


def test_a_context_is_read_up_to_what_any_rule_allows() -> None:
    rules = [
        {"name": "a", "when": "source.fork", "then": {"limits": {"context_bytes": 5}}},
        {"name": "b", "then": {"limits": {"context_bytes": 1 << 40}}},
    ]
    assert context_limits([policy(rules=rules)]).context_bytes == 1 << 40
    small = opened(limits={"context_bytes": 7})
    assert context_limits([policy(rules=rules), small]).context_bytes == 7
    assert context_limits([small, policy(rules=rules)]).context_bytes == 7
    assert context_limits([policy(default={})]).context_bytes == Limits().context_bytes


def test_every_field_of_a_grant_is_met_and_compared() -> None:
    compared = {"isolation", "provenance", "signature", "nonroot", "rootless", "retention_days",
                "network", "cache", "priority", "limits", "egress", *LISTS}  # fmt: skip
    assert {field.name for field in fields(Grant)} - compared == {
        "fallback", "backends", "builders", "capabilities", "frontends",
    }  # fmt: skip


def test_decisions_are_canonical_json() -> None:
    found = json.loads(canonical_json(decided(policy())))
    assert found["isolation"] == "gvisor"
    assert found["grant"]["network"] == "registries"

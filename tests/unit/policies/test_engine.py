"""Untrusted means gVisor at least, and more policies mean less freedom."""

from dataclasses import astuple, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.document import LimitsDocument, Outcome, Policy, PolicyDocument
from policies.engine import decide, limits, within
from policies.facts import BuildFacts, ContextFacts, DockerfileFacts
from policies.model import Decision, Denial, Isolation, Limits, Network, Trust
from policies.reference import Digest, ImageReference

IMAGES = [ImageReference.parse(name) for name in ("debian", "a.b/c", "a.b/c/d")]
FACTS = BuildFacts(
    dockerfile=DockerfileFacts(images=(IMAGES[0],)),
    context=ContextFacts(bytes=1, entries=1),
    destinations=(IMAGES[1],),
    backend="local",
    builder="buildah",
    platform="linux/amd64",
    available=frozenset(Isolation),
)
OPEN = Outcome(
    backends=("*",), builders=("*",), base_images=("**",), destinations=("**",),
    pull_credentials=(),
)  # fmt: skip


def policy(outcome: Outcome = OPEN, floor: Isolation = Isolation.CONTAINER) -> Policy:
    head = {"apiVersion": "runner/v1alpha1", "name": "x", "floor": str(floor)}
    document = PolicyDocument.model_validate({**head, "default": outcome})
    return Policy(document, Digest.of(repr(document).encode()), "here")


# Mostly open, or hardly any build would get past the first rule.
lists = st.sampled_from([("**",), ("**",), ("docker.io/**", "a.b/**"), ("a.b/*",), None, ()])
numbers = st.none() | st.integers(1, 1 << 40)
outcomes = st.builds(
    Outcome,
    isolation=st.sampled_from(Isolation).map(str), network=st.sampled_from(Network).map(str),
    backends=st.just(("*",)), builders=st.just(("*",)),
    base_images=lists, destinations=lists, pull_credentials=lists,
    limits=st.builds(LimitsDocument, **dict.fromkeys(LimitsDocument.model_fields, numbers)),
)  # fmt: skip
policies = st.builds(policy, outcomes, st.sampled_from(Isolation))
facts = st.builds(
    replace,
    st.just(FACTS),
    trust=st.sampled_from(Trust),
    available=st.sampled_from([frozenset(Isolation)] * 3 + [frozenset({Isolation.KATA})]),
    dockerfile=st.builds(
        DockerfileFacts,
        images=st.lists(st.sampled_from(IMAGES), max_size=2).map(tuple),
        securities=st.sampled_from([frozenset()] * 3 + [frozenset({"insecure"})]),
    ),
    destinations=st.lists(st.sampled_from(IMAGES), max_size=2).map(tuple),
    wall_seconds=numbers,
)


@given(st.lists(policies, min_size=1, max_size=4), facts)
def test_no_policy_and_no_fact_put_an_untrusted_build_below_gvisor(
    given_policies: list[Policy], known: BuildFacts
) -> None:
    decision = decide(given_policies, replace(known, trust=Trust.UNTRUSTED))
    assert isinstance(decision, Denial) or decision.isolation >= Isolation.GVISOR


@given(st.lists(policies, min_size=1, max_size=3), policies, facts)
def test_a_further_policy_never_loosens_anything(
    given_policies: list[Policy], further: Policy, known: BuildFacts
) -> None:
    before, after = decide(given_policies, known), decide([*given_policies, further], known)
    if isinstance(after, Denial):
        return
    # An isolation that was raised may be available where the lower one was not.
    if isinstance(before, Denial):
        assert before.rule == "isolation"
        return
    assert after.isolation >= before.isolation
    assert after.network <= before.network
    assert all(
        now <= then for now, then in zip(astuple(after.limits), astuple(before.limits), strict=True)
    )
    for image in IMAGES:
        for field in ("base_images", "destinations", "pull_credentials"):
            now, then = within(getattr(after, field), image.name), getattr(before, field)
            assert not now or within(then, image.name)


@given(policies, st.lists(policies, max_size=3).flatmap(
    lambda some: st.tuples(st.just(some), st.permutations(some))), facts)  # fmt: skip
def test_the_order_of_further_policies_changes_only_the_trace(
    first: Policy, orders: tuple[list[Policy], list[Policy]], known: BuildFacts
) -> None:
    one, other = (decide([first, *order], known) for order in orders)
    if isinstance(one, Denial) or isinstance(other, Denial):
        assert isinstance(one, Denial)
        assert isinstance(other, Denial)
        assert (one.reason, one.rule) == (other.reason, other.rule)
        return
    assert _without_order(one) == _without_order(other)


def _without_order(decision: Decision) -> object:
    fields = ("base_images", "destinations", "pull_credentials")
    unordered = [sorted(getattr(decision, field)) for field in (*fields, "policies")]
    return unordered, decision.isolation, decision.network, decision.limits


@pytest.mark.parametrize("field", ["backends", "builders", "base_images", "destinations"])
def test_a_submitter_cannot_open_what_the_operator_left_out(field: str) -> None:
    operator = policy(OPEN.model_copy(update={field: None}))
    denial = decide([operator, policy(OPEN)], FACTS)
    assert isinstance(denial, Denial)
    assert denial.rule == field


def test_a_submitter_gets_no_credentials_that_the_operator_left_out() -> None:
    operator = policy(OPEN.model_copy(update={"pull_credentials": None}))
    submitter = policy(OPEN.model_copy(update={"pull_credentials": ("**",)}))
    decision = decide([operator, submitter], FACTS)
    assert isinstance(decision, Decision)
    assert not within(decision.pull_credentials, "a.b/c")


@pytest.mark.parametrize(
    ("rule", "changed", "known"),
    [
        ("backends", {"backends": ("docker",)}, {}),
        ("builders", {"builders": ("kaniko",)}, {}),
        ("isolation", {}, {"available": frozenset({Isolation.KATA})}),
        ("base_images", {"base_images": ("a.b/**",)}, {}),
        ("destinations", {"destinations": ("a.b/*/*",)}, {}),
        ("security", {}, {"dockerfile": DockerfileFacts(securities=frozenset({"insecure"}))}),
    ],
)
def test_each_rule_denies_and_says_so(
    rule: str, changed: dict[str, object], known: dict[str, object]
) -> None:
    assert isinstance(decide([policy()], FACTS), Decision)
    denial = decide([policy(OPEN.model_copy(update=changed))], replace(FACTS, **known))  # type: ignore[arg-type]
    assert isinstance(denial, Denial)
    assert denial.rule == rule
    assert denial.trace[-1].effect == f"denied: {denial.reason}"


def test_the_first_policy_may_raise_limits_and_the_others_only_lower_them() -> None:
    big, small, silent = (
        policy(OPEN.model_copy(update={"limits": LimitsDocument(pids=pids)}))
        for pids in (1 << 20, 9, None)
    )
    default = Limits().pids
    for given_policies, expected in (
        ([big], 1 << 20), ([big, silent], 1 << 20), ([big, small], 9), ([small, big], 9),
        ([silent], default), ([silent, big], default),
    ):  # fmt: skip
        assert limits(given_policies).pids == expected


@pytest.mark.parametrize(("asked", "expected"), [(None, 1200), (5, 5), (99999, 1200)])
def test_the_request_may_ask_for_less_time_only(asked: int | None, expected: int) -> None:
    decision = decide([policy()], replace(FACTS, wall_seconds=asked))
    assert isinstance(decision, Decision)
    assert decision.limits.wall_seconds == expected


def test_a_trusted_build_gets_what_policy_says_and_the_trace_tells_why() -> None:
    container = policy(OPEN.model_copy(update={"isolation": Isolation.CONTAINER}))
    decision = decide([container], replace(FACTS, trust=Trust.TRUSTED))
    assert isinstance(decision, Decision)
    assert decision.isolation is Isolation.CONTAINER
    assert [step.effect for step in decision.trace] == ["stays container"] * 2
    raised = decide([container], FACTS)
    assert raised.trace[-1].effect == "isolation gvisor"


@pytest.mark.parametrize("wanted", Isolation)
@pytest.mark.parametrize("floor", Isolation)
def test_the_strongest_isolation_wins(wanted: Isolation, floor: Isolation) -> None:
    policies_given = [policy(OPEN.model_copy(update={"isolation": wanted}), floor)]
    for trust, least in ((Trust.UNTRUSTED, Isolation.GVISOR), (Trust.TRUSTED, wanted)):
        decision = decide(policies_given, replace(FACTS, trust=trust))
        assert isinstance(decision, Decision)
        assert decision.isolation is max(wanted, floor, least)


def test_the_narrowest_network_wins() -> None:
    closed = policy(OPEN.model_copy(update={"network": Network.NONE}))
    for order in ([closed, policy()], [policy(), closed]):
        decision = decide(order, FACTS)
        assert isinstance(decision, Decision)
        assert decision.network is Network.NONE


def test_nothing_is_within_no_sets() -> None:
    assert not within((), "a")
    assert not within((("a",), ("b",)), "a")
    assert within((("a",), ("*",)), "a")

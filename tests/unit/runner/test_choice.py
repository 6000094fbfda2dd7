"""The backend that was asked for counts alone; else the first that policy takes does."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from policies import loader
from policies.facts import BuildFacts, SourceFacts
from policies.loader import Policy
from policies.model import Decision, Denial, Isolation
from runner.choice import Candidate, Candidates, Choice, candidates, choose
from runner.errors import IsolationUnavailable, PolicyDenied, UsageError
from runner.request import BuildRequest
from runner.tools import OnDemand
from sandbox.model import Backend
from tests.support.backends import StatedBackend

CONTAINER, GVISOR, KATA = Isolation
FACTS = BuildFacts(source=SourceFacts(fork=False))
Makers = dict[str, Callable[[], Backend]]


def policy(default: str = "backends: ['*']", more: str = "") -> Policy:
    head = "apiVersion: runner/v1alpha1\nname: x\n"
    terms = f"default: {{builders: ['*'], capabilities: ['*'], {default}}}\n"
    return loader.parse(f"{head}{terms}{more}".encode(), "x.yaml")


def request(backend: str | None = None) -> BuildRequest:
    return BuildRequest(context=Path("context"), build_args={}, backend=backend)


def having(*backends: Backend) -> Any:
    """Tools with these, each made when it is asked for."""
    makers: Makers = {backend.name: lambda made=backend: made for backend in backends}  # type: ignore[misc] # bound at once
    return SimpleNamespace(backends=OnDemand(makers), automatic=tuple(makers))


def chosen(rules: Policy, *backends: Backend, asked: str | None = None) -> Choice:
    return choose([rules], FACTS, candidates(request(asked), having(*backends)))


def backend(name: str, *isolations: Isolation) -> StatedBackend:
    return StatedBackend(name, *isolations)


def candidate(each: StatedBackend) -> Candidate:
    return Candidate(each, each.offer())


def test_what_cannot_be_had_at_all_is_said_of_gvisor() -> None:
    found = candidate(backend("one", GVISOR, KATA))
    assert found.offer.isolations == {GVISOR, KATA}
    assert found.unavailable is None
    nothing = candidate(backend("one"))
    assert nothing.offer.isolations == frozenset()
    assert nothing.unavailable is not None
    assert nothing.unavailable.message == "no gvisor by one"


def test_the_first_that_policy_takes_is_chosen_and_no_later_one_is_asked() -> None:
    first, second = backend("first", GVISOR), backend("second", GVISOR)
    choice = chosen(policy(), first, second)
    assert choice.backend is first
    assert choice.allowed().backend == choice.facts.request.backend == "first"
    assert choice.refused == {}
    assert second.asked == 0


@pytest.mark.parametrize(
    ("rules", "first", "why"),
    [
        (policy(), (), "no gvisor by first"),
        (policy(), (CONTAINER,), "no gvisor by first"),
        (
            policy("backends: [second]"),
            (GVISOR, KATA),
            "backend 'first' is not among those allowed (backends)",
        ),
        (
            policy(more="deny: [{name: own, when: request.backend == 'first', reason: never}]"),
            (GVISOR,),
            "never (deny/own)",
        ),
        (
            policy(more="floors: [{name: a, when: request.backend == 'first', isolation: kata}]"),
            (GVISOR,),
            "no kata by first",
        ),
    ],
)  # fmt: skip
def test_one_that_policy_does_not_take_is_passed_over(
    rules: Policy, first: tuple[Isolation, ...], why: str
) -> None:
    choice = chosen(rules, backend("first", *first), backend("second", GVISOR))
    assert choice.allowed().backend == choice.backend.name == "second"
    assert choice.facts.host.isolations == {GVISOR}
    assert {name: error.message for name, error in choice.refused.items()} == {"first": why}


def test_one_that_was_asked_for_counts_alone() -> None:
    first, second = backend("first"), backend("second", GVISOR)
    assert chosen(policy(), first, second, asked="second").allowed().backend == "second"
    assert first.asked == 0
    second.asked = 0
    choice = chosen(policy(), first, second, asked="first")
    with pytest.raises(IsolationUnavailable) as caught:
        choice.allowed()
    assert (caught.value.message, caught.value.advice) == ("no gvisor by first", "get first")
    assert second.asked == 0


def test_one_that_is_not_there_is_named_and_none_is_made() -> None:
    made: Makers = {"b": lambda: pytest.fail("made"), "a": lambda: pytest.fail("made")}
    tools: Any = SimpleNamespace(backends=OnDemand(made), automatic=tuple(made))
    with pytest.raises(UsageError, match="no backend 'cloud'") as caught:
        candidates(request("cloud"), tools)
    assert caught.value.advice == "One of: a, b."


def test_where_none_is_taken_the_first_says_why_and_each_other_has_a_line() -> None:
    rules = policy("backends: [second, third]")
    choice = chosen(rules, backend("first", GVISOR), backend("second"), backend("third", KATA))
    assert isinstance(choice.decision, Denial)
    assert (choice.backend.name, choice.decision.rule) == ("first", "backends")
    assert choice.facts.request.backend == "first"
    with pytest.raises(PolicyDenied) as caught:
        choice.allowed()
    assert caught.value.message.splitlines() == [
        "backend 'first' is not among those allowed (backends)",
        "second: no gvisor by second",
        "third: no gvisor by third",
    ]


def test_where_nothing_can_be_had_at_all_every_backend_says_why() -> None:
    none = Candidates(having(backend("a"), backend("b")).backends, ("a", "b"))
    with pytest.raises(IsolationUnavailable) as caught:
        none.require_any()
    assert caught.value.message.splitlines() == ["no gvisor by a", "b: no gvisor by b"]
    assert caught.value.advice == "get a"


def test_each_backend_is_asked_once_and_as_late_as_can_be() -> None:
    first, second, third = backend("a"), backend("b", GVISOR), backend("c", GVISOR)
    seen = candidates(request(), having(first, second, third))
    seen.require_any()
    assert choose([policy()], FACTS, seen).backend is second
    assert [each.asked for each in (first, second, third)] == [1, 1, 0]


def test_one_whose_sandboxes_are_root_on_the_host_is_passed_over_where_policy_asks_for_more() -> (
    None
):
    plain, mapped = StatedBackend("plain", GVISOR, rootless=False), backend("mapped", GVISOR)
    assert chosen(policy(), plain, mapped).backend is plain
    choice = chosen(policy("backends: ['*'], rootless: true"), plain, mapped)
    assert choice.backend is mapped
    assert "root on the host" in choice.refused["plain"].message


def test_what_is_decided_again_is_decided_of_the_one_that_was_chosen() -> None:
    first, second = backend("first"), backend("second", GVISOR)
    choice = chosen(policy(), first, second)
    again = choose([policy()], FACTS, (choice.candidate,))
    assert isinstance(again.decision, Decision)
    assert (again.backend, again.decision.backend) == (second, "second")


def test_a_value_is_made_when_it_is_asked_for_and_only_once() -> None:
    made: list[str] = []

    def maker(name: str) -> Callable[[], object]:
        def make() -> object:
            made.append(name)
            return object()

        return make

    values = OnDemand({name: maker(name) for name in "ab"})
    assert (list(values), len(values), "b" in values, "c" in values) == (["a", "b"], 2, True, False)
    assert values.get("c") is None
    assert made == []
    assert values["b"] is values["b"]
    assert made == ["b"]

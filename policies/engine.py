"""``decide``: policies and facts in, one decision or a denial out.

Several policies are combined by taking the stricter of all in every field, so a further one
can only tighten: the first is the operator's, and what it leaves out is its default; what a
further one leaves out of its lists and limits is as before. Whatever the files say, an untrusted
build runs in gVisor at least.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce

from policies.document import Policy
from policies.facts import BuildFacts
from policies.model import Decision, Denial, Isolation, Limits, TraceStep, Trust
from policies.patterns import matches_any

UNTRUSTED_FLOOR = Isolation.GVISOR
"""No file, flag or order of rules puts an untrusted build below this."""


class _Denied(Exception):  # never leaves this module
    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule
        self.reason = reason


def within(sets: tuple[tuple[str, ...], ...], text: str) -> bool:
    """Whether ``text`` matches one pattern of each set; nothing is within no sets at all."""
    return bool(sets) and all(matches_any(patterns, text) for patterns in sets)


def isolation(policies: Sequence[Policy], trust: Trust) -> tuple[Isolation, list[TraceStep]]:
    """The isolation that a build of this trust gets, and why. Needs no other fact."""
    trace = []
    chosen = Isolation.CONTAINER
    for policy in policies:
        for rule in ("default", "floor"):
            document = policy.document
            wanted = document.default.isolation if rule == "default" else document.floor
            effect = f"isolation {wanted}" if wanted > chosen else f"stays {chosen}"
            trace.append(TraceStep(policy=policy.document.name, rule=rule, effect=effect))
            chosen = max(chosen, wanted)
    if trust is Trust.UNTRUSTED:
        effect = f"isolation {UNTRUSTED_FLOOR}" if chosen < UNTRUSTED_FLOOR else f"stays {chosen}"
        trace.append(TraceStep(policy="built-in", rule="untrusted-floor", effect=effect))
        chosen = max(chosen, UNTRUSTED_FLOOR)
    return chosen, trace


def limits(policies: Sequence[Policy]) -> Limits:
    """The first policy's limits, tightened by what the others state."""
    first, *others = (policy.document.default.limits for policy in policies)
    return reduce(
        lambda least, other: least.tightened(other.over(least)), others, first.over(Limits())
    )


def decide(policies: Sequence[Policy], facts: BuildFacts) -> Decision | Denial:
    """Decides how the build runs.

    Args:
        policies: At least one, the operator's first; the order of the others matters for the
            trace only.
        facts: What is known of the build.
    """
    assert policies, "there is always the shipped default"
    chosen, trace = isolation(policies, facts.trust)
    outcomes = [policy.document.default for policy in policies]
    base_images = _opinions(outcome.base_images for outcome in outcomes)
    destinations = _opinions(outcome.destinations for outcome in outcomes)
    try:
        _require_offered(policies, facts, chosen)
        _require_reach(facts, base_images, destinations)
    except _Denied as denied:
        step = TraceStep(policy="all", rule=denied.rule, effect=f"denied: {denied.reason}")
        return Denial(reason=denied.reason, rule=denied.rule, trace=(*trace, step))
    allowed = limits(policies)
    if facts.wall_seconds is not None:
        effect = f"wall_seconds {min(facts.wall_seconds, allowed.wall_seconds)}"
        trace.append(TraceStep(policy="request", rule="timeout", effect=effect))
        allowed = allowed.tightened(replace(allowed, wall_seconds=facts.wall_seconds))
    return Decision(
        isolation=chosen,
        backend=facts.backend,
        builder=facts.builder,
        network=min(outcome.network for outcome in outcomes),
        limits=allowed,
        base_images=base_images,
        pull_credentials=_opinions(outcome.pull_credentials for outcome in outcomes),
        destinations=destinations,
        policies=tuple((policy.document.name, policy.digest) for policy in policies),
        trace=tuple(trace),
    )


def _opinions(lists: Iterable[tuple[str, ...] | None]) -> tuple[tuple[str, ...], ...]:
    """What the first leaves out is nothing, never an opening for the others."""
    first, *others = lists
    return (first or (), *(patterns for patterns in others if patterns is not None))


def _require_offered(policies: Sequence[Policy], facts: BuildFacts, chosen: Isolation) -> None:
    outcomes = [policy.document.default for policy in policies]
    if not within(_opinions(outcome.backends for outcome in outcomes), facts.backend):
        raise _Denied("backends", f"backend {facts.backend!r} is not among those allowed")
    if not within(_opinions(outcome.builders for outcome in outcomes), facts.builder):
        raise _Denied("builders", f"builder {facts.builder!r} is not among those allowed")
    if chosen not in facts.available:
        raise _Denied("isolation", f"isolation {chosen} cannot be had on backend {facts.backend!r}")


def _require_reach(
    facts: BuildFacts,
    base_images: tuple[tuple[str, ...], ...],
    destinations: tuple[tuple[str, ...], ...],
) -> None:
    if "insecure" in facts.dockerfile.securities:
        raise _Denied("security", "RUN --security=insecure is never allowed")
    for image in facts.dockerfile.images:
        if not within(base_images, image.name):
            raise _Denied("base_images", f"base image {image.name} is not among those allowed")
    for destination in facts.destinations:
        if not within(destinations, destination.name):
            raise _Denied(
                "destinations", f"destination {destination.name} is not among those allowed"
            )

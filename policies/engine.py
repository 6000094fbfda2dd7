"""``decide``: policies and facts in, one decision or a denial out.

Per policy, in this order: ``deny`` rules refuse; the first of ``rules`` whose condition holds gives
the terms, or the ``default`` does; ``floors`` raise. Several policies are combined by taking the
stricter of all in every field, so a further one can only tighten: the first is the operator's, and
what it leaves out is closed; what a further one leaves out stays as it is.

A condition that depends on an unknown fact counts as the worst case. In ``deny`` and ``floors`` it
holds. Of ``rules``, both ways are gone, and the stricter terms of both are taken. Whatever the
files say, an untrusted build runs in gVisor at least.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import reduce

from policies.conditions import ConditionFailed, View
from policies.document import DenyRule, Floor, Rule, Terms, TrustRule
from policies.facts import BuildFacts, DockerfileFacts
from policies.grants import CLOSED, NO_OPINION, grant, meet, within
from policies.loader import Policy
from policies.model import (
    Decision,
    Denial,
    Grant,
    Isolation,
    Limits,
    Network,
    TraceStep,
    Trust,
)
from policies.reference import ImageReference
from policies.vocabulary import TRUST, values

UNTRUSTED_FLOOR = Isolation.GVISOR
"""No file, flag or order of rules puts an untrusted build below this."""

BUILT_IN = "built-in"


class _Denied(Exception):  # never leaves this module
    def __init__(self, rule: str, reason: str, wanted: Isolation | None = None) -> None:
        super().__init__(reason)
        self.rule = rule
        self.reason = reason
        self.wanted = wanted


def decide(policies: Sequence[Policy], facts: BuildFacts) -> Decision | Denial:
    """Decides how the build runs.

    Args:
        policies: At least one, the operator's first; the order of the others matters for the
            trace only.
        facts: What is known of the build.
    """
    assert policies, "there is always the shipped default"
    trace: list[TraceStep] = []
    sources = tuple((policy.name, policy.digest) for policy in policies)
    try:
        known = values(facts)
        trust = _trust(policies, facts, View(known), trace)
        if trust is not None:
            known[TRUST] = str(trust)
        view = View(known)
        _require_not_denied(policies, facts, view, trace)
        granted = _granted(policies, facts, view, trace)
        if trust is not Trust.TRUSTED:
            floor = replace(NO_OPINION, isolation=UNTRUSTED_FLOOR)
            granted = _met(granted, floor, trace, BUILT_IN, "floors/untrusted")
        asked = replace(NO_OPINION, limits=_asked(facts))
        granted = _met(granted, asked, trace, "request", "limits")
        _require_offered(granted, facts)
        _require_reach(granted, facts)
        isolation = _isolation(granted, facts, trace)
    except _Denied as denied:
        step = TraceStep(policy=BUILT_IN, rule=denied.rule, found="denied", effect=denied.reason)
        return Denial(
            reason=denied.reason,
            rule=denied.rule,
            wanted=denied.wanted,
            policies=sources,
            trace=(*trace, step),
        )
    return Decision(
        isolation=isolation,
        wanted=granted.isolation,
        trust=trust or Trust.UNTRUSTED,
        tenant=facts.tenant,
        backend=facts.request.backend,
        builder=facts.builder.name,
        builder_digest=facts.builder.digest,
        grant=granted,
        policies=sources,
        trace=tuple(trace),
    )


def context_limits(policies: Sequence[Policy]) -> Limits:
    """The most that any rule would let a context have: reading it comes before the facts.

    ``decide`` holds the context against the limits of the rule that applies.
    """
    return reduce(Limits.tightened, map(_widest, policies, (CLOSED, *(Terms(),) * len(policies))))


def _widest(policy: Policy, closed: Terms) -> Limits:
    choices = [grant(terms, None).limits for terms in _choices(policy, closed)]
    names = [field.name for field in fields(Limits)]
    return Limits(**{name: max(getattr(limits, name) for limits in choices) for name in names})


def _choices(policy: Policy, closed: Terms) -> list[Terms]:
    default = (policy.document.default or Terms()).over(closed)
    return [*(rule.then.over(default) for rule in policy.document.rules), default]


# -- the rules, one after the other ----------------------------------------------------------


def _trust(
    policies: Sequence[Policy], facts: BuildFacts, view: View, trace: list[TraceStep]
) -> Trust | None:
    """Trusted where each policy that speaks of it says so, of an identity somebody vouches for.

    The operator's policy alone makes a build untrusted for sure. Where it could be trusted, and
    the request or a further policy withdraws that, the fact is unknown: what the operator asks of
    trusted builds alone still holds.
    """
    if not facts.identity.authenticated:
        return Trust.UNTRUSTED
    first, *others = (policy.document.trusted for policy in policies)
    answers: list[bool | None] = []
    for policy, rules in zip(policies, [first or (), *others], strict=True):
        if rules is None:
            continue
        found = [_holds(policy, "trusted", rule, view, trace) for rule in rules]
        answers.append(True if True in found else None if None in found else False)
    if answers[0] is False:
        return Trust.UNTRUSTED
    return Trust.TRUSTED if set(answers) == {True} and not facts.request.untrusted else None


def _require_not_denied(
    policies: Sequence[Policy], facts: BuildFacts, view: View, trace: list[TraceStep]
) -> None:
    for policy in policies:
        for rule in policy.document.deny:
            holds = _holds(policy, "deny", rule, view, trace)
            if holds is False:
                continue
            key = f"deny/{rule.name}"
            if (
                holds is None
                and not facts.base.resolved
                and policy.conditions[rule.when or ""].is_open
            ):
                _note(trace, found="open", effect="decided again with the base images")
                continue
            doubt = "" if holds else " (a fact that it asks for is unknown)"
            reason = rule.reason or f"policy {policy.name} denies it"
            raise _Denied(key, f"{reason}{doubt}")


def _granted(
    policies: Sequence[Policy], facts: BuildFacts, view: View, trace: list[TraceStep]
) -> Grant:
    granted = NO_OPINION
    for policy in policies:
        closed = CLOSED if policy is policies[0] else Terms()
        for owner, rule, terms in _applying(policy, closed, view, trace):
            granted = _met(granted, grant(terms, facts.tenant), trace, owner, rule)
    return granted


def _applying(
    policy: Policy, closed: Terms, view: View, trace: list[TraceStep]
) -> Iterator[tuple[str, str, Terms]]:
    """The terms that a policy contributes, all of which are met."""
    document = policy.document
    default = (document.default or Terms()).over(closed)
    for rule in document.rules:
        holds = _holds(policy, "rules", rule, view, trace)
        if holds is not False:
            yield policy.name, f"rules/{rule.name}", rule.then.over(default)
        if holds:
            break
    else:
        yield policy.name, "default", default
    for floor in document.floors:
        if _holds(policy, "floors", floor, view, trace) is not False:
            yield policy.name, f"floors/{floor.name}", floor


def _holds(
    policy: Policy,
    section: str,
    rule: TrustRule | DenyRule | Rule | Floor,
    view: View,
    trace: list[TraceStep],
) -> bool | None:
    owner, line = policy.origins[f"{section}/{rule.name}"]
    step = TraceStep(policy=owner, rule=f"{section}/{rule.name}", line=line, found="matched")
    try:
        holds = True if rule.when is None else policy.conditions[rule.when].holds(view)
    except ConditionFailed as failed:
        raise _Denied(step.rule, f"its condition could not be evaluated: {failed}") from None
    found = {True: "matched", False: "not matched", None: "unknown"}[holds]
    trace.append(replace(step, found=found))
    return holds


def _met(granted: Grant, other: Grant, trace: list[TraceStep], owner: str, rule: str) -> Grant:
    """Both met; what that changed goes into the trace."""
    met = meet(granted, other)
    effect = "; ".join(_changes(granted, met))
    if trace and trace[-1].rule == rule:
        _note(trace, effect=effect)
    elif effect or rule == "default":
        trace.append(TraceStep(policy=owner, rule=rule, found="matched", effect=effect))
    return met


def _note(trace: list[TraceStep], **changes: str) -> None:
    trace[-1] = replace(trace[-1], **changes)  # type: ignore[arg-type] # texts all


def _changes(before: Grant, after: Grant) -> Iterator[str]:
    first = before is NO_OPINION
    for field in fields(Grant):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if old == new or field.name == "limits":
            continue
        shown = "deny" if new is None else str(new)
        if isinstance(new, tuple):
            shown = (
                "[" + ", ".join(map(str, new[-1])) + "]"
                if field.name != "egress"
                else f"{len(new[-1])} rules"
            )
        yield f"{field.name} {shown}" if first else f"{field.name} -> {shown}"
    for field in fields(Limits):
        old, new = getattr(before.limits, field.name), getattr(after.limits, field.name)
        if old != new and not first:
            yield f"{field.name} {old} -> {new}"


# -- what no policy can allow -----------------------------------------------------------------


def _asked(facts: BuildFacts) -> Limits:
    request = facts.request
    asked = {
        name: value
        for name in ("wall_seconds", "memory_bytes", "cpu_millis")
        if (value := getattr(request, name)) is not None
    }
    return replace(NO_OPINION.limits, **asked)


def _require_offered(granted: Grant, facts: BuildFacts) -> None:
    """The parts that the build would be made with are allowed and there."""
    backend, builder = facts.request.backend, facts.builder
    if not within(granted.backends, backend):
        raise _Denied("backends", f"backend {backend!r} is not among those allowed")
    names = [builder.name, *([f"{builder.name}@{builder.digest}"] if builder.digest else [])]
    if not within(granted.builders, *names):
        raise _Denied("builders", f"builder {names[-1]!r} is not among those allowed")
    if granted.nonroot and builder.uid == 0:
        raise _Denied("nonroot", f"builder {builder.name!r} is uid 0 inside its sandbox")
    for capability in builder.capabilities:
        if not within(granted.capabilities, capability):
            raise _Denied("capabilities", f"builder {builder.name!r} needs {capability}")
    if granted.rootless and not facts.host.rootless:
        raise _Denied("rootless", f"sandboxes of backend {backend!r} are root on the host")
    if granted.network is Network.EGRESS and not facts.host.egress:
        raise _Denied("egress", f"backend {backend!r} has no egress proxy")
    if (granted.provenance or granted.signature) and not facts.host.provenance:
        raise _Denied("provenance", "this runner cannot sign what it builds")


def _require_reach(granted: Grant, facts: BuildFacts) -> None:
    """What is known to be asked for is allowed. What only shows later, the gateway decides."""
    dockerfile = facts.dockerfile
    if "insecure" in dockerfile.securities:
        raise _Denied("security", "RUN --security=insecure is never allowed")
    if facts.builder.frontends:
        _require_frontend(granted, dockerfile)
    for image in dockerfile.images:
        if not may_start_from(granted, image):
            raise _Denied(
                "base_images", f"base image {image.explicit()} is not among those allowed"
            )
    for destination in facts.destinations:
        if not within(granted.destinations, destination.name):
            raise _Denied(
                "destinations", f"destination {destination.name} is not among those allowed"
            )
    for name in ("bytes", "entries"):
        most = getattr(granted.limits, f"context_{name}")
        if getattr(facts.context, name) > most:
            raise _Denied("context", f"the context has more than {most} {name}")


def _require_frontend(granted: Grant, dockerfile: DockerfileFacts) -> None:
    if any("frontend" in unknown.facts for unknown in dockerfile.unknown):
        raise _Denied("frontends", "which frontend the Dockerfile names cannot be told")
    frontend = dockerfile.frontend
    if frontend and not within(granted.frontends, frontend):
        raise _Denied("frontends", f"frontend {frontend!r} is not among those allowed")


def may_start_from(granted: Grant, image: ImageReference) -> bool:
    """Whether ``image`` may be pulled: by name, or as this very digest."""
    texts = [image.name, *([f"{image.name}@{image.digest}"] if image.digest else [])]
    return granted.network >= Network.REGISTRIES and within(granted.base_images, *texts)


def _isolation(granted: Grant, facts: BuildFacts, trace: list[TraceStep]) -> Isolation:
    wanted, fallback = granted.isolation, granted.fallback
    offered = facts.host.isolations
    if wanted in offered:
        return wanted
    backend = facts.request.backend
    if fallback is None or fallback <= wanted or fallback not in offered:
        reason = f"isolation {wanted} cannot be had on backend {backend!r}"
        raise _Denied("isolation", reason, wanted)
    effect = f"isolation {wanted} cannot be had; {fallback} instead"
    trace.append(TraceStep(policy=BUILT_IN, rule="fallback", found="matched", effect=effect))
    return fallback

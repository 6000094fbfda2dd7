"""What terms come to: grants, and the stricter of two of them.

Everything that has a say, be it a rule, a floor or a further policy, becomes a grant, and all of
them are met. So more of them can only tighten, in whatever order they come.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import reduce
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from policies.document import TENANT, EgressDocument, LimitsDocument, Terms
from policies.facts import is_tenant
from policies.model import Cache, EgressRule, Grant, Isolation, Limits, Network
from policies.patterns import matches, matches_any

_LISTS = frozenset(
    {"backends", "builders", "capabilities", "base_images", "pull_credentials", "destinations"}
    | {"frontends"}
)
_UNLIMITED = Limits(**{field.name: 1 << 62 for field in dataclasses.fields(Limits)})

NO_OPINION = Grant(
    isolation=Isolation.CONTAINER,
    fallback=Isolation.CONTAINER,
    nonroot=False,
    rootless=False,
    network=Network.EGRESS,
    egress=(),
    cache=Cache.WRITE,
    priority=100,
    provenance=False,
    signature=False,
    retention_days=1,
    limits=_UNLIMITED,
    **dict.fromkeys(_LISTS, ()),
)
"""Meets any other grant without changing it."""

CLOSED = Terms(
    isolation=Isolation.GVISOR,
    fallback="deny",
    nonroot=False,
    rootless=False,
    network=Network.REGISTRIES,
    egress=(),
    cache=Cache.NONE,
    priority=50,
    provenance=False,
    signature=False,
    retention_days=30,
    limits=LimitsDocument(**dataclasses.asdict(Limits())),
    **dict.fromkeys(_LISTS, ()),
)  # fmt: skip
"""What the first policy leaves out: no list allows anything, limits have their defaults."""


def grant(terms: Terms, tenant: str | None) -> Grant:
    """What ``terms`` allow a build of ``tenant``; no opinion where they say nothing."""
    changes: dict[str, Any] = {}
    for name, value in terms:
        if value is None or name not in _STRICTER:
            continue
        if name in _LISTS:
            changes[name] = (_for(tenant, value),)
        elif name == "egress":
            changes[name] = (tuple(map(EgressDocument.rule, value)),)
        elif name == "limits":
            stated = {limit: number for limit, number in value if number is not None}
            changes[name] = dataclasses.replace(_UNLIMITED, **stated)
        else:
            changes[name] = None if value == "deny" else value
    return dataclasses.replace(NO_OPINION, **changes)


def _for(tenant: str | None, patterns: tuple[str, ...]) -> tuple[str, ...]:
    if tenant is None or not is_tenant(tenant):
        return tuple(pattern for pattern in patterns if TENANT not in pattern)
    return tuple(pattern.replace(TENANT, tenant) for pattern in patterns)


def meet(one: Grant, other: Grant) -> Grant:
    """The stricter of both in every field."""
    return Grant(
        **{
            name: stricter(getattr(one, name), getattr(other, name))
            for name, stricter in _STRICTER.items()
        }
    )


def within(sets: tuple[tuple[str, ...], ...], *texts: str) -> bool:
    """Whether one of ``texts`` matches a pattern of each set; nothing is within no sets at all."""
    return bool(sets) and all(
        any(matches_any(patterns, text) for text in texts) for patterns in sets
    )


# -- egress -----------------------------------------------------------------------------------


def may_connect(granted: Grant, host: str, port: int, method: str | None) -> EgressRule | None:
    """The rule that lets RUN steps connect, narrowed to what was asked; None where none does.

    Its ``private_ranges`` are those that a rule of each set opens to this connection. A preset
    matches what its rule has as ``hosts``: whoever opens a session has put them there.

    Args:
        granted: Of the decision.
        host: In lower case, without a trailing dot; an IPv4 address in its usual spelling.
        port: Of TCP.
        method: Of HTTP in absolute form; None for a tunnel, whose requests nobody can see.
    """
    sets = [[r for r in rules if _covers(r, host, port, method)] for rules in granted.egress]
    if granted.network is not Network.EGRESS or not sets or not all(sets):
        return None
    rule = sets[0][0]
    opened: list[_Networks] = [
        {ip_network(text) for rule in rules for text in rule.private_ranges} for rules in sets
    ]
    common: _Networks = reduce(_in_both, opened)
    return dataclasses.replace(
        rule,
        hosts=tuple(pattern for pattern in rule.hosts if _names(pattern, host))[:1],
        ports=(port,),
        private_ranges=tuple(sorted(map(str, common))),
    )


def _covers(rule: EgressRule, host: str, port: int, method: str | None) -> bool:
    return (
        port in rule.ports
        and (not rule.methods or method in rule.methods)
        and any(_names(pattern, host) for pattern in rule.hosts)
    )


def _names(pattern: str, host: str) -> bool:
    """A wildcard is of names: ``*.0.0.1`` has no addresses."""
    is_address = host.rpartition(".")[2].isdigit()
    return pattern == host if is_address else matches(pattern, host)


_Networks = set[IPv4Network | IPv6Network]


def _in_both(some: _Networks, others: _Networks) -> _Networks:
    """Two networks that overlap lie one in the other: the smaller is what both have."""
    return {
        max(one, other, key=lambda network: network.prefixlen)
        for one in some
        for other in others
        if one.version == other.version and one.overlaps(other)
    }


# -- the stricter of two ------------------------------------------------------------------------


def _either(one: bool, other: bool) -> bool:
    return one or other


def _fallback(one: Isolation | None, other: Isolation | None) -> Isolation | None:
    return None if one is None or other is None else max(one, other)


def _all_sets(one: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(one + other))


_STRICTER: Mapping[str, Callable[[Any, Any], Any]] = {
    "isolation": max,
    "fallback": _fallback,
    "nonroot": _either,
    "rootless": _either,
    "network": min,
    "egress": _all_sets,
    "cache": min,
    "priority": min,
    "provenance": _either,
    "signature": _either,
    "retention_days": max,
    "limits": Limits.tightened,
    **dict.fromkeys(sorted(_LISTS), _all_sets),
}

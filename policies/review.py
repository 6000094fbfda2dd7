r"""What a policy file says that its author can hardly have meant, finding by finding.

    >>> [finding.code for finding in review(b"apiVersion: runner/v1alpha1\nname: x\n", "x.yaml")]
    ['nothing-allowed']

A file that means nothing at all is an error, which the loader raises. All here is about files that
are sound: a *warning* where something in them has no effect or reaches further than it looks, a
*note* where that depends on how the file is used.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from policies import marks
from policies.conditions import Condition, ConditionFailed, View
from policies.document import (
    TENANT,
    DenyRule,
    EgressDocument,
    Floor,
    PolicyDocument,
    Rule,
    Terms,
    TrustRule,
)
from policies.grants import CLOSED, NO_OPINION, grant, meet
from policies.loader import SECTIONS, Policy, parse
from policies.model import Grant, Isolation, Limits, Network
from policies.patterns import matches
from policies.vocabulary import FACTS, TRUST

_LITERAL_HOST = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
"""However it is written: ``10.0.0.1``, ``127.1``, ``0x7f000001``."""
_TEXT = re.compile(r"'[^']*'|\"[^\"]*\"")
_DOT = re.compile(r"\s*\.\s*")

_SECOND_LEVEL = frozenset({"ac", "co", "com", "edu", "gov", "ne", "net", "or", "org"})
_OUR_OWN = frozenset({"corp", "home", "internal", "intranet", "lan", "local", "localhost", "test"})
"""Top-level names that no registry of the public DNS gives away."""

SHARED_HOSTS: Mapping[str, str] = {
    "amazonaws.com": "buckets, functions and virtual machines of all AWS customers",
    "s3.*.amazonaws.com": "buckets of all AWS customers",
    "appspot.com": "applications of all Google Cloud customers",
    "azureedge.net": "sites of all Azure customers",
    "azurewebsites.net": "applications of all Azure customers",
    "blob.core.windows.net": "storage accounts of all Azure customers",
    "cloudfront.net": "distributions of all AWS customers",
    "digitaloceanspaces.com": "buckets of all DigitalOcean customers",
    "firebaseapp.com": "applications of all Firebase customers",
    "github.io": "pages of all GitHub users",
    "gitlab.io": "pages of all GitLab users",
    "herokuapp.com": "applications of all Heroku customers",
    "netlify.app": "sites of all Netlify customers",
    "ngrok.io": "tunnels to anybody's machine",
    "ngrok-free.app": "tunnels to anybody's machine",
    "pages.dev": "sites of all Cloudflare customers",
    "r2.dev": "buckets of all Cloudflare customers",
    "run.app": "services of all Google Cloud customers",
    "storage.googleapis.com": "buckets of all Google Cloud customers",
    "trycloudflare.com": "tunnels to anybody's machine",
    "vercel.app": "sites of all Vercel customers",
    "web.app": "applications of all Firebase customers",
    "workers.dev": "programs of all Cloudflare customers",
}
"""Where anybody may have a name below, and read what a build sends there; see threat 31."""


class Severity(StrEnum):
    """How sure it is that something is wrong."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One thing that a reviewer would point at.

    Attributes:
        line: In the file, from 1.
        code: Stable, kebab-case.
    """

    line: int
    severity: Severity
    code: str
    sentence: str


_Found = Iterator[tuple[tuple[str | int, ...], str, str]]
"""Path, code and sentence."""


def review(data: bytes, source: str) -> tuple[Finding, ...]:
    """Reviews one policy file, by line.

    What it extends is taken in for what rules come to; findings are about the file alone.

    Raises:
        PolicyInvalid: It is none.
    """
    policy, marked = parse(data, source), marks.load(data, source)
    own = PolicyDocument.model_validate(marked.value)
    found = [
        *_conditions(policy, own),
        *_shadowed(policy, own),
        *_trusted(own),
        *_floors(policy, own),
        *_terms(policy, own),
        *_reach(own),
    ]
    findings = {Finding(marked.mark(path).line, Severity.WARNING, *rest) for path, *rest in found}
    if not _offers_anything(policy):
        findings.add(
            Finding(
                marked.mark(("default",)).line,
                Severity.NOTE,
                "nothing-allowed",
                "as the operator's policy this allows nothing: no default and no rule has "
                "backends, builders and capabilities; as a further one it is fine",
            )
        )
    elif _lacks_default(policy):
        findings.add(
            Finding(
                marked.mark(("rules",)).line,
                Severity.NOTE,
                "missing-default",
                "where no rule holds there are no terms: as the operator's policy this allows "
                "nothing then; as a further one it is fine",
            )
        )
    return tuple(sorted(findings))


def _lacks_default(policy: Policy) -> bool:
    document = policy.document
    return document.default in {None, Terms()} and not any(r.when is None for r in document.rules)


def named_facts(policies: Sequence[Policy]) -> frozenset[str]:
    """The facts that conditions of ``policies`` name, and ``tenant`` where a pattern does."""
    texts = [_TEXT.sub("''", text) for policy in policies for text in policy.conditions]
    plain = "\n".join(_DOT.sub(".", text) for text in texts)
    named = {
        name
        for name in (*FACTS, TRUST)
        if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", plain) is not None
    }
    if any(TENANT in pattern for policy in policies for pattern in _all_patterns(policy)):
        named.add("tenant")
    return frozenset(named)


def _all_patterns(policy: Policy) -> Iterator[str]:
    document = policy.document
    for terms in (document.default or Terms(), *(r.then for r in document.rules), *document.floors):
        for name in _NAMES:
            yield from getattr(terms, name) or ()


# -- rules that do nothing ---------------------------------------------------------------------


def _rules(document: PolicyDocument, section: str) -> Sequence[TrustRule | DenyRule | Floor | Rule]:
    rules: Sequence[TrustRule | DenyRule | Floor | Rule] = getattr(document, section) or ()
    return rules


def _always(policy: Policy, when: str | None) -> bool | None:
    """Whether a condition holds for whatever facts; None where they matter."""
    return True if when is None else _holds(policy.conditions[when], {})


def _holds(condition: Condition, known: Mapping[str, str]) -> bool | None:
    try:
        return condition.holds(View(known))
    except ConditionFailed:
        return None


def _conditions(policy: Policy, own: PolicyDocument) -> _Found:
    for section in SECTIONS:
        for index, rule in enumerate(_rules(own, section)):
            always = _always(policy, rule.when)
            path = (section, index, "when")
            if always is False:
                yield path, "never-holds", f"{rule.name}: its condition never holds"
            elif always and section == "deny":
                yield path, "denies-everything", f"{rule.name}: this denies every build"
            elif always and section == "trusted":
                yield path, "trusts-everybody", f"{rule.name}: this trusts every local user"


def _shadowed(policy: Policy, own: PolicyDocument) -> _Found:
    """Rules behind one that holds whenever they do. Floors add up, so none shadows another."""
    for section in ("trusted", "deny", "rules"):
        mine = {rule.name: index for index, rule in enumerate(_rules(own, section))}
        earlier: dict[str, str] = {}
        unconditional: str | None = None
        for rule in _rules(policy.document, section):
            condition = " ".join((rule.when or "").split())
            before = unconditional or earlier.get(condition)
            path = (section, mine.get(rule.name, 0))
            if rule.name in mine and unconditional:
                yield path, "unreachable", f"{rule.name}: never looked at, {before} always holds"
            elif rule.name in mine and before:
                yield path, "same-condition", f"{rule.name}: no effect, {before} asks for the same"
            earlier.setdefault(condition, rule.name)
            if _always(policy, rule.when):
                unconditional = unconditional or rule.name


def _trusted(own: PolicyDocument) -> _Found:
    for index, rule in enumerate(_rules(own, "trusted")):
        text = _TEXT.sub("''", rule.when or "")
        if not re.search(r"\bidentity\s*\.\s*name\b", text):
            sentence = "names no identity.name; all but identity is what whoever asks says"
            yield ("trusted", index), "trust-by-claim", f"{rule.name}: {sentence}"


# -- terms that do nothing -----------------------------------------------------------------------


def _choices(policy: Policy) -> list[Terms]:
    """All that its rules and default come to, as the operator's policy."""
    default = (policy.document.default or Terms()).over(CLOSED)
    return [*(rule.then.over(default) for rule in policy.document.rules), default]


def _offers_anything(policy: Policy) -> bool:
    return any(
        terms.backends and terms.builders and terms.capabilities for terms in _choices(policy)
    )


def _floors(policy: Policy, own: PolicyDocument) -> _Found:
    choices = [grant(terms, "") for terms in _choices(policy)]
    for index, floor in enumerate(own.floors):
        least = grant(floor, "")
        if least == NO_OPINION:
            sentence = f"{floor.name}: raises nothing, whatever the rules give"
        elif all(_all_stricter(choice, least) for choice in choices):
            sentence = f"{floor.name}: weaker than what every rule and the default give"
        else:
            continue
        yield ("floors", index), "floor-without-effect", sentence


def _all_stricter(choice: Grant, least: Grant) -> bool:
    """Whether ``choice`` is stricter than ``least`` in all that ``least`` says, equal in nothing.

    A floor that is just what the rules give is none too many: it holds for later rules.
    """
    pairs = [
        (getattr(of_choice, field.name), getattr(of_least, field.name))
        for of_choice, of_least, kind, weakest in (
            (choice, least, Grant, NO_OPINION),
            (choice.limits, least.limits, Limits, NO_OPINION.limits),
        )
        for field in fields(kind)
        if field.name != "limits" and getattr(of_least, field.name) != getattr(weakest, field.name)
    ]
    return meet(choice, least) == choice and all(mine != floor for mine, floor in pairs)


def _all_terms(policy: Policy, own: PolicyDocument) -> Iterator[tuple[Any, ...]]:
    """Path, the terms as written, and as they come to, of the default and each rule."""
    default = policy.document.default or Terms()
    if own.default is not None:
        yield ("default",), own.default, default, None
    for index, rule in enumerate(own.rules):
        yield ("rules", index, "then"), rule.then, rule.then.over(default), rule.when


def _terms(policy: Policy, own: PolicyDocument) -> _Found:
    for path, stated, whole, when in _all_terms(policy, own):
        wanted = whole.isolation or Isolation.GVISOR
        if stated.isolation is Isolation.CONTAINER and not _for_trusted_alone(policy, when):
            yield (
                (*path, "isolation"),
                "container-for-untrusted",
                "untrusted builds get gvisor all the same; a rule may ask for trust == 'trusted'",
            )
        if isinstance(stated.fallback, Isolation) and stated.fallback <= wanted:
            yield (
                (*path, "fallback"),
                "fallback-without-effect",
                f"never taken, it is not stronger than isolation {wanted}",
            )
        if stated.egress and whole.network not in {None, Network.EGRESS}:
            yield (
                (*path, "egress"),
                "egress-without-network",
                f"no effect, the network is {whole.network}",
            )
        if stated.network is Network.EGRESS and not whole.egress:
            yield (
                (*path, "network"),
                "egress-without-rules",
                "lets nothing through, no egress rule names a host",
            )


def _for_trusted_alone(policy: Policy, when: str | None) -> bool:
    """Whether the condition is false for everybody who is not trusted."""
    return when is not None and _holds(policy.conditions[when], {TRUST: "untrusted"}) is False


# -- what reaches further than it looks ----------------------------------------------------------

_NAMES = ("base_images", "pull_credentials", "destinations")


def _reach(own: PolicyDocument) -> _Found:
    opening: list[tuple[tuple[str | int, ...], Terms]] = [
        *([(("default",), own.default)] if own.default is not None else []),
        *((("rules", index, "then"), rule.then) for index, rule in enumerate(own.rules)),
    ]
    floors = [(("floors", index), floor) for index, floor in enumerate(own.floors)]
    for path, terms in opening:
        for name in _NAMES:
            for index, pattern in enumerate(getattr(terms, name) or ()):
                yield from (((*path, name, index), *what) for what in _pattern(name, pattern))
    for path, terms in (*opening, *floors):
        for name in _NAMES:
            for index, pattern in enumerate(getattr(terms, name) or ()):
                if why := _matches_nothing(name, pattern):
                    yield (*path, name, index), "matches-nothing", f"{pattern}: {why}"
        for index, rule in enumerate(terms.egress or ()):
            yield from (((*path, "egress", index), *what) for what in _egress(rule))


def _pattern(name: str, pattern: str) -> Iterator[tuple[str, str]]:
    host, slash, _ = pattern.partition("/")
    anywhere = host in {"*", "**"} or (not slash and host.startswith("**"))
    if name == "pull_credentials" and anywhere:
        yield (
            "credentials-everywhere",
            f"{pattern}: builds may pull whatever any of the user's logins can",
        )
    if not anywhere and (other := _other_host(host)):
        yield "loose-host", f"{pattern}: matches hosts of others too, such as {other}"
    before, tenant, _ = pattern.partition(TENANT)
    part = next((part for part in pattern.split("/") if TENANT in part), "")
    if tenant and ("**" in before or "*" in part):
        yield (
            "loose-tenant",
            f"{pattern}: a star beside {TENANT}, or ** before it, matches names of others too",
        )


def _other_host(host: str) -> str | None:
    """What somebody else could call a host to match; None where a star cannot leave a domain."""
    if host.endswith("*") and not host.endswith(":*"):
        return host.rstrip("*") + ".evil.example"
    if host.startswith("**"):
        return "evil.example/x" + host.lstrip("*")
    if host.startswith("*") and not host.startswith("*."):
        return "evil-" + host.lstrip("*")
    return host.replace("**", ".evil.example/") if "**" in host else None


def _matches_nothing(name: str, pattern: str) -> str | None:
    """Why no name that is written out can match; None where one can."""
    host, slash, path = pattern.partition("/")
    if "**" not in host and (not slash or not (set(host) & set(".:*{[") or host == "localhost")):
        return "names are written out, as docker.io/library/debian"
    bare, at, _ = path.partition("@")
    if at and name != "base_images":
        return "names here have no digest"
    if ":" in bare:
        return "names have no tag; a digest can be asked for, as NAME@sha256:..."
    return None


def _egress(rule: EgressDocument) -> Iterator[tuple[str, str]]:
    for network in rule.private_ranges:
        yield "private-range", f"builds may reach {network}, which is not public"
    for host in rule.hosts:
        if _LITERAL_HOST.fullmatch(host):
            yield "literal-address", f"{host} is an address; name the host"
        elif host.startswith("*.") and (why := _shared(host.removeprefix("*."))):
            yield "wide-wildcard", f"{host}: {why}; a build may send what it has to one of them"


def _shared(suffix: str) -> str | None:
    """Whose hosts end in ``suffix``, where anybody can have one."""
    rest, _, top = suffix.rpartition(".")
    if (not rest and top not in _OUR_OWN) or (rest in _SECOND_LEVEL and len(top) == len("uk")):
        return "a public suffix, where anybody can register a name"
    for zone, whose in SHARED_HOSTS.items():
        if matches(zone, suffix) or zone.endswith(f".{suffix}"):
            return whose
    return None

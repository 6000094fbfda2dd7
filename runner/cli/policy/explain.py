"""``runner policy explain``: how a build is decided, and which rule of which policy made it so."""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from policies import cases, factsfile
from policies.engine import decide
from policies.errors import ExitStatus
from policies.facts import BuildFacts
from policies.loader import Policy
from policies.model import Decision, Denial, Grant, Limits, TraceStep, plain
from policies.review import named_facts
from policies.vocabulary import TRUST, values
from runner.choice import candidates
from runner.cli.options import build_request, configure_facts
from runner.cli.policy.answer import say, say_json, shown, table
from runner.cli.tools import assemble, policies
from runner.errors import UsageError
from runner.facts import survey
from runner.files import Home
from runner.request import BuildRequest
from runner.tools import Tools

_BUILD = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")


@dataclass(frozen=True, slots=True)
class _Explained:
    """What was asked, and what came of it.

    Attributes:
        recorded: The plain decision of the build that the facts are of, if there was one.
        refused: By backend, why it is not the one that the facts are about.
    """

    policies: Sequence[Policy]
    facts: BuildFacts
    decision: Decision | Denial
    recorded: Mapping[str, Any] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def changes(self) -> list[tuple[str, Any, Any]]:
        """Since it was recorded."""
        then, now = self.recorded or {}, plain(self.decision)
        return cases.differences(cases.outcome(then), cases.outcome(now))


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("context", metavar="CONTEXT", type=Path, nargs="?", help="what would be submitted")
    configure_facts(parser)
    add("--facts", metavar="FILE", type=Path, help="instead of CONTEXT: facts as a document")
    add("--build", metavar="ID", help="instead of CONTEXT: the facts that this build recorded")
    add("--exit-code", action="store_true", help="end with status 3 where it is denied")
    add("--json", action="store_true", help="facts, decision and trace as JSON")


def run(parsed: argparse.Namespace) -> int:
    explained = _explained(parsed)
    if parsed.json:
        say_json(_document(explained))
    else:
        say(_lines(explained))
    denied = isinstance(explained.decision, Denial)
    return int(ExitStatus.DENIED) if denied and parsed.exit_code else 0


def _explained(parsed: argparse.Namespace) -> _Explained:
    if [parsed.context, parsed.facts, parsed.build].count(None) != 2:  # noqa: PLR2004 - of three
        raise UsageError(
            "what to explain?", advice="Name one: CONTEXT, --facts FILE, or --build ID."
        )
    if parsed.context is not None:
        return _surveyed(build_request(parsed), assemble(parsed.policy))
    _require_no_options(parsed)
    record = factsfile.read(parsed.facts or _recorded(parsed.build))
    applying = policies(parsed.policy)
    return _Explained(applying, record.facts, decide(applying, record.facts), record.decision)


def _surveyed(request: BuildRequest, tools: Tools) -> _Explained:
    choice = survey(request, tools, candidates(request, tools))
    refused = {name: error.message for name, error in choice.refused.items()}
    refused.pop(choice.backend.name, None)  # of which all the rest speaks
    return _Explained(tools.policies, choice.facts, choice.decision, refused=refused)


def _require_no_options(parsed: argparse.Namespace) -> None:
    """Options that would have no effect are refused: recorded facts are what they are."""
    bare = argparse.ArgumentParser()
    configure_facts(bare)
    for name, default in vars(bare.parse_args([])).items():
        if name != "policy" and getattr(parsed, name) != default:
            option = name.replace("_", "-")
            raise UsageError(
                f"--{option} is about a CONTEXT, and the facts are given",
                advice="Write it into the facts.",
            )


def _recorded(build: str) -> Path:
    path = Home.find().builds / build / "decision.json"
    if not _BUILD.fullmatch(build) or not path.exists():
        raise UsageError(
            f"no decision of a build {build[:200]!a} is recorded",
            advice=f"The directories in {Home.find().builds} are the builds.",
        )
    return path


def _document(explained: _Explained) -> dict[str, Any]:
    document: dict[str, Any] = {
        "facts": factsfile.dump(explained.facts),
        "decision": explained.decision,
    }
    if explained.recorded is not None:
        document["differences"] = [
            {"field": field, "then": then, "now": now} for field, then, now in explained.changes
        ]
    if explained.refused:
        document["refused"] = explained.refused
    return document


# -- for people --------------------------------------------------------------------------------


def _lines(explained: _Explained) -> Iterator[str]:
    rows = list(_facts(explained))
    if rows:
        yield "facts that these policies ask for"
        yield from table(rows)
        yield ""
    yield "rules, in order"
    yield from table(list(_steps(explained.decision.trace)))
    yield ""
    yield from _decided(explained.decision)
    if explained.refused:
        yield ""
        yield "refused on other backends"
        yield from table(list(explained.refused.items()))
    if explained.recorded is not None:
        yield ""
        yield from _since(explained)


def _facts(explained: _Explained) -> Iterator[tuple[str, str]]:
    known, document = dict(values(explained.facts)), factsfile.dump(explained.facts)
    named = named_facts(explained.policies)
    if isinstance(explained.decision, Decision):
        known[TRUST] = str(explained.decision.trust)
    else:
        named -= {TRUST}  # a denial does not say
    for name in sorted(named):
        yield name, shown(known[name]) if name in known else _unknown(name, document)


def _unknown(name: str, document: Mapping[str, Any]) -> str:
    section, _, key = name.partition(".")
    if name == "base.onbuild" and not document[section]:
        return "open until the base images are resolved"
    value = document[section][key] if key else document[section]
    if isinstance(value, list):
        return f"unknown, but for {shown(value[:-1])}"
    return "unknown"


def _steps(trace: Sequence[TraceStep]) -> Iterator[tuple[str, str, str, str]]:
    yield "policy", "rule", "found", "effect"
    for step in trace:
        first, *others = step.effect.split("; ")
        yield _place(step), step.rule, step.found, first
        for effect in others:
            yield "", "", "", effect


def _place(step: TraceStep) -> str:
    return f"{step.policy}:{step.line}" if step.line else step.policy


def _decided(decision: Decision | Denial) -> Iterator[str]:
    if isinstance(decision, Denial):
        yield f"denied by {decision.rule}: {decision.reason}"
        return
    yield "decision, and what set it last"
    causes = _causes(decision)
    rows = [
        (field, shown(value), *causes.get(field.removeprefix("limits."), ("", "")))
        for field, value in cases.outcome(plain(decision)).items()
    ]
    yield from table([("field", "value", "policy", "rule"), *rows])


def _causes(decision: Decision) -> dict[str, tuple[str, str]]:
    """Field of the decision to place and rule of the last step that changed it."""
    found: dict[str, tuple[str, str]] = {}
    for step in decision.trace:
        cause = (_place(step), step.rule)
        if step.rule.startswith("trusted/") and step.found == "matched":
            found["trust"] = cause
        if step.effect and "isolation" not in found:  # the first terms set all that they leave out
            names = {field.name for of in (Grant, Limits) for field in fields(of)}
            found |= dict.fromkeys(names, cause)
        for effect in step.effect.split("; "):
            found[effect.partition(" ")[0]] = cause
        if step.rule != "fallback" and "isolation" in found:
            found["wanted"] = found["isolation"]
    return found


def _since(explained: _Explained) -> Iterator[str]:
    then, now = (explained.recorded or {}).get("policies"), plain(explained.decision.policies)
    if then != now:
        yield f"policies then: {shown(then)}"
        yield f"policies now:  {shown(now)}"
    if not explained.changes:
        yield "decided then: the same"
        return
    yield "decided differently then"
    yield from table(
        [("field", "then", "now"), *((f, shown(a), shown(b)) for f, a, b in explained.changes)]
    )

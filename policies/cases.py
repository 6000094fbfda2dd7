"""Test files of policies: facts, and what must come of them.

    policies: [library/strict]        # or paths, relative to this file; the first is the operator's
    facts:                            # of all cases
      dockerfile: {images: ["docker.io/library/debian:12"]}
    cases:
      - name: a frontend is refused
        facts: {dockerfile: {frontend: "docker/dockerfile:1"}}    # over the common ones
        expect: {denied: deny/frontend}
      - name: an ordinary build runs in gVisor
        expect: {isolation: gvisor, limits: {wall_seconds: 900}}

``runner policy test`` runs them. What facts leave out is as ``policies.factsfile`` says.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from xml.etree import ElementTree as ET

from pydantic import Field, StrictBool, ValidationError, model_validator

from policies import loader, marks
from policies.document import (
    MOST_RULES,
    CacheName,
    Frozen,
    IsolationName,
    LimitsDocument,
    NetworkName,
    Text,
)
from policies.engine import decide
from policies.errors import PolicyInvalid
from policies.facts import BuildFacts
from policies.factsfile import ASSUMED, FactsDocument, first_error, over, parse
from policies.loader import Policy
from policies.marks import Marked
from policies.model import Decision, Denial, plain

LIBRARY = "library/"
"""Before the names of shipped policies, where files can be named too."""

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Expectation(Frozen):
    """A denial by one rule, or a decision in all fields that are named."""

    denied: Text | None = None
    isolation: IsolationName | None = None
    wanted: IsolationName | None = None
    trust: Literal["untrusted", "trusted"] | None = None
    network: NetworkName | None = None
    cache: CacheName | None = None
    priority: int | None = None
    provenance: StrictBool | None = None
    signature: StrictBool | None = None
    nonroot: StrictBool | None = None
    rootless: StrictBool | None = None
    retention_days: int | None = None
    fallback: Literal["deny"] | IsolationName | None = None
    limits: LimitsDocument = LimitsDocument()

    def fields(self) -> dict[str, Any]:
        """By the names that ``outcome`` has."""
        stated: dict[str, Any] = plain(self.model_dump(exclude_unset=True, exclude_none=True))
        limits = stated.pop("limits", {})
        return stated | {f"limits.{name}": value for name, value in limits.items()}

    @model_validator(mode="after")
    def _says_one_thing(self) -> "Expectation":
        fields = self.fields()
        if not fields or ("denied" in fields and len(fields) > 1):
            raise ValueError("either denied, or fields of the decision")
        return self


class Case(Frozen):
    """One build that is thought of."""

    name: Annotated[Text, Field(min_length=1)]
    facts: FactsDocument = FactsDocument()
    expect: Expectation


class _CaseDocument(Frozen):
    policies: Annotated[tuple[Annotated[Text, Field(min_length=1)], ...], Field(min_length=1)]
    facts: FactsDocument = FactsDocument()
    cases: Annotated[tuple[Case, ...], Field(min_length=1, max_length=MOST_RULES)]


@dataclass(frozen=True, slots=True)
class CaseFile:
    """A test file that was read.

    Attributes:
        cases: Each with its line and the facts that it comes to.
        source: For messages.
    """

    policies: tuple[Policy, ...]
    cases: tuple[tuple[Case, int, BuildFacts], ...]
    source: str


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What came of one case.

    Attributes:
        line: Where it stands in ``source``.
        decision: With its trace.
        differences: From what was expected, a sentence each; none if it passed.
    """

    name: str
    source: str
    line: int
    decision: Decision | Denial
    differences: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.differences


def find(directory: Path) -> list[Path]:
    """All test files in ``directory`` and below, in order. Raises PolicyInvalid for none."""
    found = sorted(directory.rglob("*.yaml"))
    if not found:
        raise PolicyInvalid(f"{directory}: no *.yaml in it")
    return found


def read(path: Path) -> CaseFile:
    """Reads one test file and the policies that it names.

    Raises:
        PolicyInvalid: One of them cannot be read, or means nothing.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(loader.MOST_BYTES + 1)
    except OSError as error:
        raise PolicyInvalid(f"{path}: {error.strerror}") from None
    if len(data) > loader.MOST_BYTES:
        raise PolicyInvalid(f"{path}: longer than {loader.MOST_BYTES} bytes")
    marked = marks.load(data, str(path))
    try:
        document = _CaseDocument.model_validate(marked.value)
    except ValidationError as error:
        where, what = first_error(error)
        raise marked.error(where, f"{'.'.join(map(str, where)) or 'document'}: {what}") from None
    policies = tuple(policy(name, beside=path.parent) for name in document.policies)
    return CaseFile(policies, tuple(_cases(document, marked)), str(path))


def policy(name: str, *, beside: Path) -> Policy:
    """The policy that is called ``library/NAME``, or stands in a file relative to ``beside``."""
    shipped = name.removeprefix(LIBRARY)
    if name.startswith(LIBRARY) and shipped in loader.LIBRARY:
        return loader.shipped(shipped)
    return loader.read(beside / name)


def _cases(document: _CaseDocument, marked: Marked) -> Iterator[tuple[Case, int, BuildFacts]]:
    common = over(ASSUMED, marked.value.get("facts", {}))
    names = set()
    for index, case in enumerate(document.cases):
        if case.name in names:
            raise marked.error(("cases", index, "name"), f"a second case {case.name!r}")
        names.add(case.name)
        stated = marked.value["cases"][index].get("facts", {})
        try:
            facts = parse(over(common, stated))
        except PolicyInvalid as error:  # each is sound, and together they make no sense
            raise marked.error(("cases", index, "facts"), error.message) from None
        yield case, marked.mark(("cases", index)).line, facts


def run(file: CaseFile) -> tuple[CaseResult, ...]:
    """Decides every case of ``file``."""
    results = []
    for case, line, facts in file.cases:
        decision = decide(file.policies, facts)
        differences = tuple(_missed(case.expect, decision))
        results.append(CaseResult(case.name, file.source, line, decision, differences))
    return tuple(results)


def _missed(expected: Expectation, decision: Decision | Denial) -> list[str]:
    found, fields = outcome(plain(decision)), expected.fields()
    if isinstance(decision, Denial) and expected.denied != decision.rule:
        missed = f"denied by {decision.rule}: {decision.reason}"
        return [f"{missed}; expected {expected.denied}" if expected.denied else missed]
    if isinstance(decision, Decision) and expected.denied is not None:
        return [f"not denied; expected {expected.denied}"]
    return [
        f"{name} is {found[name]}; expected {value}"
        for name, value in fields.items()
        if found[name] != value
    ]


def outcome(decision: Mapping[str, Any]) -> dict[str, Any]:
    """What a decision or denial comes to, flat: without its trace, and whose policies it was.

    Args:
        decision: As ``plain`` has it, or ``decision.json``.
    """
    if "reason" in decision:
        return {"denied": decision.get("rule"), "reason": decision["reason"]}
    grant = dict(decision.get("grant", {}))
    limits = grant.pop("limits", {})
    if grant.get("fallback", "") is None:
        grant["fallback"] = "deny"
    fields = {**decision, **grant, **{f"limits.{name}": value for name, value in limits.items()}}
    # The grant's isolation is what was wanted, and stands there under that name.
    fields["isolation"] = decision.get("isolation")
    return {
        name: value for name, value in fields.items() if name not in {"grant", "trace", "policies"}
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Field, value before and value after, of all in which two outcomes differ; None for absent.

    Where only one of them is a denial, that says it all.
    """
    names = dict.fromkeys([*old, *new])
    if ("denied" in old) != ("denied" in new):
        names = dict.fromkeys(["denied", "reason"])
    return [
        (name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)
    ]


def junit(results: Sequence[CaseResult]) -> bytes:
    """The results as JUnit's XML, a suite per file."""
    root = ET.Element("testsuites", _counts(results))
    for source in dict.fromkeys(result.source for result in results):
        of_file = [result for result in results if result.source == source]
        suite = ET.SubElement(root, "testsuite", {"name": _xml(source), **_counts(of_file)})
        for result in of_file:
            names = {"classname": _xml(source), "name": _xml(result.name)}
            case = ET.SubElement(suite, "testcase", {**names, "line": str(result.line)})
            if not result.passed:
                failure = ET.SubElement(case, "failure", {"message": _xml(result.differences[0])})
                failure.text = _xml("\n".join(result.differences))
    written: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return written


def _counts(results: Sequence[CaseResult]) -> dict[str, str]:
    failed = sum(not result.passed for result in results)
    return {"tests": str(len(results)), "failures": str(failed)}


def _xml(text: str) -> str:
    """XML has no way to say control characters, not even escaped, and none for half characters."""
    return _NO_XML.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)

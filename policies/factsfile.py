"""Facts as a document, nested by the names of the vocabulary: what tests state and builds record.

    >>> parse({"source": {"fork": True}}).source.fork
    True
    >>> dump(parse({"dockerfile": {"images": ["debian", None]}}))["dockerfile"]["images"]
    ['docker.io/library/debian', None]

What is left out has the default of ``BuildFacts``; ``null`` is unknown, and so a ``null`` within a
list of the Dockerfile's says that there may be more. ``base.onbuild``, known or not, says that the
base images were resolved. Besides the vocabulary there is what only the engine asks for: ``uid``,
``capabilities`` and ``frontends`` of the builder, ``egress`` and ``provenance`` of the host.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    StrictBool,
    StrictStr,
    ValidationError,
)

from policies import loader, marks
from policies.document import Frozen, IsolationName
from policies.errors import InvalidReference, PolicyInvalid
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
    is_tenant,
)
from policies.model import plain
from policies.reference import Digest, ImageReference
from policies.vocabulary import FACTS

MOST_BYTES = 64 << 20
"""Of a document as builds record it; what people write is YAML, and bounded like policies."""

ASSUMED: Mapping[str, Any] = {
    "host": {"isolations": ["gvisor"], "rootless": True},
    "builder": {
        "capabilities": [
            *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD"),
            *("NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID", "SETPCAP"),
            *("SETUID", "SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE"),
        ]
    },
}
"""What a person need not write: the local backend, and what buildah needs on it."""


def _image(value: object) -> object:
    try:
        return ImageReference.parse(value if isinstance(value, str) else "")
    except InvalidReference as error:
        raise ValueError(error.message) from None


def _day(value: object) -> object:
    return value.isoformat() if type(value) is date else value


def _tenant(name: str) -> str:
    if name and not is_tenant(name):  # an empty one is for conditions that ask for it
        raise ValueError("a label: a-z, 0-9 and - inside, at most 63 characters")
    return name


def _a_day(text: str) -> str:
    if date.fromisoformat(text).isoformat() != text:
        raise ValueError("YYYY-MM-DD")
    return text


Image = Annotated[ImageReference, BeforeValidator(_image)]
Texts = tuple[StrictStr, ...]
Partial = tuple[StrictStr | None, ...] | None
"""A list that is not complete where it has a None, or is none."""
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
Day = Annotated[StrictStr, BeforeValidator(_day), AfterValidator(_a_day)]


class _Section(Frozen):
    """Only what was stated is looked at, so no default here has a meaning."""

    def stated(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class _Identity(_Section):
    kind: StrictStr = ""
    name: StrictStr = ""


class _Source(_Section):
    kind: StrictStr = ""
    url: StrictStr | None = None
    ref: StrictStr | None = None
    pull_request: StrictBool | None = None
    fork: StrictBool | None = None
    signed: StrictBool | None = None


class _Dockerfile(_Section):
    frontend: StrictStr | None = None
    images: tuple[Image | None, ...] | None = None
    remote_adds: Partial = None
    mounts: Partial = None
    networks: Partial = None
    securities: Partial = None
    secrets: Partial = None
    build_args: Partial = None
    onbuild: StrictBool | None = None
    unknown: Texts = ()

    def facts(self) -> DockerfileFacts:
        """What is null is spoiled, and the sentences say why as well as they can."""
        known: dict[str, Any] = {}
        spoiled = set()
        for name, value in self.stated().items():
            if name == "unknown":
                continue
            attribute = _ATTRIBUTES.get(name, name)
            if value is None or (isinstance(value, tuple) and None in value):
                spoiled.add(attribute)
            known[attribute] = _KNOWN.get(name, _set_of)(value)
        sentences = list(self.unknown)
        if spoiled and not sentences:
            sentences = [f"not known: {', '.join(sorted(spoiled))}"]
        unknown = [Unknown(frozenset(), sentence) for sentence in sentences]
        if spoiled:
            unknown[0] = Unknown(frozenset(spoiled), sentences[0])
        return DockerfileFacts(**known, unknown=tuple(unknown))


def _set_of(value: Partial) -> frozenset[str]:
    return frozenset(_list_of(value))


def _list_of(value: tuple[Any, ...] | None) -> tuple[Any, ...]:
    return tuple(item for item in value or () if item is not None)


_ATTRIBUTES = {"onbuild": "docker_only"}
_KNOWN: Mapping[str, Any] = {
    "frontend": lambda value: value or None,
    "images": _list_of,
    "remote_adds": _list_of,
    "onbuild": lambda value: frozenset({"ONBUILD"} if value else ()),
}


class _Base(_Section):
    onbuild: Texts | None = None


class _Context(_Section):
    bytes: Count = 0
    entries: Count = 0
    links_leaving: Texts | None = ()


class _Builder(_Section):
    name: StrictStr = ""
    digest: Digest | None = None
    uid: Count = 0
    capabilities: Texts = ()
    frontends: StrictBool = False


class _Request(_Section):
    untrusted: StrictBool = False
    backend: StrictStr = ""
    platform: StrictStr = ""
    target: StrictStr = ""
    build_args: Texts = ()
    wall_seconds: Count = 0
    memory_bytes: Count = 0
    cpu_millis: Count = 0

    def facts(self) -> RequestFacts:
        stated = self.stated()
        for name in {"wall_seconds", "memory_bytes", "cpu_millis"} & stated.keys():
            stated[name] = stated[name] or None
        return RequestFacts(**stated)


class _Host(_Section):
    isolations: frozenset[IsolationName] = frozenset()
    egress: StrictBool = False
    provenance: StrictBool = False
    rootless: StrictBool = False


class _Time(_Section):
    date: Day | None = None
    hour: Annotated[int, Field(strict=True, ge=0, le=23)] | None = None
    weekday: Annotated[int, Field(strict=True, ge=1, le=7)] | None = None

    def facts(self) -> TimeFacts | None:
        if self.date is None or self.hour is None:
            if any(value is not None for value in self.stated().values()):
                raise PolicyInvalid("facts: time: date and hour are known together, or not at all")
            return None
        weekday = date.fromisoformat(self.date).isoweekday()
        if self.weekday not in {None, weekday}:
            raise PolicyInvalid(f"facts: time: {self.date} is weekday {weekday}")
        return TimeFacts(date=self.date, hour=self.hour, weekday=weekday)


class FactsDocument(Frozen):
    """All facts of one build; sections that are left out state nothing."""

    identity: _Identity = _Identity()
    tenant: Annotated[StrictStr, AfterValidator(_tenant)] | None = None
    source: _Source = _Source()
    dockerfile: _Dockerfile = _Dockerfile()
    base: _Base = _Base()
    context: _Context = _Context()
    destinations: tuple[Image, ...] = ()
    builder: _Builder = _Builder()
    request: _Request = _Request()
    host: _Host = _Host()
    time: _Time = _Time()

    def facts(self) -> BuildFacts:
        """The same as the engine takes them. Raises PolicyInvalid where they contradict."""
        base = self.base.stated()
        return BuildFacts(
            identity=replace(Identity(), **self.identity.stated()),
            tenant=self.tenant,
            source=replace(SourceFacts(), **self.source.stated()),
            dockerfile=self.dockerfile.facts(),
            base=replace(BaseFacts(resolved=bool(base)), **base),
            context=replace(ContextFacts(), **self.context.stated()),
            destinations=self.destinations,
            builder=replace(BuilderFacts(), **self.builder.stated()),
            request=self.request.facts(),
            host=replace(HostFacts(), **self.host.stated()),
            time=self.time.facts(),
        )


def parse(document: object) -> BuildFacts:
    """The facts that a plain document states.

    Raises:
        PolicyInvalid: A name or a value without meaning, with its path.
    """
    try:
        return FactsDocument.model_validate(document).facts()
    except ValidationError as error:
        where, what = first_error(error)
        raise PolicyInvalid(f"{'.'.join(map(str, ('facts', *where)))}: {what}") from None


def first_error(error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    """Path and sentence of the first thing wrong."""
    first = error.errors()[0]
    return first["loc"], first["msg"].removeprefix("Value error, ")


def dump(facts: BuildFacts) -> dict[str, Any]:
    """The document that ``parse`` reads back: other facts, maybe, but the same decision."""
    document: dict[str, Any] = {}
    for name, fact in FACTS.items():
        section, _, key = name.partition(".")
        value = plain(fact.read(facts))
        if key:
            document.setdefault(section, {})[key] = value
        else:
            document[section] = value
    del document["identity"]["authenticated"]  # follows from its kind
    if not facts.base.resolved:
        del document["base"]["onbuild"]
    _add_what_is_known(document["dockerfile"], facts.dockerfile)
    builder, host = facts.builder, facts.host
    document["builder"] |= {
        "digest": str(builder.digest) if builder.digest is not None else None,
        "uid": builder.uid,
        "capabilities": list(builder.capabilities),
        "frontends": builder.frontends,
    }
    document["host"] |= {
        "egress": host.egress,
        "provenance": host.provenance,
        "rootless": host.rootless,
    }
    return document


def _add_what_is_known(section: dict[str, Any], facts: DockerfileFacts) -> None:
    """Of a list that may be incomplete, the rest: what is known to be denied still is."""
    for name, value in section.items():
        found = getattr(facts, name, None)
        if value is None and isinstance(found, (tuple, frozenset)) and found:
            section[name] = [*plain(found), None]


def over(base: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """``document``, and what ``base`` has where it says nothing, fact by fact."""
    merged = dict(base)
    for section, value in document.items():
        below = merged.get(section)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[section] = {**below, **value} if both else value  # type: ignore[dict-item] # both are
    return merged


@dataclass(frozen=True, slots=True)
class Record:
    """A facts document, and what was decided about it where a build recorded that.

    Attributes:
        decision: Plain, as ``plain`` has decisions and denials.
    """

    facts: BuildFacts
    decision: Mapping[str, Any] | None = None


class _RecordedGrant(BaseModel, frozen=True, extra="allow"):
    limits: dict[str, int]


class _RecordedDecision(BaseModel, frozen=True, extra="allow"):
    grant: _RecordedGrant | None = None


class _Recorded(BaseModel, frozen=True, extra="forbid"):
    facts: dict[str, Any]
    decision: _RecordedDecision


def read(path: Path) -> Record:
    """Reads a facts document, where ASSUMED stands for what it leaves out, or a decision.json.

    Raises:
        PolicyInvalid: It cannot be read, or states what means nothing.
    """
    document = _plain_data(path)
    try:
        if isinstance(document, dict) and "facts" in document:
            recorded = _Recorded.model_validate(document)
            return Record(parse(recorded.facts), recorded.decision.model_dump(exclude_unset=True))
        return Record(parse(over(ASSUMED, document) if isinstance(document, dict) else document))
    except ValidationError as error:
        where, what = first_error(error)
        raise PolicyInvalid(f"{path}: {'.'.join(map(str, where))}: {what}") from None
    except PolicyInvalid as error:
        raise PolicyInvalid(f"{path}: {error.message}") from None


def _plain_data(path: Path) -> object:
    """JSON, or else YAML.

    Not every JSON is YAML: PyYAML takes no DEL, and halves of a surrogate pair for two characters.
    Names in a hostile context have both.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise PolicyInvalid(f"{path}: {error.strerror}") from None
    try:
        if len(data) <= MOST_BYTES:
            text = data.decode("utf-8")
            return json.loads(text, object_pairs_hook=_each_once, parse_constant=_none_such)
    except (ValueError, RecursionError):
        pass  # whatever is wrong with it, the other reader says where
    if len(data) > loader.MOST_BYTES:
        raise PolicyInvalid(f"{path}: no JSON, and longer than {loader.MOST_BYTES} bytes")
    return marks.load(data, str(path)).value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _none_such(name: str) -> Literal[0]:
    raise ValueError(f"{name} is no JSON")

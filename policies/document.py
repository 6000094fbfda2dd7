"""What a policy file says, as its schema has it: frozen values, nothing decided yet.

``policies.loader`` reads files into these; docs/policy.md is their reference.
"""

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    model_validator,
)

from policies.model import Cache, EgressRule, Isolation, Network

MOST_PATTERNS = 10_000
MOST_RULES = 1_000
"""In each section."""
TENANT = "{tenant}"
"""In a pattern, stands for the tenant; where that is unknown, the pattern matches nothing."""

_HOST = re.compile(
    r"(?:\*\.)?(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
)
_LABEL = re.compile(r"[\x20-\x7e]*")


def _by_name(enum: type[Isolation] | type[Network] | type[Cache]) -> BeforeValidator:
    names = {str(member): member for member in enum}

    def parse(value: object) -> object:
        if isinstance(value, enum):
            return value
        if isinstance(value, str) and value in names:
            return names[value]
        raise ValueError(f"one of {', '.join(names)}")

    return BeforeValidator(parse, json_schema_input_type=Literal[tuple(names)])


def _pattern(text: str) -> str:
    rest = text.replace(TENANT, "")
    if not _LABEL.fullmatch(text) or any(character in " {}" for character in rest):
        raise ValueError(f"a pattern has no spaces, and no braces but {TENANT}")
    return text


def _host(text: str) -> str:
    if not _HOST.fullmatch(text) or len(text) > 253 + 2:
        raise ValueError("a host name in lower case, or *.SUFFIX")
    return text


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text))


Text = Annotated[str, Field(max_length=1024, pattern=r"^[^\x00-\x1f\x7f]*$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Pattern = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_pattern)]
Patterns = Annotated[tuple[Pattern, ...], Field(max_length=MOST_PATTERNS)]
IsolationName = Annotated[Isolation, _by_name(Isolation)]
NetworkName = Annotated[Network, _by_name(Network)]
CacheName = Annotated[Cache, _by_name(Cache)]
Positive = Annotated[int, Field(gt=0, strict=True, lt=1 << 62)]
Port = Annotated[int, Field(gt=0, lt=1 << 16, strict=True)]
Method = Annotated[str, Field(pattern=r"^[A-Z]{1,16}$")]
When = Annotated[str, Field(min_length=1)]


Preset = Literal["apk", "apt", "crates", "go", "maven", "npm", "pip", "rubygems"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class LimitsDocument(Frozen):
    """Each field as in ``policies.model.Limits``; what is left out keeps its default."""

    memory_bytes: Positive | None = None
    cpu_millis: Positive | None = None
    disk_bytes: Positive | None = None
    pids: Positive | None = None
    wall_seconds: Positive | None = None
    log_bytes: Positive | None = None
    context_bytes: Positive | None = None
    context_entries: Positive | None = None
    path_bytes: Positive | None = None
    staged_bytes: Positive | None = None
    layers: Positive | None = None
    layer_bytes: Positive | None = None
    layer_entries: Positive | None = None
    egress_bytes: Positive | None = None
    egress_connections: Positive | None = None


class EgressDocument(Frozen):
    """One rule of the egress proxy, as ``policies.model.EgressRule``."""

    hosts: Annotated[
        tuple[Annotated[str, AfterValidator(_host)], ...], Field(max_length=MOST_PATTERNS)
    ] = ()
    preset: Preset | None = None
    ports: Annotated[tuple[Port, ...], Field(min_length=1, max_length=64)] = (443,)
    methods: Annotated[tuple[Method, ...], Field(max_length=16)] = ()
    private_ranges: Annotated[
        tuple[Annotated[str, AfterValidator(_network)], ...], Field(max_length=64)
    ] = ()

    @model_validator(mode="after")
    def _names_hosts(self) -> "EgressDocument":
        if bool(self.hosts) == (self.preset is not None):
            raise ValueError("either hosts or a preset")
        return self

    def rule(self) -> EgressRule:
        """The same as the decision has it."""
        return EgressRule(**dict(self))


class Terms(Frozen):
    """How builds run, and what they may reach. What is left out says nothing."""

    isolation: IsolationName | None = None
    fallback: Literal["deny"] | IsolationName | None = None
    backends: Patterns | None = None
    builders: Patterns | None = None
    nonroot: StrictBool | None = None
    rootless: StrictBool | None = None
    capabilities: Patterns | None = None
    network: NetworkName | None = None
    egress: Annotated[tuple[EgressDocument, ...], Field(max_length=MOST_RULES)] | None = None
    base_images: Patterns | None = None
    pull_credentials: Patterns | None = None
    destinations: Patterns | None = None
    frontends: Patterns | None = None
    cache: CacheName | None = None
    priority: Annotated[int, Field(ge=0, le=100, strict=True)] | None = None
    provenance: StrictBool | None = None
    signature: StrictBool | None = None
    retention_days: Annotated[int, Field(ge=1, le=36500, strict=True)] | None = None
    limits: LimitsDocument = LimitsDocument()

    @model_validator(mode="after")
    def _falls_back_upwards(self) -> "Terms":
        fallback, isolation = self.fallback, self.isolation
        if isinstance(fallback, Isolation) and isolation is not None and fallback <= isolation:
            raise ValueError(f"fallback must be stronger than isolation {isolation}, or deny")
        return self

    def over(self, base: "Terms") -> "Terms":
        """These terms, and those of ``base`` where these say nothing."""
        limits = base.limits.model_copy(update=_stated(self.limits))
        return base.model_copy(update={**_stated(self), "limits": limits})


def _stated(model: Frozen) -> dict[str, Any]:
    return {name: value for name, value in model if value is not None}


class TrustRule(Frozen):
    """Builds that are trusted; of everybody else nothing is."""

    name: Name
    when: When


class DenyRule(Frozen):
    """Builds that are refused."""

    name: Name
    when: When | None = None
    reason: Text = ""


class Rule(Frozen):
    """Terms in place of the default's; the first rule whose condition holds is taken."""

    name: Name
    when: When | None = None
    then: Terms


class Floor(Terms):
    """Terms that are never undercut where the condition holds, or may hold."""

    name: Name
    when: When | None = None


class PolicyDocument(Frozen):
    """One file."""

    api_version: Annotated[Literal["runner/v1alpha1"], Field(alias="apiVersion")]
    name: Name
    description: Text = ""
    extends: Name | None = None
    trusted: Annotated[tuple[TrustRule, ...], Field(max_length=MOST_RULES)] | None = None
    deny: Annotated[tuple[DenyRule, ...], Field(max_length=MOST_RULES)] = ()
    floors: Annotated[tuple[Floor, ...], Field(max_length=MOST_RULES)] = ()
    rules: Annotated[tuple[Rule, ...], Field(max_length=MOST_RULES)] = ()
    default: Terms | None = None

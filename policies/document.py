"""Policy files: YAML in, frozen values out.

>>> shipped("default").document.default.isolation
<Isolation.GVISOR: 2>
"""

import dataclasses
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from policies.errors import PolicyInvalid
from policies.model import Isolation, Limits, Network
from policies.reference import Digest

MOST_BYTES = 1 << 20
MOST_PATTERNS = 10_000


def _by_name(enum: type[Isolation] | type[Network]) -> BeforeValidator:
    names = {str(member): member for member in enum}

    def parse(value: object) -> object:
        if isinstance(value, str) and value in names:
            return names[value]
        raise ValueError(f"one of {', '.join(names)}")

    return BeforeValidator(parse)


Pattern = Annotated[str, Field(min_length=1, max_length=1024)]
Patterns = Annotated[tuple[Pattern, ...], Field(max_length=MOST_PATTERNS)]
IsolationName = Annotated[Isolation, _by_name(Isolation)]
NetworkName = Annotated[Network, _by_name(Network)]
Positive = Annotated[int, Field(gt=0, strict=True)]


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

    def over(self, limits: Limits) -> Limits:
        """``limits`` with what this document states in their place."""
        return dataclasses.replace(limits, **self.model_dump(exclude_none=True))


class Outcome(Frozen):
    """How builds run where no rule says otherwise, and what they may reach.

    A list that is left out allows nothing in the operator's policy, and has no opinion in a
    further one, which can only tighten.
    """

    isolation: IsolationName = Isolation.GVISOR
    backends: Patterns | None = None
    builders: Patterns | None = None
    network: NetworkName = Network.REGISTRIES
    base_images: Patterns | None = None
    pull_credentials: Patterns | None = None
    destinations: Patterns | None = None
    limits: LimitsDocument = LimitsDocument()


class PolicyDocument(Frozen):
    """One file."""

    api_version: Annotated[Literal["runner/v1alpha1"], Field(alias="apiVersion")]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    floor: IsolationName = Isolation.GVISOR
    default: Outcome


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy file that was read, with the digest of its bytes."""

    document: PolicyDocument
    digest: Digest
    source: str


def parse(data: bytes, source: str) -> Policy:
    """Reads one policy file.

    Raises:
        PolicyInvalid: No YAML, an unknown or missing field, or a value without meaning.
    """
    if len(data) > MOST_BYTES:
        raise PolicyInvalid(f"{source}: longer than {MOST_BYTES} bytes")
    try:
        document = PolicyDocument.model_validate(_plain_yaml(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise PolicyInvalid(f"{source}: {where}: {first['msg']}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: no UTF-8, and what only looks like a date or a number, such as 2026-13-45.
        raise PolicyInvalid(f"{source}: {error}") from None
    return Policy(document, Digest.of(data), source)


class _Loader(yaml.SafeLoader):
    """Safe, with text for keys, none of them twice.

    Without aliases, which can grow without bound, and without tags, which the loader trusts to
    suit their values.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - untyped upstream
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        if self.peek_event().tag is not None:  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("tags are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: ANN401 - upstream's signature
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                raise yaml.YAMLError(f"duplicate key or no text: {key!r} at {key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _plain_yaml(data: bytes) -> object:
    loaded: object = yaml.load(data.decode("utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    return loaded


def read(path: Path) -> Policy:
    """Reads the policy file at ``path``. Raises PolicyInvalid."""
    try:
        with path.open("rb") as stream:
            return parse(stream.read(MOST_BYTES + 1), str(path))
    except OSError as error:
        raise PolicyInvalid(f"{path}: {error.strerror}") from None


def shipped(name: str) -> Policy:
    """A policy of the library that comes with this package."""
    data = resources.files("policies.library").joinpath(f"{name}.yaml").read_bytes()
    return parse(data, f"library/{name}")

"""Reads policy files: YAML in, checked policies out, each error with its line and column.

>>> shipped("default").document.default.isolation
<Isolation.GVISOR: 2>
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from policies.conditions import Condition, ConditionInvalid, compile_condition
from policies.document import PolicyDocument, Terms
from policies.errors import PolicyInvalid
from policies.marks import Marked, load
from policies.model import canonical_json
from policies.reference import Digest

SECTIONS = ("trusted", "deny", "floors", "rules")
LIBRARY = ("default", "strict", "ci-pull-requests", "saas-multi-tenant")
MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that was read and checked, with what it extends taken in.

    Attributes:
        document: All that applies.
        conditions: Compiled, by their text.
        origins: Policy and line of each rule, by ``SECTION/NAME``.
        digest: Of the document, whatever its files look like.
        source: For messages.
    """

    document: PolicyDocument
    conditions: Mapping[str, Condition]
    origins: Mapping[str, tuple[str, int]]
    digest: Digest
    source: str

    @property
    def name(self) -> str:
        return self.document.name


def parse(data: bytes, source: str) -> Policy:
    """Reads one policy file.

    Raises:
        PolicyInvalid: No YAML, an unknown or missing field, a value without meaning, or a
            condition that is none; with line and column.
    """
    if len(data) > MOST_BYTES:
        raise PolicyInvalid(f"{source}: longer than {MOST_BYTES} bytes")
    marked = load(data, source)
    if (empty := _first_null(marked.value, ())) is not None:
        where = ".".join(map(str, empty)) or "document"
        raise marked.error(empty, f"{where}: nothing stands here; leave it out, or say what")
    try:
        document = PolicyDocument.model_validate(marked.value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise marked.error(first["loc"], f"{where}: {first['msg']}") from None
    policy = _checked(document, marked)
    if document.extends is None:
        return policy
    if document.extends not in LIBRARY:
        raise marked.error(("extends",), f"extends one of {', '.join(LIBRARY)}")
    return _extending(policy, shipped(document.extends), marked)


def _first_null(value: Any, path: tuple[str | int, ...]) -> tuple[str | int, ...] | None:  # noqa: ANN401 - any YAML
    """Where a key has no value: an empty ``when`` is not to be one that always holds."""
    if value is None:
        return path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    found = (_first_null(item, (*path, key)) for key, item in items)
    return next((empty for empty in found if empty is not None), None)


def _checked(document: PolicyDocument, marked: Marked) -> Policy:
    """Every condition compiled, every name once."""
    conditions: dict[str, Condition] = {}
    origins: dict[str, tuple[str, int]] = {}
    for section in SECTIONS:
        for index, rule in enumerate(getattr(document, section) or ()):
            key = f"{section}/{rule.name}"
            if key in origins:
                raise marked.error((section, index, "name"), f"a second rule {rule.name}")
            origins[key] = (document.name, marked.mark((section, index)).line)
            if rule.when is not None:
                conditions[rule.when] = _compiled(rule.when, marked, (section, index, "when"))
    return Policy(document, conditions, origins, _digest(document), marked.source)


def _compiled(text: str, marked: Marked, path: tuple[str | int, ...]) -> Condition:
    try:
        return compile_condition(text)
    except ConditionInvalid as error:
        where = ".".join(map(str, path))
        raise marked.error(path, f"{where}: {error}", within=(error.line, error.column)) from None


def _extending(policy: Policy, base: Policy, marked: Marked) -> Policy:
    """Both: what denies and what raises is added up; of the rest, the extending one goes first."""
    for key in sorted(policy.origins.keys() & base.origins.keys()):
        section, _, name = key.partition("/")
        raise marked.error((section,), f"{base.name} has a rule {name} already")
    mine, theirs = policy.document, base.document
    document = mine.model_copy(
        update={
            "extends": None,
            "trusted": mine.trusted if mine.trusted is not None else theirs.trusted,
            "deny": theirs.deny + mine.deny,
            "floors": theirs.floors + mine.floors,
            "rules": mine.rules + theirs.rules,
            "default": (mine.default or Terms()).over(theirs.default or Terms()),
        }
    )
    return replace(
        policy,
        document=document,
        conditions={**base.conditions, **policy.conditions},
        origins={**base.origins, **policy.origins},
        digest=_digest(document),
    )


def stated(document: PolicyDocument) -> dict[str, Any]:
    """The document as its file would say it, without what it leaves out."""
    return document.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)


def _digest(document: PolicyDocument) -> Digest:
    return Digest.of(canonical_json(stated(document)))


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

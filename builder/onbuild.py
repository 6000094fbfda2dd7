"""What a base image's ONBUILD instructions ask for, as if they stood in the Dockerfile."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from builder.dockerfile import read_dockerfile
from builder.errors import DockerfileInvalid
from policies.facts import DockerfileFacts, Unknown

_ADDED = ("images", "remote_adds", "mounts", "networks", "securities", "secrets")
_ALL = frozenset(field.name for field in fields(DockerfileFacts)) - {"unknown", "stages"}


def with_triggers(facts: DockerfileFacts, triggers: Sequence[str]) -> DockerfileFacts:
    """``facts`` with what ``triggers`` ask for; unknown throughout where that cannot be told.

    Args:
        facts: Of the Dockerfile.
        triggers: Of all its base images, without the word ONBUILD; hostile text.
    """
    if not triggers:
        return facts
    text = "\n".join(["FROM scratch", *triggers, ""])
    try:
        more = read_dockerfile(text.encode("utf-8", "replace"), build_args={}, target=None)
    except DockerfileInvalid:
        why = Unknown(_ALL, "An ONBUILD instruction of a base image cannot be read.")
        return replace(facts, unknown=(*facts.unknown, why))
    return replace(
        facts,
        unknown=(*facts.unknown, *more.unknown),
        **{name: _union(getattr(facts, name), getattr(more, name)) for name in _ADDED},
    )


def _union(one: Any, other: Any) -> Any:  # noqa: ANN401 - two sets, or two tuples in order
    return one | other if isinstance(one, frozenset) else tuple(dict.fromkeys((*one, *other)))
